"""The time-to-text extractor: its patches, words and masks against plain loops, what it learns, teaches and says."""

import functools
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from sklearn.decomposition import PCA
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Dataset
from transformers import (
    AutoModelForPreTraining,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.modeling_spaceexplore import (
    SpaceExploreForCausalLM,
    SpaceExploreForClassification,
    SpaceExploreForRegression,
    SpaceExploreForTimeToText,
    SpaceExplorePreTrainedModel,
)
from spaceexploreai.t2t_spaceexplore import WORDS, SpaceExploreT2T, add_positions, cut_patches, word_labels

BATCH, STEPS, FEATURES, HORIZONS = 4, 30, 3, [1, 2, 5]
LENGTH, OVERLAP = 8, 3
STRIDE = LENGTH - OVERLAP
# No two sizes alike, so that a wrong axis is seen.
BACKBONE = {
    "num_features": FEATURES,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 16,
    "moe_intermediate_size": 40,
    "n_routed_experts": 5,
    "horizons": HORIZONS,
    "quantile_levels": [0.1, 0.3, 0.5, 0.9],
    "max_position_embeddings": 64,
    "mscnn_num_blocks": 1,
}
EXTRACTOR = {
    "t2t_num_hidden_layers": 2,
    "t2t_num_decoder_layers": 1,
    "t2t_hidden_size": 20,
    "t2t_intermediate_size": 28,
    "t2t_num_attention_heads": 2,
    "t2t_patch_length": LENGTH,
    "t2t_patch_overlap": OVERLAP,
    "t2t_mask_ratio": 0.6,
}
FORECASTERS = [SpaceExploreForRegression, SpaceExploreForClassification, SpaceExploreForCausalLM]
EVERY_FORECASTER = pytest.mark.parametrize("head", FORECASTERS)

few = settings(max_examples=8, deadline=None)
many = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**16)


def make_config(**overrides) -> SpaceExploreConfig:
    return SpaceExploreConfig(**{**BACKBONE, **EXTRACTOR, "initializer_range": 0.1, **overrides})


