# Copyright 2026 The SpaceExploreAI contributors. Licensed under the MIT License.
"""Time-to-text extractor after LLM-PS (arXiv 2503.09656): a masked autoencoder of patches that names each with a word.

It teaches the multi-scale CNN while that is trained, and describes a chart. No forecast reads it.
"""

# Shapes: B batch, T time steps, F features, P patches, L steps of a patch, E features of a patch, W words

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoTokenizer

from .configuration_spaceexplore import SpaceExploreConfig

WORDS = ("surge", "rise", "drift", "slip", "drop", "plunge", "rebound", "fade", "fluctuate", "flat", "hover")
IGNORE_INDEX = -100


def word_labels(returns: torch.Tensor, attention_mask: torch.Tensor | None, length: int, stride: int) -> torch.Tensor:
    """
    Weak labels: the word that the daily returns of a patch deserve.

    With returns in units of the volatility known the day before, a patch with n known days moved by z, their sum over
    sqrt(n), and varied by v, their root mean square; z1 and z2 are the sums of its older and newer half over
    sqrt(n / 2). The first line that holds names it:

    | word | rule |
    |---|---|
    | surge, plunge | z ≥ 1.5, z ≤ -1.5 |
    | rebound, fade | z1 ≤ -0.75 and z2 ≥ 0.75, and the reverse |
    | rise, drop | z ≥ 0.75, z ≤ -0.75 |
    | drift, slip | z ≥ 0.25, z ≤ -0.25 |
    | fluctuate, flat | v ≥ 1.2, v ≤ 0.7 |
    | hover | else |

    Args:
        returns (`torch.Tensor` of shape `(B, T)`): log-return of each step in units of volatility, NaN where unknown.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 for padded steps.
        length (`int`): steps L of a patch.
        stride (`int`): steps S from a patch to the next.
    Returns:
        `torch.LongTensor` of shape `(B, P)`: index into `WORDS`, -100 where half of a patch or more is unknown.
    """
    known = returns.isfinite() if attention_mask is None else returns.isfinite() & attention_mask.bool()
    series = torch.stack((torch.where(known, returns, 0.0).float(), known.float()), dim=-1)
    moves, inside = cut_patches(series, length, stride).unbind(-1)  # (B, P, L)
    count = inside.sum(-1)
    days = count.clamp(min=1)
    z = moves.sum(-1) / days.sqrt()
    older, newer = (half.sum(-1) / (days / 2).sqrt() for half in moves.split([length // 2, length - length // 2], -1))
    variation = (moves.square().sum(-1) / days).sqrt()
    rules = {
        "surge": z >= 1.5,
        "plunge": z <= -1.5,
        "rebound": (older <= -0.75) & (newer >= 0.75),
        "fade": (older >= 0.75) & (newer <= -0.75),
        "rise": z >= 0.75,
        "drop": z <= -0.75,
        "drift": z >= 0.25,
        "slip": z <= -0.25,
        "fluctuate": variation >= 1.2,
        "flat": variation <= 0.7,
    }
    labels = torch.full_like(z, WORDS.index("hover"), dtype=torch.long)
    for word, holds in reversed(rules.items()):
        labels = torch.where(holds, WORDS.index(word), labels)
    return torch.where(count > length / 2, labels, IGNORE_INDEX)


def cut_patches(values: torch.Tensor, length: int, stride: int) -> torch.Tensor:
    """Overlapping patches, (B, T, F) to (B, P, L, F). The newest ends with the series; zeros fill up the oldest."""
    steps = values.shape[1]
    patches = max(1, math.ceil((steps - length) / stride) + 1)
    padded = F.pad(values, (0, 0, (patches - 1) * stride + length - steps, 0))
    return padded.unfold(1, length, stride).transpose(2, 3)


def add_positions(patches: torch.Tensor) -> torch.Tensor:
    """Adds sinusoids of the age of a patch, 0 for the newest, so that padding on the left changes nothing."""
    count, size = patches.shape[1:]
    age = torch.arange(count - 1, -1, -1, device=patches.device, dtype=torch.float)
    frequencies = torch.arange(0, size, 2, device=patches.device, dtype=torch.float).mul(-math.log(1e4) / size).exp()
    angles = age.unsqueeze(-1) * frequencies
    return patches + torch.cat((angles.sin(), angles.cos()), dim=-1).to(patches.dtype)


def transformer(config: SpaceExploreConfig, layers: int) -> nn.TransformerEncoder:
    # No dropout: masking is noise enough, and as a teacher the extractor should not be noisy.
    layer = nn.TransformerEncoderLayer(
        config.t2t_hidden_size,
        config.t2t_num_attention_heads,
        config.t2t_intermediate_size,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(config.t2t_hidden_size), enable_nested_tensor=False)


def is_row(dates) -> bool:
    """Whether these are dates, not one of them."""
    return hasattr(dates, "__iter__") and not isinstance(dates, str)


class SpaceExploreT2T(nn.Module):
    """Encoder of patches, and the words for them."""

    def __init__(self, config: SpaceExploreConfig):
        super().__init__()
        self.length = config.t2t_patch_length
        self.stride = config.t2t_patch_length - config.t2t_patch_overlap
        self.patch_proj = nn.Linear(self.length * config.num_features, config.t2t_hidden_size)
        self.encoder = transformer(config, config.t2t_num_hidden_layers)
        self.word_proj = nn.Linear(config.t2t_hidden_size, config.t2t_hidden_size)
        self.word_embeddings = nn.Embedding(len(WORDS), config.t2t_hidden_size)
        # As of batch normalisation: how often it was trained, so that an untrained one does not describe.
        self.num_batches_tracked = nn.Buffer(torch.tensor(0))

    def cut(self, past_values: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, F) values to patches (B, P, L, F), zero where missing, and their real steps (B, P, L)."""
        real = torch.ones_like(past_values[..., 0]) if attention_mask is None else attention_mask
        known = past_values.isfinite() & real.bool().unsqueeze(-1)
        patches = cut_patches(torch.where(known, past_values, 0.0), self.length, self.stride)
        steps = cut_patches(real.unsqueeze(-1).to(patches.dtype), self.length, self.stride).squeeze(-1).bool()
        # Where padding begins, a patch may have no more real steps than it shares with the next: without padding it
        # would not be there.
        own = steps[..., : self.stride].any(-1)
        own[:, -1] = True
        # The dtype of the embedding, not of the projection, which may be quantised.
        return patches.to(self.word_embeddings.weight.dtype), steps & own.unsqueeze(-1)

    def encode(self, patches: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Features of the patches, (B, P, L, F) to (B, P, E); only `visible` (B, P) ones are looked at."""
        embedded = add_positions(self.patch_proj(patches.flatten(2)))
        return self.encoder(embedded, src_key_padding_mask=~visible)

    def name(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of the words, (B, P, E) to (B, P, W)."""
        return F.linear(self.word_proj(features), self.word_embeddings.weight)

    def feature_loss(
        self,
        features: torch.Tensor,
        past_values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        feature_proj: nn.Module,
    ) -> torch.Tensor:
        """
        Squared distance between the projected features of the multi-scale CNN, averaged over each patch, and those of
        the patch here, which receive no gradient: ‖F_MS - F_T2T‖² of LLM-PS with the regressor of FitNets (1412.6550).

        Args:
            features (`torch.Tensor` of shape `(B, T, D)`): of the multi-scale CNN.
            past_values (`torch.Tensor` of shape `(B, T, F)`): what both have read.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 for padded steps.
            feature_proj (`nn.Module`): D to E features.
        Returns:
            `torch.Tensor`: the mean over patches and features.
        """
        with torch.no_grad():
            patches, real = self.cut(past_values, attention_mask)
            visible = real.any(-1)
            target = self.encode(patches, visible)
        weights = real.to(features.dtype).unsqueeze(-1)  # (B, P, L, 1)
        pooled = (cut_patches(features, self.length, self.stride) * weights).sum(2) / weights.sum(2).clamp(min=1)
        distance = (feature_proj(pooled) - target).square().mean(-1)
        return torch.where(visible, distance, 0.0).sum() / visible.sum().clamp(min=1)

    @torch.no_grad()
    def describe(
        self, past_values: torch.Tensor, attention_mask: torch.Tensor | None = None, dates=None
    ) -> list[list[dict]]:
        """
        Names every patch.

        Args:
            past_values (`torch.Tensor` of shape `(B, T, F)`): normalised features, oldest first.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 for padded steps.
            dates (*optional*): (B, T) or (T,) dates of the steps, of any kind.
        Returns:
            A list for each series, oldest first, of `{"start", "end", "word", "probability"}`; start and end are the
            dates of the first and last unpadded step of the patch, or their positions where no dates are given.
        """
        if not self.num_batches_tracked:
            raise ValueError("the time-to-text extractor of this checkpoint was never trained: it has no words yet")
        patches, real = self.cut(past_values, attention_mask)
        visible = real.any(-1)
        probabilities = self.name(self.encode(patches, visible)).float().softmax(-1)
        best, words = probabilities.max(-1)
        labels = self.step_labels(past_values.shape[:2], dates)
        offset = (real.shape[1] - 1) * self.stride + self.length - past_values.shape[1]
        described = []
        for row in range(len(real)):
            described.append([])
            for patch in visible[row].nonzero().flatten().tolist():
                inside = real[row, patch].nonzero().flatten() + patch * self.stride - offset
                span = {"start": labels[row][inside[0]], "end": labels[row][inside[-1]]}
                named = {"word": WORDS[words[row, patch]], "probability": best[row, patch].item()}
                described[-1].append(span | named)
        return described

    @staticmethod
    def step_labels(shape: torch.Size, dates) -> list:
        """What stands for each step, (B, T)."""
        batch_size, steps = shape
        if dates is None:
            return [range(steps)] * batch_size
        nested = not isinstance(dates, str) and all(is_row(row) for row in dates)
        rows = [list(row) for row in dates] if nested else [list(dates)] * batch_size
        if isinstance(dates, str) or [len(row) for row in rows] != [steps] * batch_size:
            got = repr(dates) if isinstance(dates, str) else [len(row) for row in rows]
            raise ValueError(f"dates must name the {steps} steps of all or each of {batch_size} series, got {got}")
        return rows

    @torch.no_grad()
    def load_word_embeddings(self, path: str):
        """
        Takes the word embeddings from a text model: the mean over each word's tokens, centred and rotated into E
        dimensions, which keeps all distances when E ≥ W - 1, and scaled to the spread of fresh ones.

        Args:
            path (`str`): folder of a transformers text model with its tokenizer.
        """
        tokenizer, table = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).get_input_embeddings()
        tokens = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS]
        words = torch.stack([table.weight[ids].float().mean(0) for ids in tokens])
        if not F.pdist(words).min() > 0:  # nor where a word has no token, whose mean is no number
            raise ValueError(f"a text model must tell the words {', '.join(WORDS)} apart, got {path}")
        left, singular, _ = torch.linalg.svd(words - words.mean(0), full_matrices=False)
        axes = (left * singular)[:, : self.word_embeddings.embedding_dim]
        embedded = F.pad(axes, (0, self.word_embeddings.embedding_dim - axes.shape[-1]))
        self.word_embeddings.weight.copy_(embedded * (self.word_embeddings.weight.std() / embedded.std()))


class SpaceExploreT2TDecoder(nn.Module):
    """Reconstructs the patches that the encoder did not see; only its own training needs it."""

    def __init__(self, config: SpaceExploreConfig):
        super().__init__()
        self.mask_ratio = config.t2t_mask_ratio
        self.length = config.t2t_patch_length
        self.mask_token = nn.Parameter(torch.zeros(config.t2t_hidden_size))
        self.layers = transformer(config, config.t2t_num_decoder_layers)
        self.out_proj = nn.Linear(config.t2t_hidden_size, config.t2t_patch_length * config.num_features)

    def choose_visible(self, existing: torch.Tensor) -> torch.Tensor:
        """
        Which patches, (B, P), the encoder may see: all but `mask_ratio` of the `existing` ones, and at least one; at
        random in training, and spread evenly and always the same in evaluation.
        """
        if self.training:
            order = torch.rand_like(existing, dtype=torch.float)
        else:
            age = torch.arange(existing.shape[1], 0, -1, device=existing.device)  # padding on the left changes nothing
            order = (age * ((math.sqrt(5) - 1) / 2) % 1).expand_as(existing)
        rank = torch.where(existing, order, 2.0).argsort(dim=-1).argsort(dim=-1)
        seen = (existing.sum(-1, keepdim=True) * (1 - self.mask_ratio)).round().clamp(min=1)
        return existing & (rank < seen)

    def forward(self, features: torch.Tensor, visible: torch.Tensor, existing: torch.Tensor) -> torch.Tensor:
        """Features (B, P, E) of the `visible` patches to the values (B, P, L, F) of all `existing` ones."""
        tokens = torch.where(visible.unsqueeze(-1), features, self.mask_token)
        decoded = self.layers(add_positions(tokens), src_key_padding_mask=~existing)
        return self.out_proj(decoded).unflatten(-1, (self.length, -1))

    @staticmethod
    def hidden_steps(real: torch.Tensor, visible: torch.Tensor, stride: int) -> torch.Tensor:
        """Real steps, (B, P, L), of hidden patches that no visible patch shows by overlapping."""
        count, length = real.shape[1:]
        shown = real & visible.unsqueeze(-1)
        steps = (
            torch.arange(length, device=real.device) + torch.arange(count, device=real.device).unsqueeze(-1) * stride
        )
        series = torch.zeros(len(real), (count - 1) * stride + length, device=real.device)
        series = series.index_add(1, steps.flatten(), shown.flatten(1).float())
        return real & (series[:, steps] == 0)


__all__ = ["WORDS", "SpaceExploreT2T", "SpaceExploreT2TDecoder", "word_labels"]
