# Copyright 2026 The SpaceExploreAI contributors. Licensed under the MIT License.
"""Paths of returns: drawn from a causal language model or from forecast quantiles, and the forecast that paths make.

Every path is made of standard normal shocks, one a day, that depend on the seed, the ticker and the forecast origin
alone: neither other tickers nor the size of a batch change it, and no other random number of the process is used up.
"""

# Shapes: N histories, K samples of each, H days or horizons, Q quantile levels, T steps, F features, V tokens

from statistics import NormalDist

import numpy as np
import torch
from transformers import LogitsProcessor


def draw_shocks(seed: int, ticker: str, cutoff: np.datetime64, num_samples: int, length: int) -> np.ndarray:
    """(K, H) float32 standard normal numbers of one forecast; those of fewer days are the first of more."""
    day = np.datetime64(cutoff, "D").astype(int)
    generator = np.random.default_rng([seed, *ticker.encode(), day - np.iinfo(np.int32).min])  # a day before 1970 too
    return generator.standard_normal((length, num_samples), dtype=np.float32).T


# --- from a causal language model ------------------------------------------------------------------------------------


class InverseTransformProcessor(LogitsProcessor):
    """Leaves each row the one token at which its distribution function passes the row's uniform number of the day.

    The tokens of returns are in the order of these: near numbers give near returns, whatever the model.

    Args:
        uniforms: (B, H) within [0, 1].
        start: tokens of the prompt.
        temperature: that logits are divided by.
    """

    def __init__(self, uniforms: torch.Tensor, start: int, temperature: float):
        self.uniforms, self.start, self.temperature = uniforms, start, temperature

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        distribution = (scores / self.temperature).softmax(dim=-1).cumsum(dim=-1)  # (B, V)
        point = self.uniforms[:, input_ids.shape[1] - self.start, None] * distribution[:, -1:]
        token = torch.searchsorted(distribution, point, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def make_prompt(tokenizer, context: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A `<ts>` for each unpadded step and `<bos>`, padded on the left, and the steps themselves.

    Args:
        context: `past_values` (N, T, F) and `attention_mask` (N, T).
    """
    mask = context["attention_mask"]
    lengths = mask.sum(dim=1)
    longest = int(lengths.max())
    real = torch.arange(longest, device=mask.device) >= longest - lengths[:, None]
    ids = torch.where(real, tokenizer.ts_token_id, tokenizer.pad_token_id)
    bos = torch.full_like(ids[:, :1], tokenizer.bos_token_id)
    return {
        "input_ids": torch.cat([ids, bos], dim=1),
        "attention_mask": torch.cat([real, torch.ones_like(bos, dtype=torch.bool)], dim=1).long(),
        "past_values": context["past_values"],
        "past_values_mask": mask,
    }


@torch.no_grad()
def sample_paths(
    model, tokenizer, context: dict[str, torch.Tensor], shocks: torch.Tensor, temperature: float = 1.0
) -> np.ndarray:
    """(N, K, H) daily log-returns that a causal language model lets follow.

    Args:
        model: `SpaceExploreForCausalLM`, its tokenizer beside it.
        context: `past_values` (N, T, F), `attention_mask` (N, T), `scale` (N, T), as the feature extractor gives them.
        shocks: (N, K, H) standard normal.
        temperature: that logits are divided by.
    """
    _, num_samples, length = shocks.shape
    prompt = make_prompt(tokenizer, context)
    # The samples of a history share what it is read to; `generate` alone would read it for each of them.
    read = model(
        **prompt | {name: prompt[name][:, :-1] for name in ("input_ids", "attention_mask")},
        use_cache=True,
        logits_to_keep=1,
    ).cache
    read.batch_repeat_interleave(num_samples)
    uniforms = torch.special.ndtr(shocks.flatten(0, 1))
    tokens = model.generate(
        **{name: tensor.repeat_interleave(num_samples, dim=0) for name, tensor in prompt.items()},
        cache=read,
        use_cache=True,  # whatever a generation config says, which a folder's relative path may lose
        min_new_tokens=length,
        max_new_tokens=length,
        do_sample=False,  # the processor has drawn
        logits_processor=[InverseTransformProcessor(uniforms, prompt["input_ids"].shape[1], temperature)],
        suppress_tokens=tokenizer.suppress_tokens,
    )
    scale = context["scale"][:, -1].cpu().double().numpy().repeat(num_samples)
    return tokenizer.decode_returns(tokens[:, -length:].cpu().numpy(), scale).reshape(shocks.shape)


def forecast_of_samples(
    samples: np.ndarray, horizons: list[int], levels: list[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Means and quantiles of the cumulative returns of (N, K, H) paths: (N, len(horizons)), (…, len(levels)).

    The k-th of K samples in order stands for k / (K + 1) (Weibull, 1939): if they are of y's law, it is above y with
    just this probability. Levels beyond the outermost samples get those.
    """
    reached = samples.cumsum(axis=2)[..., np.array(horizons) - 1]
    quantiles = np.quantile(reached, levels, axis=1, method="weibull")
    return reached.mean(axis=1), np.moveaxis(quantiles, 0, -1)


# --- from forecast quantiles -----------------------------------------------------------------------------------------


def interpolate_horizons(
    mean: np.ndarray, quantiles: np.ndarray, horizons: list[int], days: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Forecasts of the days between the horizons that a model has: (N, len(days)) means, (…, Q) quantiles.

    A mean grows evenly from each horizon to the next, and from nothing to the first. Quantiles are linear in units of
    sqrt(day), by which a random walk spreads; before the first horizon they are its own in these units. Being weighted
    means, they do not cross where those of the horizons do not.

    Args:
        mean: (N, H) cumulative log-returns.
        quantiles: (N, H, Q).
        horizons: (H,) increasing.
        days: within 1 and the last horizon.
    """
    from_nothing = np.array([np.interp(days, [0, *horizons], one) for one in np.eye(len(horizons) + 1)[1:]])
    weights = np.array([np.interp(days, horizons, one) for one in np.eye(len(horizons))])  # (H, days)
    weights = weights * np.sqrt(days) / np.sqrt(horizons)[:, None]
    return mean @ from_nothing, np.einsum("nhq,hd->ndq", quantiles, weights)


def interpolate_levels(quantiles: np.ndarray, levels: list[float], wanted: list[float]) -> np.ndarray:
    """(…, len(wanted)) quantiles between those of (…, Q): the distribution function is linear from one to the next."""
    weights = np.array([np.interp(wanted, levels, one) for one in np.eye(len(levels))])
    return quantiles @ weights


def brownian_paths(quantiles: np.ndarray, levels: list[float], shocks: np.ndarray) -> np.ndarray:
    """(N, K, H) cumulative log-returns, of each day with the distribution of its quantiles.

    A model of quantiles says nothing of how days depend on each other. As in a random walk, here: the ranks of a path
    are those of a Brownian motion (a Gaussian copula).

    Args:
        quantiles: (N, H, Q) of every day.
        levels: (Q,).
        shocks: (N, K, H) standard normal.
    """
    days = np.arange(1, shocks.shape[2] + 1)
    scores = shocks.astype(np.float64).cumsum(axis=2) / np.sqrt(days)
    paths = np.empty_like(scores)
    for row, day in np.ndindex(len(scores), len(days)):
        paths[row, :, day] = value_at_scores(quantiles[row, day], levels, scores[row, :, day])
    return paths


def value_at_scores(quantiles: np.ndarray, levels: list[float], scores: np.ndarray) -> np.ndarray:
    """(K,) values of (Q,) quantiles at standard normal scores: the quantile of each score's probability.

    Between the levels as `interpolate_levels`. Beyond them, where the model says nothing, the tails are those of a
    normal distribution through the two outermost quantiles.
    """
    bounds = np.array([NormalDist().inv_cdf(level) for level in levels])
    values = np.interp(torch.special.ndtr(torch.from_numpy(scores)).numpy(), levels, quantiles)
    slopes = np.diff(quantiles) / np.diff(bounds) if len(levels) > 1 else np.zeros(1)
    beyond = np.minimum(scores - bounds[0], 0) * slopes[0] + np.maximum(scores - bounds[-1], 0) * slopes[-1]
    return values + beyond