def make_model(head: type = SpaceExploreForTimeToText, seed: int = 0, **overrides) -> SpaceExplorePreTrainedModel:
    """Biases and norms, which start at a constant, are random too."""
    torch.manual_seed(seed)
    vocabulary = {"vocab_size": 11} if head is SpaceExploreForCausalLM else {}
    model = head(make_config(**vocabulary, **overrides)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@functools.cache
def shared_model() -> SpaceExploreForTimeToText:
    """For tests that only read it; it believes that it was trained."""
    model = make_model().requires_grad_(False)
    model.model.t2t.num_batches_tracked.fill_(1)
    return model


def make_batch(seed: int = 0, batch: int = BATCH, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Random features and returns with gaps, the first rows left-padded to different lengths."""
    generator = torch.Generator().manual_seed(seed)
    past_values, returns = torch.randn(batch, steps, FEATURES + 1, generator=generator).split([FEATURES, 1], dim=-1)
    missing = torch.rand(past_values.shape, generator=generator) < 0.1
    unknown = torch.rand(batch, steps, generator=generator) < 0.1
    padding = torch.tensor([[steps // 2], [steps // 3], [steps // STEPS], *[[0]] * batch])[:batch]
    return {
        "past_values": past_values.masked_fill(missing, torch.nan),
        "attention_mask": (torch.arange(steps) >= padding).long(),
        "returns": returns.squeeze(-1).masked_fill(unknown, torch.nan),
    }


def plain_starts(steps: int, length: int = LENGTH, stride: int = STRIDE) -> list[int]:
    """First step of each patch, oldest first: counted back from the newest, until one begins with the series."""
    starts = [steps - length]
    while starts[0] > 0:
        starts.insert(0, starts[0] - stride)
    return starts


@st.composite
def patch_sizes(draw) -> tuple[int, int]:
    length = draw(st.integers(1, 12))
    return length, draw(st.integers(1, length))


# --- patches ---


@many
@given(seed=seeds, steps=st.integers(1, 40), sizes=patch_sizes())
def test_patches_are_those_of_a_plain_loop(seed, steps, sizes):
    length, stride = sizes
    values = torch.randn(2, steps, FEATURES, generator=torch.Generator().manual_seed(seed))
    patches = cut_patches(values, length, stride)
    starts = plain_starts(steps, length, stride)
    assert patches.shape == (2, len(starts), length, FEATURES)
    for patch, start in zip(patches.transpose(0, 1), starts, strict=True):
        for step in range(length):
            expected = values[:, start + step] if start + step >= 0 else torch.zeros(2, FEATURES)
            assert torch.equal(patch[:, step], expected)


@many
@given(steps=st.integers(1, 60), sizes=patch_sizes())
def test_patches_cover_every_step_and_no_more_than_needed(steps, sizes):
    length, stride = sizes
    patches = cut_patches(torch.arange(1.0, steps + 1).view(1, -1, 1), length, stride).squeeze()
    rows = patches.view(-1, length).tolist()
    assert set(range(1, steps + 1)) <= {step for row in rows for step in row}
    assert rows[-1][-1] == steps
    assert (len(rows) - 1) * stride < max(steps - length, 0) + stride  # one fewer would leave steps out
    assert all(0 not in row for row in rows[1:])


def test_missing_values_are_zero_and_padded_steps_are_not_real():
    batch = make_batch()
    values = batch["past_values"].clone()
    values[1, -1, 0], values[2, -2, 1] = math.inf, -math.inf
    known = values.isfinite() & batch["attention_mask"].bool().unsqueeze(-1)
    patches, real = shared_model().model.t2t.cut(values, batch["attention_mask"])
    assert torch.equal(patches, cut_patches(torch.where(known, values, 0.0), LENGTH, STRIDE))
    assert torch.equal(real, cut_patches(batch["attention_mask"].unsqueeze(-1), LENGTH, STRIDE).squeeze(-1).bool())
    filled = shared_model()(torch.where(known, values, 0.0), batch["attention_mask"])
    assert torch.equal(shared_model()(values, batch["attention_mask"]).loss, filled.loss)


# --- words ---


def plain_word(days: list[float | None]) -> str | None:
    """The table of `word_labels`, one patch at a time."""
    known = [day for day in days if day is not None]
    if 2 * len(known) <= len(days):
        return None

    def move(part: list[float | None], count: float) -> float:
        return sum(day for day in part if day is not None) / math.sqrt(count)

    n, half = len(known), len(days) // 2
    z, z1, z2 = move(days, n), move(days[:half], n / 2), move(days[half:], n / 2)
    v = math.sqrt(sum(day * day for day in known) / n)
    rules = [
        ("surge", z >= 1.5),
        ("plunge", z <= -1.5),
        ("rebound", z1 <= -0.75 and z2 >= 0.75),
        ("fade", z1 >= 0.75 and z2 <= -0.75),
        ("rise", z >= 0.75),
        ("drop", z <= -0.75),
        ("drift", z >= 0.25),
        ("slip", z <= -0.25),
        ("fluctuate", v >= 1.2),
        ("flat", v <= 0.7),
        ("hover", True),
    ]
    return next(word for word, holds in rules if holds)


def named(labels: torch.Tensor) -> list[list[str | None]]:
    return [[None if label == -100 else WORDS[label] for label in row] for row in labels.tolist()]


def plain_words(batch: dict, length: int = LENGTH, stride: int = STRIDE) -> list[list[str | None]]:
    known = batch["returns"].isfinite() & batch["attention_mask"].bool()
    rows = torch.where(known, batch["returns"], torch.nan).tolist()
    return [
        [
            plain_word(
                [None if step < 0 or math.isnan(row[step]) else row[step] for step in range(start, start + length)]
            )
            for start in plain_starts(len(row), length, stride)
        ]
        for row in rows
    ]


@many
@given(seed=seeds, steps=st.integers(1, 40), sizes=patch_sizes(), size=st.sampled_from([0.3, 1.0, 2.0]))
def test_words_are_those_of_the_table(seed, steps, sizes, size):
    batch = make_batch(seed, steps=steps)
    batch["returns"][0, -1] = math.inf
    # Whole 64ths add up without rounding, so that no sum is near a threshold by rounding alone.
    batch["returns"] = (64 * size * batch["returns"]).round() / 64
    expected = plain_words(batch, *sizes)
    assert named(word_labels(batch["returns"], batch["attention_mask"], *sizes)) == expected
    known = batch["returns"].masked_fill(batch["attention_mask"] == 0, torch.nan)
    assert named(word_labels(known, None, *sizes)) == expected


CRAFTED = [
    ("surge", [0.75, 0.75, 0.75, 0.75]),
    ("surge", [-0.54, -0.54, 2.1, 2.1]),  # the halves of a rebound as well
    ("plunge", [-0.75, -0.75, -0.75, -0.75]),
    ("rebound", [-0.54, -0.54, 0.54, 0.54]),
    ("rebound", [-0.54, -0.54, 1.34, 1.34]),  # the move of a rise as well
    ("fade", [0.54, 0.54, -0.54, -0.54]),
    ("rise", [0.375, 0.375, 0.375, 0.375]),
    ("rise", [0.74, 0.74, 0.74, 0.74]),
    ("drop", [-0.375, -0.375, -0.375, -0.375]),
    ("drift", [0.125, 0.125, 0.125, 0.125]),
    ("drift", [0.37, 0.37, 0.37, 0.37]),
    ("slip", [-0.125, -0.125, -0.125, -0.125]),
    ("fluctuate", [1.21, -1.21, 1.21, -1.21]),
    ("flat", [0.69, -0.69, 0.69, -0.69]),
    ("flat", [0.12, 0.12, 0.12, 0.12]),
    ("flat", [-0.52, -0.52, 0.52, 0.52]),
    ("hover", [0.71, -0.71, 0.71, -0.71]),
    ("hover", [1.19, -1.19, 1.19, -1.19]),
]


def test_every_word_is_reached_and_its_thresholds_are_the_tables():
    patches = torch.tensor([patch for _, patch in CRAFTED])
    assert [row[0] for row in named(word_labels(patches, None, 4, 4))] == [word for word, _ in CRAFTED]
    assert {word for word, _ in CRAFTED} == set(WORDS)
    assert len(WORDS) == len(set(WORDS)) == 11


OPPOSITES = [("surge", "plunge"), ("rise", "drop"), ("drift", "slip"), ("rebound", "fade")]


@many
@given(seed=seeds, size=st.sampled_from([0.3, 1.0, 2.0]))
def test_a_mirrored_chart_has_the_opposite_words(seed, size):
    batch = make_batch(seed, steps=60)
    opposite = dict(OPPOSITES) | {right: left for left, right in OPPOSITES}
    words = named(word_labels(size * batch["returns"], batch["attention_mask"], LENGTH, STRIDE))
    mirrored = named(word_labels(-size * batch["returns"], batch["attention_mask"], LENGTH, STRIDE))
    assert mirrored == [[opposite.get(word, word) for word in row] for row in words]


@pytest.mark.parametrize("length", [1, 4, 5])
def test_a_patch_has_no_word_where_half_of_it_is_unknown(length):
    unknown = torch.arange(length + 1)
    returns = torch.ones(length + 1, length).masked_fill(torch.arange(length) < unknown.unsqueeze(-1), torch.nan)
    labels = word_labels(returns, None, length, length).squeeze(-1)
    assert ((labels == -100) == (unknown >= length / 2)).all()


# --- the encoder ---


@functools.cache
def shared_extractor() -> SpaceExploreT2T:
    return shared_model().model.t2t


def random_patches(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches, and which of them are visible: one at least."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(BATCH, count, generator=generator) < 0.5
    visible[:, seed % count] = True
    return torch.randn(BATCH, count, LENGTH, FEATURES, generator=generator), visible


@pytest.mark.parametrize("training", [False, True], ids=["fast path", "slow path"])
@few
@given(seed=seeds, count=st.integers(1, 9))
def test_the_encoder_looks_at_visible_patches_alone(training, seed, count):
    """As if there were no others; torch runs other code when nothing is trained."""
    extractor = make_model().model.t2t.train(training)
    patches, visible = random_patches(seed, count)
    with torch.set_grad_enabled(training):
        features = extractor.encode(patches, visible)
        embedded = add_positions(extractor.patch_proj(patches.flatten(2)))
        for row in range(BATCH):
            alone = extractor.encoder(embedded[row, visible[row]].unsqueeze(0)).squeeze(0)
            assert_close(features[row, visible[row]], alone, rtol=0, atol=1e-5)


@few
@given(seed=seeds, count=st.integers(2, 9))
def test_hidden_patches_change_no_feature_and_visible_ones_do(seed, count):
    patches, visible = random_patches(seed, count)
    features = shared_extractor().encode(patches, visible)
    garbage = 30 * torch.randn(patches.shape, generator=torch.Generator().manual_seed(seed + 1))
    hidden = torch.where(visible[..., None, None], patches, garbage)
    assert_close(shared_extractor().encode(hidden, visible)[visible], features[visible], rtol=0, atol=1e-5)
    everything = torch.ones_like(visible)
    newest = torch.cat((patches[:, :-1], garbage[:, -1:]), dim=1)
    before, after = (shared_extractor().encode(values, everything)[:, :-1] for values in (patches, newest))
    assert ((after - before).abs().amax(dim=-1) > 1e-4).all()


def test_positions_are_sinusoids_of_age():
    count, size = 5, 6
    positions = add_positions(torch.zeros(1, count, size))[0]
    for patch in range(count):
        angles = [(count - 1 - patch) / 10000 ** (2 * i / size) for i in range(size // 2)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert positions[patch].tolist() == pytest.approx(expected, abs=1e-6)


def test_words_are_products_with_their_embeddings():
    features = torch.randn(BATCH, 5, EXTRACTOR["t2t_hidden_size"])
    extractor = shared_extractor()
    expected = extractor.word_proj(features) @ extractor.word_embeddings.weight.T
    assert_close(extractor.name(features), expected)


# --- the decoder and the loss ---


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.6, 0.75, 0.9])
def test_as_many_existing_patches_are_visible_as_the_ratio_leaves(ratio, training):
    decoder, most = make_model(t2t_mask_ratio=ratio).decoder.train(training), 24
    counts = torch.arange(most + 1)
    existing = torch.arange(most) >= most - counts.unsqueeze(-1)
    visible = decoder.choose_visible(existing)
    assert not (visible & ~existing).any()
    for count, seen in zip(counts.tolist(), visible.sum(-1).tolist(), strict=True):
        exact = count * (1 - ratio)
        whole = {round(exact + nudge) for nudge in (-1e-6, 1e-6)}  # both where a half may round either way
        assert seen in {min(count, max(1, number)) for number in whole}


def test_visible_patches_are_random_in_training():
    decoder = make_model().decoder.train()
    torch.manual_seed(0)
    shares = torch.stack([decoder.choose_visible(torch.ones(1, 10).bool()) for _ in range(2000)]).float().mean(dim=0)
    assert_close(shares, torch.full((1, 10), 0.4), rtol=0, atol=0.05)
    rows = decoder.choose_visible(torch.ones(50, 10).bool())
    assert len(set(map(tuple, rows.tolist()))) > 40


def test_visible_patches_are_always_the_same_in_evaluation():
    decoder, existing = shared_model().decoder, torch.ones(BATCH, 16).bool()
    choices = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        choices += decoder.choose_visible(existing)
    assert all(torch.equal(choice, choices[0]) for choice in choices)


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75])
def test_visible_patches_are_spread_evenly_in_evaluation(ratio):
    decoder = make_model(t2t_mask_ratio=ratio).decoder
    for count in range(8, 65):
        seen = decoder.choose_visible(torch.ones(1, count).bool())[0].nonzero().flatten().tolist()
        gaps = [right - left for left, right in pairwise([-1, *seen, count])]
        assert max(gaps) <= 2 / (1 - ratio)


@few
@given(seed=seeds, steps=st.integers(1, STEPS), padding=st.integers(1, 20))
def test_left_padding_changes_no_evaluation(seed, steps, padding):
    batch = make_batch(seed, steps=steps)
    del batch["attention_mask"]
    plain = shared_model()(**batch)
    mask = (torch.arange(padding + steps) >= padding).long().expand(BATCH, -1)
    values = nn.functional.pad(batch["past_values"], (0, 0, padding, 0), value=torch.nan)
    returns = nn.functional.pad(batch["returns"], (padding, 0), value=9.0)
    padded = shared_model()(values, attention_mask=mask, returns=returns)
    assert torch.equal(padded.visible[:, -plain.visible.shape[1] :], plain.visible)
    assert_close(padded.loss, plain.loss, rtol=1e-5, atol=0)


def plain_hidden_steps(real: torch.Tensor, visible: torch.Tensor, stride: int) -> torch.Tensor:
    hidden = torch.zeros_like(real)
    for row, (steps, seen) in enumerate(zip(real.tolist(), visible.tolist(), strict=True)):
        shown = {patch * stride + step for patch in range(len(seen)) for step in range(len(steps[0])) if seen[patch]}
        for patch, inside in enumerate(steps):
            for step, exists in enumerate(inside):
                hidden[row, patch, step] = exists and patch * stride + step not in shown
    return hidden


@many
@given(seed=seeds, steps=st.integers(1, 40), sizes=patch_sizes())
def test_hidden_steps_are_those_that_no_visible_patch_shows(seed, steps, sizes):
    length, stride = sizes
    mask = make_batch(seed, steps=steps)["attention_mask"]
    real = cut_patches(mask.unsqueeze(-1), length, stride).squeeze(-1).bool()
    visible = torch.rand(real.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.4
    hidden = shared_model().decoder.hidden_steps(real, visible & real.any(-1), stride)
    assert torch.equal(hidden, plain_hidden_steps(real, visible, stride))


def plain_reconstruction_loss(batch: dict, outputs) -> float:
    values = batch["past_values"].nan_to_num().tolist()
    errors = []
    for row, mask in enumerate(batch["attention_mask"].tolist()):
        spans = [[(step, start + step) for step in range(LENGTH)] for start in plain_starts(STEPS)]
        real = [[(step, at) for step, at in span if at >= 0 and mask[at]] for span in spans]
        seen = outputs.visible[row].tolist()
        shown = {at for patch, span in enumerate(real) for _, at in span if seen[patch]}
        for patch, span in enumerate(real):
            decoded = outputs.reconstruction[row, patch].tolist()
            for step, at in span:
                if at not in shown:
                    squares = [(decoded[step][f] - values[row][at][f]) ** 2 for f in range(FEATURES)]
                    errors.append(sum(squares) / FEATURES)
    return sum(errors) / len(errors)


def plain_word_loss(batch: dict, outputs) -> float:
    losses = []
    for row, words in enumerate(plain_words(batch)):
        for patch, word in enumerate(words):
            if outputs.visible[row, patch] and word is not None:
                logits = outputs.word_logits[row, patch].tolist()
                largest = max(logits)
                total = largest + math.log(sum(math.exp(logit - largest) for logit in logits))
                losses.append(total - logits[WORDS.index(word)])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("training", [False, True])
def test_loss_is_its_definition(training):
    model, batch = make_model().train(training), make_batch()
    outputs = model(**batch)
    patches = len(plain_starts(STEPS))
    assert outputs.visible.shape == (BATCH, patches)
    assert outputs.word_logits.shape == (BATCH, patches, len(WORDS))
    assert outputs.reconstruction.shape == (BATCH, patches, LENGTH, FEATURES)
    reconstruction, words = plain_reconstruction_loss(batch, outputs), plain_word_loss(batch, outputs)
    assert outputs.loss.item() == pytest.approx(reconstruction + words, rel=1e-5)
    without = model(batch["past_values"], batch["attention_mask"])
    assert without.loss.item() == pytest.approx(plain_reconstruction_loss(batch, without), rel=1e-5)


@pytest.mark.parametrize("returns", [None, math.nan])
def test_nothing_to_learn_is_no_loss(returns):
    """A single patch is visible; it has no word where no return is known."""
    model = make_model().train()
    batch = {"past_values": torch.randn(2, 3, FEATURES)}
    loss = model(**batch, returns=None if returns is None else torch.full((2, 3), returns)).loss
    assert loss.item() == 0
    loss.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def hidden_in_series(visible: torch.Tensor) -> torch.Tensor:
    """Steps (B, T) that no visible patch of `STEPS` steps shows."""
    shown = torch.zeros(len(visible), STEPS)
    for patch, start in enumerate(plain_starts(STEPS)):
        shown[:, max(start, 0) : start + LENGTH] += visible[:, patch, None]
    return shown == 0


@few
@given(seed=seeds)
def test_what_is_hidden_reaches_the_loss_alone(seed):
    batch = make_batch(seed)
    before = shared_model()(**batch)
    hidden = hidden_in_series(before.visible).unsqueeze(-1)
    other = make_batch(seed + 1)["past_values"]
    after = shared_model()(**{**batch, "past_values": torch.where(hidden, 3 * other, batch["past_values"])})
    assert_close(after.reconstruction, before.reconstruction, rtol=0, atol=1e-5)
    assert_close(after.word_logits[after.visible], before.word_logits[before.visible], rtol=0, atol=1e-5)
    assert abs(after.loss - before.loss) > 1e-3
    padded = batch["attention_mask"].eq(0).unsqueeze(-1)
    assert padded.any()
    after = shared_model()(**{**batch, "past_values": torch.where(padded, other, batch["past_values"])})
    assert torch.equal(after.loss, before.loss)


def test_the_loss_reads_the_reconstruction_of_hidden_steps_alone():
    """What a visible patch shows of a hidden one by overlapping it is given away."""
    model, batch = make_model(), make_batch()
    outputs = model(batch["past_values"], batch["attention_mask"])
    (gradient,) = torch.autograd.grad(outputs.loss, outputs.reconstruction)
    real = cut_patches(batch["attention_mask"].unsqueeze(-1), LENGTH, STRIDE).squeeze(-1).bool()
    assert torch.equal(gradient.any(dim=-1), plain_hidden_steps(real, outputs.visible, STRIDE))


def test_the_decoder_looks_at_existing_patches_alone():
    """Also at hidden ones, which are nothing but their positions; not at those before the series."""
    decoder, generator = shared_model().decoder, torch.Generator().manual_seed(0)
    existing = torch.arange(6) >= 2
    features = torch.randn(1, 6, EXTRACTOR["t2t_hidden_size"], generator=generator)
    visible = torch.tensor([[False, False, True, False, True, False]])
    tokens = features.clone()
    tokens[~visible] = decoder.mask_token
    expected = decoder.out_proj(decoder.layers(add_positions(tokens[:, 2:]))).view(1, 4, LENGTH, FEATURES)
    assert_close(decoder(features, visible, existing.unsqueeze(0))[:, 2:], expected, rtol=0, atol=1e-5)


# --- training ---

KINDS = {"surge": (0.8, 0.0), "plunge": (-0.8, 0.0), "flat": (0.0, 0.0), "fluctuate": (0.0, 1.6)}
KIND_STEPS = 41


def make_obvious(seed: int, batch: int) -> dict[str, torch.Tensor]:
    """Trends up and down, standing still and zigzag, in turn; the last feature is the same wave in all."""
    steps, kinds = torch.arange(KIND_STEPS), torch.tensor(list(KINDS.values()))
    trend, zigzag = kinds[torch.arange(batch) % len(kinds)].unsqueeze(1).unbind(-1)
    noise = 0.15 * torch.randn(batch, KIND_STEPS, generator=torch.Generator().manual_seed(seed))
    returns = trend + zigzag * (1 - 2 * (steps % 2)) + noise
    wave = (steps / 5).sin().expand(batch, -1)
    return {"past_values": torch.stack((returns, returns.cumsum(1) / 10, wave), dim=-1), "returns": returns}


def train(model: SpaceExploreForTimeToText, steps: int):
    """As a trainer does: every parameter that wants a gradient."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-3)
    model.train()
    for step in range(steps):
        model(**make_obvious(step, batch=32)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[SpaceExploreForTimeToText, Path]:
    torch.manual_seed(0)
    model = SpaceExploreForTimeToText(make_config(initializer_range=0.02))
    train(model, steps=150)
    folder = tmp_path_factory.mktemp("t2t")
    model.save_pretrained(folder)
    return model, folder


def test_it_learns_to_name_patches(trained):
    model, _ = trained
    batch = make_obvious(seed=10**6, batch=64)
    labels = word_labels(batch["returns"], None, LENGTH, STRIDE)
    known = labels != -100
    expected = torch.tensor([[WORDS.index(patch["word"]) for patch in row] for row in describe(model, batch)])
    accuracy = (expected == labels)[known].float().mean()
    majority = labels[known].bincount().max() / known.sum()
    assert majority < 0.4
    assert accuracy > 0.85


def describe(model: SpaceExplorePreTrainedModel, batch: dict) -> list[list[dict]]:
    return model.describe(batch["past_values"], batch.get("attention_mask"))


def test_it_describes_with_the_obvious_words(trained):
    model, _ = trained
    for kind, patches in zip(KINDS, describe(model, make_obvious(seed=10**6, batch=len(KINDS))), strict=True):
        words = [patch["word"] for patch in patches[1:]]  # the first is cut short by the start of the series
        assert words.count(kind) >= 0.8 * len(words), kind
        assert all(1 / len(WORDS) < patch["probability"] <= 1 for patch in patches)


def test_it_learns_to_reconstruct_what_is_hidden(trained):
    """Better than zero, and than the mean of each feature."""
    model, _ = trained
    batch = make_obvious(seed=10**6, batch=64)
    with torch.no_grad():
        outputs = model(batch["past_values"])
    patches = cut_patches(batch["past_values"], LENGTH, STRIDE)
    real = cut_patches(torch.ones(64, KIND_STEPS, 1), LENGTH, STRIDE).squeeze(-1).bool()
    hidden = plain_hidden_steps(real, outputs.visible, STRIDE)
    error = (outputs.reconstruction - patches)[hidden].square().mean()
    assert error < 0.25 * patches[hidden].square().mean()
    assert error < 0.25 * patches[hidden].var(dim=0).mean()


class Windows(Dataset):
    """Rows as a trainer collates them, with the labels of the forecasts that come along."""

    def __init__(self, count: int):
        self.batch = make_obvious(0, count) | {"labels": torch.zeros(count, KIND_STEPS, len(HORIZONS))}

    def __len__(self) -> int:
        return len(self.batch["returns"])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: tensor[row] for name, tensor in self.batch.items()}


def test_trainer_averages_micro_batches_and_evaluates(tmp_path):
    """Its losses would add up if it took the model for one that divides by `num_items_in_batch`."""
    model = make_model()
    schedule = {"max_steps": 1, "learning_rate": 0.0, "gradient_accumulation_steps": 4, "label_names": ["returns"]}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    args = TrainingArguments(tmp_path, per_device_train_batch_size=8, remove_unused_columns=False, **schedule, **quiet)
    trainer = Trainer(model, args, train_dataset=Windows(32), eval_dataset=Windows(32))
    evaluated = trainer.evaluate()["eval_loss"]
    assert trainer.train().training_loss == pytest.approx(evaluated, rel=0.25)  # other patches are hidden


# --- which parameters are trained ---


def make_labelled(head: type, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch for the training of any head; every feature is missing somewhere."""
    batch = make_batch(seed)
    if head is SpaceExploreForTimeToText:
        return batch
    generator, mask = torch.Generator().manual_seed(seed), batch.pop("attention_mask")
    del batch["returns"]
    assert batch["past_values"].isnan().any(dim=(0, 1)).all()
    if head is SpaceExploreForCausalLM:
        days = torch.randint(5, 11, (BATCH, 6), generator=generator)
        input_ids = torch.cat((torch.where(mask.bool(), 4, 0), days), dim=1)
        attention_mask = torch.cat((mask, torch.ones_like(days)), dim=1)
        labels = torch.cat((torch.full_like(mask, -100), days), dim=1)
        tokens = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return batch | tokens | {"past_values_mask": mask}
    scale = 0.01 + 0.02 * torch.rand(BATCH, STEPS, generator=generator)
    labels = 0.02 * torch.randn(BATCH, STEPS, len(HORIZONS), generator=generator)
    labels = labels.masked_fill(mask.unsqueeze(-1) == 0, -100.0)
    return batch | {"attention_mask": mask, "scale": scale, "labels": labels}


def trained_by(head: type, name: str) -> bool:
    extractor = name.startswith("model.t2t.")
    return extractor or name.startswith("decoder.") if head is SpaceExploreForTimeToText else not extractor


@pytest.mark.parametrize("weight", [0.0, 0.7], ids=["alone", "taught"])
@pytest.mark.parametrize("loaded", [False, True], ids=["new", "loaded"])
@pytest.mark.parametrize("head", [SpaceExploreForTimeToText, *FORECASTERS])
def test_every_head_trains_its_own_parameters(head, loaded, weight, tmp_path):
    """Also after loading, where the library makes new parameters. There are no exceptions: a parameter that wants a
    gradient and gets none stops distributed training, and one that wants none is not in anyone's optimizer."""
    model = make_model(head, t2t_loss_weight=weight)
    if loaded:
        model.save_pretrained(tmp_path)
        model, _ = head.from_pretrained(tmp_path, output_loading_info=True)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == {
        name: trained_by(head, name) for name, _ in model.named_parameters()
    }
    model.train()(**make_labelled(head)).loss.backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, _ in model.named_parameters() if trained_by(head, name)}
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


def test_a_head_trains_its_own_parameters_whichever_head_saved_them(trained):
    _, folder = trained
    for head in (SpaceExploreForRegression, SpaceExploreForTimeToText):
        model = head.from_pretrained(folder)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == {name for name, _ in model.named_parameters() if trained_by(head, name)}


# --- from the extractor's checkpoint to a forecaster ---

NEW_KEYS = {
    SpaceExploreForRegression: {"mean_head", "quantile_head", "model.feature_proj"},
    SpaceExploreForClassification: {"score", "model.feature_proj"},
    SpaceExploreForCausalLM: {"lm_head", "model.embed_tokens", "model.feature_proj"},
}


def modules(keys: set[str]) -> set[str]:
    return {key.rpartition(".")[0] for key in keys}


@EVERY_FORECASTER
def test_a_forecaster_takes_the_extractor_from_its_checkpoint(head, trained):
    extractor, folder = trained
    sizes = {"vocab_size": 11} if head is SpaceExploreForCausalLM else {}
    model, info = head.from_pretrained(folder, t2t_loss_weight=0.01, output_loading_info=True, **sizes)
    assert modules(info["missing_keys"]) == NEW_KEYS[head]
    assert info["unexpected_keys"] == {key for key in extractor.state_dict() if key.startswith("decoder.")}
    assert not info["mismatched_keys"]
    weights = model.state_dict()
    for name, tensor in extractor.model.state_dict().items():
        assert torch.equal(weights[f"model.{name}"], tensor), name
    assert model.model.t2t.num_batches_tracked == 150
    batch = make_obvious(seed=1, batch=4)
    said, expected = describe(model, batch), describe(extractor, batch)
    assert [[patch["word"] for patch in row] for row in said] == [[p["word"] for p in row] for row in expected]
    labelled = make_labelled(head)
    feature_loss = backbone_outputs(model.train(), labelled).feature_loss
    assert_close(taught_loss(model, labelled), 0.01 * feature_loss, rtol=1e-2, atol=1e-6)


def test_an_extractor_that_is_not_in_the_checkpoint_is_new(tmp_path):
    make_model(SpaceExploreForRegression, t2t_num_hidden_layers=0).save_pretrained(tmp_path)
    loaded = SpaceExploreForTimeToText.from_pretrained(tmp_path, t2t_num_hidden_layers=2)
    fresh = dict(SpaceExploreForTimeToText(make_config()).named_parameters())
    for name, parameter in loaded.named_parameters():
        if trained_by(SpaceExploreForTimeToText, name):
            assert parameter.mean().item() == pytest.approx(fresh[name].mean().item(), abs=0.1), name
            assert parameter.std().item() == pytest.approx(fresh[name].std().item(), rel=0.5), name
    assert loaded.model.t2t.num_batches_tracked == 0


# --- the feature loss ---


def plain_feature_loss(model: SpaceExplorePreTrainedModel, batch: dict) -> torch.Tensor:
    """One row and one patch at a time, without padding."""
    backbone = model.model
    mask = batch.get("past_values_mask", batch["attention_mask"]).bool()
    features = backbone.mscnn(backbone.value_embedding(batch["past_values"], mask), mask)
    distances = []
    for row in range(BATCH):
        values = batch["past_values"][row, mask[row]].unsqueeze(0)
        patches, _ = backbone.t2t.cut(values, None)
        target = backbone.t2t.encode(patches, torch.ones(patches.shape[:2]).bool())[0]
        for patch, start in enumerate(plain_starts(values.shape[1])):
            pooled = features[row, mask[row]][max(start, 0) : start + LENGTH].mean(dim=0)
            distances.append((backbone.feature_proj(pooled) - target[patch]).square().mean())
    return torch.stack(distances).mean()


def backbone_outputs(model: SpaceExplorePreTrainedModel, batch: dict):
    names = ("past_values", "attention_mask", "input_ids", "past_values_mask")
    return model.model(**{name: batch[name] for name in names if name in batch})


@EVERY_FORECASTER
def test_feature_loss_is_its_definition(head):
    model, batch = make_model(head, t2t_loss_weight=0.7).train(), make_labelled(head)
    assert_close(backbone_outputs(model, batch).feature_loss, plain_feature_loss(model, batch))
    assert backbone_outputs(model.eval(), batch).feature_loss is None
    assert backbone_outputs(make_model(head).train(), batch).feature_loss is None


def taught_loss(model: SpaceExplorePreTrainedModel, batch: dict, **kwargs) -> torch.Tensor:
    """How much larger a loss is by the feature loss."""
    weight = model.config.t2t_loss_weight
    taught = model(**batch, **kwargs).loss
    model.config.t2t_loss_weight = 0.0
    alone = model(**batch, **kwargs).loss
    model.config.t2t_loss_weight = weight
    return taught - alone


def count_labels(batch: dict) -> int:
    return int((batch["labels"] != -100).sum())


@EVERY_FORECASTER
def test_training_loss_has_the_weighted_feature_loss(head):
    model, batch = make_model(head, t2t_loss_weight=0.7).train(), make_labelled(head)
    feature_loss = backbone_outputs(model, batch).feature_loss
    assert feature_loss > 0.1
    assert_close(taught_loss(model, batch), 0.7 * feature_loss, rtol=1e-4, atol=1e-5)
    micro = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 1), slice(1, BATCH))]
    weights = [count_labels(part) / count_labels(batch) for part in micro]
    expected = sum(w * backbone_outputs(model, part).feature_loss for w, part in zip(weights, micro, strict=True))
    added = sum(taught_loss(model, part, num_items_in_batch=count_labels(batch)) for part in micro)
    assert_close(added, 0.7 * expected, rtol=1e-4, atol=1e-5)
    assert taught_loss(model.eval(), batch) == 0


