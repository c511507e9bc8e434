"""Paths of daily returns from a causal language model: samples of them, and how likely it takes one to be."""

import numpy as np
import torch
from torch.nn import functional as F

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.collators import collate_windows
from spaceexploreai.data.windows import Split, network_inputs
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries
from spaceexploreai.modeling_spaceexplore import SpaceExploreForCausalLM
from spaceexploreai.paths_spaceexplore import draw_shocks, make_prompt, sample_paths
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer

# Shapes: N histories, K samples of each, H days, V return tokens


class ModelPaths:
    """What a model says may follow: paths of log-returns for each history (see `stocks.SamplePaths`).

    Args:
        model: a causal language model.
        tokenizer: its own.
        context_length: steps T that it reads of a history.
        num_samples: paths K of a history.
        seed: of the draws.
        temperature: that logits are divided by.
        batch_size: paths at a time.
    """

    def __init__(
        self,
        model: SpaceExploreForCausalLM,
        tokenizer: SpaceExploreTokenizer,
        context_length: int,
        num_samples: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        batch_size: int = 512,
    ):
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self.model, self.tokenizer, self.context_length = model.eval(), tokenizer, context_length
        self.num_samples, self.temperature = num_samples, temperature
        self.batch_size = max(batch_size // num_samples, 1)
        self.seed = seed

    @classmethod
    def from_pretrained(cls, folder: str, context_length: int, num_samples: int = 1, seed: int = 0) -> "ModelPaths":
        """Of a checkpoint folder or Hub repository."""
        model = SpaceExploreForCausalLM.from_pretrained(folder)
        return cls(model, SpaceExploreTokenizer.from_pretrained(folder), context_length, num_samples, seed)

    @property
    def config(self) -> SpaceExploreConfig:
        return self.model.config

    def __call__(self, histories: list[EncodedSeries], length: int) -> np.ndarray:
        """(N, K, length) daily log-returns after the last step of each history."""
        return np.concatenate([self._sample(histories[batch], length) for batch in self._batches(len(histories))])

    def _batches(self, count: int) -> list[slice]:
        return [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]

    def _sample(self, histories: list[EncodedSeries], length: int) -> np.ndarray:
        shocks = [draw_shocks(self.seed, one.ticker, one.dates[-1], self.num_samples, length) for one in histories]
        shocks = torch.from_numpy(np.stack(shocks)).to(self.model.device)
        return sample_paths(self.model, self.tokenizer, self._context(histories), shocks, self.temperature)

    @torch.no_grad()
    def logits(self, histories: list[EncodedSeries], paths: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """What is said of each day after the days before it: (N, H, V) over the return tokens, and the (N, H) indices
        of those that (N, H) paths have."""
        scale = np.array([one.scale[-1] for one in histories], dtype=np.float64)
        tokens = torch.from_numpy(self.tokenizer.encode_returns(paths, scale))
        logits = [self._logits(histories[batch], tokens[batch]) for batch in self._batches(len(histories))]
        return torch.cat(logits) / self.temperature, tokens - self.tokenizer.return_token_ids.start

    def _logits(self, histories: list[EncodedSeries], tokens: torch.Tensor) -> torch.Tensor:
        batch, tokens = self._prompt(histories), tokens.to(self.model.device)
        batch["input_ids"] = torch.cat([batch["input_ids"], tokens], dim=1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(tokens)], dim=1)
        logits = self.model(**batch, logits_to_keep=tokens.shape[1] + 1).logits[:, :-1]
        return logits[..., self.tokenizer.return_token_ids.start :].float().cpu()

    def _prompt(self, histories: list[EncodedSeries]) -> dict[str, torch.Tensor]:
        return make_prompt(self.tokenizer, self._context(histories))

    def _context(self, histories: list[EncodedSeries]) -> dict[str, torch.Tensor]:
        steps = slice(-self.context_length, None)
        context = collate_windows([network_inputs(one, steps) for one in histories])
        return {name: tensor.to(self.model.device) for name, tensor in context.items()}


def language_config(checkpoint: str) -> SpaceExploreConfig:
    """Of a causal language model; refuses another."""
    config = SpaceExploreConfig.from_pretrained(checkpoint)
    if config.vocab_size is None:
        raise ValueError(f"{checkpoint} has no vocabulary: train it with --task causal_lm")
    return config


def check_dates(config: SpaceExploreConfig, split: Split, checkpoint: str) -> None:
    """Refuses to align a model on days that it was not trained on, which evaluation would take for unseen."""
    end, cutoff = f"{split.train.end:%Y-%m-%d}", config.train_cutoff
    if cutoff is not None and cutoff < end:
        raise ValueError(
            f"{checkpoint} was trained to {cutoff}, and pairs are made to {end}: align it on what it knows"
        )


def fit_temperature(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """The temperature at which the tokens are likeliest (Guo et al., 2017, arXiv 1706.04599): the one number by which
    a forecast can be made wider or narrower without being changed otherwise.

    Args:
        logits: (N, H, V) at temperature 1.
        tokens: (N, H) indices.
    """
    log_temperature = torch.zeros((), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits.double().flatten(0, 1) / log_temperature.exp(), tokens.flatten())
        value.backward()
        return value

    optimizer.step(loss)
    return log_temperature.exp().item()