def test_feature_loss_teaches_what_stands_before_the_decoder():
    model, batch = (
        make_model(SpaceExploreForRegression, t2t_loss_weight=0.7).train(),
        make_labelled(SpaceExploreForRegression),
    )
    model.requires_grad_(True)  # not even then is the teacher taught
    backbone_outputs(model, batch).feature_loss.backward()
    taught = {name for name, parameter in model.model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name in taught} == {"value_embedding", "mscnn", "feature_proj"}
    assert all(parameter.grad.any() for name, parameter in model.model.named_parameters() if name in taught)


@pytest.mark.parametrize("training", [False, True])
@EVERY_FORECASTER
def test_nothing_the_extractor_sees_reaches_a_forecast(head, training):
    model, batch = make_model(head, t2t_loss_weight=0.7).train(training), make_labelled(head)
    before = model(**batch)
    for parameter in model.model.t2t.parameters():
        nn.init.normal_(parameter, std=3.0)
    after = model(**batch)
    forecasts = ("mean", "quantiles") if head is SpaceExploreForRegression else ("logits",)
    for name in forecasts if training else ("loss", *forecasts):
        assert torch.equal(after[name], before[name])
    assert not training or not torch.equal(after.loss, before.loss)


# --- descriptions ---


def test_describe_needs_a_trained_extractor(trained, tmp_path):
    values = torch.zeros(1, STEPS, FEATURES)
    for head in (SpaceExploreForTimeToText, SpaceExploreForRegression):
        with pytest.raises(ValueError, match="extractor of this checkpoint was never trained"):
            make_model(head).describe(values)
    with pytest.raises(ValueError, match="no time-to-text extractor, got t2t_num_hidden_layers=0"):
        make_model(SpaceExploreForRegression, t2t_num_hidden_layers=0).describe(values)
    with pytest.raises(ValueError, match="no time-to-text extractor to train, got t2t_num_hidden_layers=0"):
        make_model(t2t_num_hidden_layers=0)
    model, _ = trained
    untrained = make_model(initializer_range=0.02)
    untrained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="never trained"):
        SpaceExploreForTimeToText.from_pretrained(tmp_path).describe(values)
    model(values)  # an evaluation is no training
    assert model.model.t2t.num_batches_tracked == 150


def test_describe_checks_what_it_is_given():
    with pytest.raises(ValueError, match=r"past_values must be .*got \(1, 30, 4\)"):
        shared_model().describe(torch.zeros(1, STEPS, FEATURES + 1))
    with pytest.raises(ValueError, match=r"mask must be .*\(1, 30\), got \(1, 29\)"):
        shared_model().describe(torch.zeros(1, STEPS, FEATURES), torch.ones(1, STEPS - 1))


def test_descriptions_are_the_likeliest_words_of_all_patches():
    batch = make_batch()
    patches, real = shared_extractor().cut(batch["past_values"], batch["attention_mask"])
    likelihoods = shared_extractor().name(shared_extractor().encode(patches, real.any(dim=-1))).softmax(dim=-1)
    for row, described in enumerate(describe(shared_model(), batch)):
        existing = likelihoods[row, real[row].any(dim=-1)].tolist()
        assert [patch["word"] for patch in described] == [WORDS[likely.index(max(likely))] for likely in existing]
        assert [patch["probability"] for patch in described] == pytest.approx([max(likely) for likely in existing])


@few
@given(seed=seeds, steps=st.integers(1, 40))
def test_spans_count_real_steps(seed, steps):
    batch = make_batch(seed, steps=steps)
    for mask, described in zip(batch["attention_mask"].tolist(), describe(shared_model(), batch), strict=True):
        first = mask.index(1)
        # As if the padding were not there: no patch that the next one covers as far as it is real.
        starts = [start for start in plain_starts(steps) if start + STRIDE > first or start == steps - LENGTH]
        spans = [(max(start, first), start + LENGTH - 1) for start in starts]
        assert [(patch["start"], patch["end"]) for patch in described] == spans


@few
@given(
    seed=seeds,
    steps=st.integers(1, STEPS),
    padding=st.integers(1, 20),
    garbage=st.sampled_from([math.nan, 0.0, 1e6]),
)
def test_left_padding_changes_no_description(seed, steps, padding, garbage):
    values = make_batch(seed)["past_values"][:, :steps]
    padded = nn.functional.pad(values, (0, 0, padding, 0), value=garbage)
    mask = (torch.arange(padding + steps) >= padding).long().expand(BATCH, -1)
    plain = shared_model().describe(values)
    for row, expected in zip(shared_model().describe(padded, mask), plain, strict=True):
        assert [patch["word"] for patch in row] == [patch["word"] for patch in expected]
        assert [patch["probability"] for patch in row] == pytest.approx([p["probability"] for p in expected], abs=1e-5)
        for end in ("start", "end"):
            assert [patch[end] for patch in row] == [patch[end] + padding for patch in expected]


def test_descriptions_do_not_depend_on_the_mode():
    model, batch = make_model(), make_batch()
    model.model.t2t.num_batches_tracked.fill_(1)
    evaluated, training = describe(model, batch), describe(model.train(), batch)
    probabilities = [[[patch["probability"] for patch in row] for row in rows] for rows in (evaluated, training)]
    for row, expected in zip(*probabilities, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


def days(year: int, steps: int) -> pd.DatetimeIndex:
    return pd.bdate_range(f"{year}-01-01", periods=steps)


def texts(year: int, steps: int = STEPS) -> list[str]:
    return [str(day.date()) for day in days(year, steps)]


# Dates of two series, and what names their steps.
DATES = {
    "texts of each": lambda n: ([texts(2020, n), texts(2021, n)], [texts(2020, n), texts(2021, n)]),
    "texts of all": lambda n: (texts(2020, n), [texts(2020, n)] * 2),
    "index of each": lambda n: ([days(2020, n), days(2021, n)], [days(2020, n), days(2021, n)]),
    "index of all": lambda n: (days(2020, n), [days(2020, n)] * 2),
    "column of a table": lambda n: (pd.Series(days(2020, n), index=range(7, 7 + n)), [days(2020, n)] * 2),
    "array of each": lambda n: (np.stack([days(2020, n), days(2021, n)]), [days(2020, n), days(2021, n)]),
    "array of all": lambda n: (days(2020, n).to_numpy(), [days(2020, n)] * 2),
}


@pytest.mark.parametrize("steps", [2, STEPS], ids=["as many as series", "more than series"])
@pytest.mark.parametrize("kind", DATES)
def test_descriptions_carry_dates(kind, steps):
    dates, expected = DATES[kind](steps)
    values, mask = torch.randn(2, steps, FEATURES), torch.ones(2, steps)
    mask[0, : steps // 2] = 0
    described, positions = (shared_model().describe(values, mask, given) for given in (dates, None))
    for row, names in enumerate(expected):
        for patch, place in zip(described[row], positions[row], strict=True):
            assert patch == place | {"start": names[place["start"]], "end": names[place["end"]]}


@pytest.mark.parametrize(
    ("dates", "message"),
    [
        (texts(2020)[1:], r"dates must name the 30 steps.*got.*29"),
        ([texts(2020), texts(2020)[2:]], r"dates must name the 30 steps.*got.*\[30, 28\]"),
        ([texts(2020)] * STEPS, r"dates must name the 30 steps"),
        ([], r"dates must name the 30 steps"),
        ("2020-01-01", r"dates must name the 30 steps"),
        ("2020-01-01T00:00:00.000000+0000"[:STEPS], r"dates must name the 30 steps"),
    ],
    ids=["one short", "one series short", "too many series", "none", "text", "text of the length of the series"],
)
def test_refuses_dates_that_do_not_fit(dates, message):
    with pytest.raises(ValueError, match=message):
        shared_model().describe(torch.zeros(2, STEPS, FEATURES), dates=dates)


# --- words of a text model ---


@pytest.fixture(scope="module")
def text_models(tmp_path_factory) -> dict[int, Path]:
    """Tiny text models by width. A token is a letter, and a text is between special tokens."""
    letters = {token: index for index, token in enumerate(["[CLS]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.BPE(letters, merges=[], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [CLS]", special_tokens=[("[CLS]", 0)])
    folders = {}
    for width in (8, 24):
        torch.manual_seed(width)
        folders[width] = tmp_path_factory.mktemp("text")
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
        BertModel(BertConfig(vocab_size=len(letters), hidden_size=width, **sizes)).save_pretrained(folders[width])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folders[width])
    return folders


def text_embeddings(folder: Path) -> np.ndarray:
    """(W, width): the mean over the letters of each word."""
    table = BertModel.from_pretrained(folder).embeddings.word_embeddings.weight.detach().numpy()
    return np.stack([np.mean([table[ord(letter) - ord("a") + 2] for letter in word], axis=0) for word in WORDS])


def loaded_embeddings(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Word embeddings before and after they are taken from a text model."""
    extractor = make_model(t2t_hidden_size=size, t2t_num_attention_heads=1).model.t2t
    before = extractor.word_embeddings.weight.detach().numpy().copy()
    extractor.load_word_embeddings(str(folder))
    assert extractor.word_embeddings.weight.requires_grad
    return before, extractor.word_embeddings.weight.detach().numpy()


@pytest.mark.parametrize("size", [10, 20])
@pytest.mark.parametrize("width", [8, 24])
def test_word_embeddings_keep_the_distances_of_a_text_model(width, size, text_models):
    before, after = loaded_embeddings(text_models[width], size)
    ratios = pdist(after) / pdist(text_embeddings(text_models[width]))
    assert ratios == pytest.approx(np.full(len(ratios), ratios[0]), rel=1e-4)
    assert after.std() == pytest.approx(before.std(), rel=1e-2)
    assert after.mean(axis=0) == pytest.approx(np.zeros(size), abs=1e-6)


def test_few_dimensions_keep_the_leading_axes_of_a_text_model(text_models):
    _, after = loaded_embeddings(text_models[24], size=6)
    expected = PCA(6).fit_transform(text_embeddings(text_models[24]))
    factor = after.std() / expected.std()
    assert np.abs(after) == pytest.approx(factor * np.abs(expected), rel=1e-3, abs=1e-5)
    assert pdist(after) == pytest.approx(factor * pdist(expected), rel=1e-3)


def test_refuses_a_text_model_that_does_not_tell_the_words_apart(text_models, tmp_path):
    BertModel.from_pretrained(text_models[8]).save_pretrained(tmp_path)
    illiterate = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=illiterate).save_pretrained(tmp_path)
    extractor = make_model().model.t2t
    with pytest.raises(ValueError, match=r"must tell the words surge, rise, .* apart, got .*" + tmp_path.name):
        extractor.load_word_embeddings(str(tmp_path))
    assert extractor.word_embeddings.weight.isfinite().all()


# --- what the library expects ---


def test_loads_as_a_model_for_pre_training(trained):
    model, folder = trained
    assert type(AutoModelForPreTraining.from_config(make_config())) is SpaceExploreForTimeToText
    loaded, info = AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert type(loaded).__name__ == "SpaceExploreForTimeToText"  # the class of whichever copy registered last
    assert {problem: found for problem, found in info.items() if found} == {}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    batch = make_obvious(seed=2, batch=4)
    assert_close(loaded(**batch).loss, model(**batch).loss)


def seeded_gradients(model: SpaceExploreForTimeToText) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    loss = model.train()(**make_batch()).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_refuses_gradient_checkpointing():
    """Of layers that do not run; silently nothing would happen."""
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        make_model().activation_checkpointing_enable()


def seeded_loss(model: SpaceExploreForTimeToText) -> torch.Tensor:
    torch.manual_seed(0)
    return model(**make_batch()).loss


@pytest.mark.parametrize("training", [False, True])
def test_half_precision(training):
    """In all weights, and in products alone, as trainers have it."""
    expected = seeded_loss(make_model().train(training)).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = seeded_loss(make_model().train(training))
    half = seeded_loss(make_model().bfloat16().train(training))
    assert mixed.dtype == half.dtype == torch.float32
    assert [mixed.item(), half.item()] == pytest.approx([expected, expected], rel=0.05)
    _, gradients = seeded_gradients(make_model().bfloat16())
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


def test_half_precision_describes_and_teaches():
    model = make_model(SpaceExploreForRegression, t2t_loss_weight=0.7)
    model.model.t2t.num_batches_tracked.fill_(1)
    batch = make_labelled(SpaceExploreForRegression)
    expected, feature_loss = describe(model, batch), backbone_outputs(model.train(), batch).feature_loss
    half = model.bfloat16()
    assert half.model.t2t.num_batches_tracked == 1
    for row, exact in zip(describe(half, batch), expected, strict=True):
        assert [patch["probability"] for patch in row] == pytest.approx([p["probability"] for p in exact], abs=0.05)
    assert backbone_outputs(half, batch).feature_loss.item() == pytest.approx(feature_loss.item(), rel=0.05)
