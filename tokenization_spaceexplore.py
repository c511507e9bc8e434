# Copyright 2026 The SpaceExploreAI contributors. Licensed under the MIT License.
"""The vocabulary of the causal language model: daily log-returns as bins, in units of the volatility of their origin.

A sequence is `<ts>` once per time step (its embedding is replaced by the numeric context), `<bos>`, one token per
coming trading day, `<eos>`. The token of a day is the bin of its log-return divided by the volatility `scale` that was
known at the forecast origin, the same for all days of the sequence.

The bins of a new tokenizer are uniform in asinh(x / 0.5) between -12 and +12 volatilities: near zero, where most days
lie and the direction is decided, linear and fine (0.015 with 256 bins); far out logarithmic, a constant share of the
return, so that crashes and earnings days have a place without a thousand tokens. Unlike quantiles they need no data,
and models of different markets share one vocabulary.
"""

import re

import numpy as np
import torch
from transformers import PreTrainedTokenizer

NUM_BINS = 256
# In volatilities: where the bins turn from linear to logarithmic, and the outermost edge.
LINEAR_RANGE, OUTERMOST = 0.5, 12.0
# In the order of their ids.
SPECIAL_TOKENS = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk", "ts")}
Array = np.ndarray | torch.Tensor
_WORD = re.compile(r"<r\d+>|\S+?(?=<r\d+>|\s|\Z)")


class SpaceExploreTokenizer(PreTrainedTokenizer):
    """Text such as `<ts><ts><bos><r131><eos>`, or log-returns, to ids and back.

    Bin i holds `edges[i - 1] <= x < edges[i]`; the first and the last are open. Whitespace between tokens is ignored,
    other text is `<unk>`. No special tokens are added to a text.

    Args:
        num_bins: number V of bins, 256 unless `edges` are given.
        edges: (V - 1,) increasing bin edges in units of volatility; by default uniform in asinh.
        centers: (V,) values that the bins decode to, each within its bin; by default the middles in asinh.

    Raises:
        ValueError: bins that are not bins; names the value.
    """

    padding_side = "left"

    def __init__(self, num_bins: int | None = None, edges=None, centers=None, **kwargs):
        if edges is None:
            edges = _default_edges(NUM_BINS if num_bins is None else num_bins)
        self.edges, self.centers = _checked_bins(num_bins, edges, centers)
        self.num_bins = len(self.centers)
        self._tokens = [*SPECIAL_TOKENS.values(), *(f"<r{i}>" for i in range(self.num_bins))]
        # Not called `vocab` or `encoder`: those the library writes into a file, and these follow from the bins.
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        # The library writes what its own constructor is given, so the edges and not how they came about.
        super().__init__(edges=self.edges, centers=self.centers, **{**SPECIAL_TOKENS, **kwargs})

    @classmethod
    def fit(cls, scaled_returns: Array, num_bins: int = NUM_BINS) -> "SpaceExploreTokenizer":
        """Bins of equal probability, for a market that differs; they decode to the means of their members.

        A value much more frequent than that, such as the zero of an unchanged price, gets a bin for itself.

        Args:
            scaled_returns: log-returns of the training period in units of volatility, of any shape.
            num_bins: number of bins.

        Raises:
            ValueError: NaN or infinite returns, or fewer distinct ones than bins.
        """
        _check_num_bins(num_bins)
        values, counts = np.unique(_finite(scaled_returns, "returns"), return_counts=True)
        if len(values) < num_bins:
            raise ValueError(f"{num_bins} bins need as many distinct returns, got {len(values)}")
        starts = _equal_parts(counts, num_bins)
        below, above = values[starts[1:] - 1], values[starts[1:]]
        middle = below + (above - below) / 2
        # Between neighbouring numbers there is no third.
        edges = np.where(middle > below, middle, above)
        means = np.add.reduceat(values * counts, starts) / np.add.reduceat(counts, starts)
        # A mean of equal numbers may be rounded off them, and out of their bin.
        return cls(edges=edges, centers=np.clip(means, values[starts], np.append(below, values[-1])))

    @property
    def return_token_ids(self) -> range:
        return range(len(SPECIAL_TOKENS), self.vocab_size)

    @property
    def suppress_tokens(self) -> list[int]:
        """All but the return tokens, for `generate(suppress_tokens=...)`: then every sampled day is a return."""
        return [index for index in range(len(self)) if index not in self.return_token_ids]

    def encode_returns(self, returns: Array, scale: float | Array) -> Array:
        """(..., H) int64 ids of log-returns, array or tensor as these are.

        Args:
            returns: (..., H) log-returns.
            scale: (...) or one volatility, in units of daily log-return.

        Raises:
            ValueError: a return that is NaN or infinite, a scale that is not positive or has another shape.
        """
        values = _finite(returns, "returns")
        bins = np.searchsorted(self.edges, values / _scale_of(scale, values.shape), side="right")
        ids = bins.astype(np.int64) + self.return_token_ids.start
        return torch.as_tensor(ids, device=returns.device) if isinstance(returns, torch.Tensor) else ids

    def decode_returns(self, ids: Array, scale: float | Array = 1.0) -> Array:
        """(..., H) log-returns at the centres of the bins, in float64 or, for a tensor, in torch's default type.

        Args:
            ids: (..., H) ids of return tokens.
            scale: (...) or one volatility; without it the returns are in units of volatility.

        Raises:
            ValueError: an id that is no return token, a scale that is not positive or has another shape.
        """
        indices, tokens = _array(ids), self.return_token_ids
        if not np.issubdtype(indices.dtype, np.integer):
            raise ValueError(f"ids must be integers, got {indices.dtype}")
        wrong = indices[(indices < tokens.start) | (indices >= tokens.stop)]
        if wrong.size:
            raise ValueError(f"id {wrong[0]} is {self.convert_ids_to_tokens(int(wrong[0]))}, not a return token")
        returns = np.take(self.centers, indices - tokens.start) * _scale_of(scale, indices.shape)
        if isinstance(ids, torch.Tensor):
            return torch.as_tensor(returns, dtype=torch.get_default_dtype(), device=ids.device)
        return returns

    def prompt(self, num_steps: int) -> str:
        """The text before the returns: a placeholder for every time step of context."""
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        return self.ts_token * num_steps + self.bos_token

    def to_text(self, returns: Array, scale: float) -> str:
        """The text of (H,) log-returns, `<eos>` included: the `chosen` and `rejected` of preference data."""
        ids = self.encode_returns(returns, scale)
        if ids.ndim != 1:
            raise ValueError(f"a text has returns of shape (H,), got {tuple(ids.shape)}")
        return self.decode(ids) + self.eos_token

    # --- what the library asks of a vocabulary ---

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self._added_tokens_encoder}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return _WORD.findall(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids[SPECIAL_TOKENS["unk_token"]])

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self._tokens):
            raise ValueError(f"id {index} is not among the {len(self._tokens)} of the vocabulary")
        return self._tokens[index]


def _array(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        values = values.double() if values.is_floating_point() else values
    return np.asarray(values)


def _finite(values, name: str) -> np.ndarray:
    values = _array(values).astype(np.float64)
    wrong = values[~np.isfinite(values)]
    if wrong.size:
        raise ValueError(f"{name} must be finite, got {wrong[0]}")
    return values


def _scale_of(scale, shape: tuple[int, ...]) -> np.ndarray:
    scale = _finite(scale, "scale")
    if (scale <= 0).any():
        raise ValueError(f"scale must be positive, got {scale.min()}")
    try:
        return np.broadcast_to(scale[..., None], shape) if scale.ndim else scale
    except ValueError:
        raise ValueError(f"scale of shape {scale.shape} does not fit returns of shape {shape}") from None


# --- bins ---


def _check_num_bins(num_bins: int) -> None:
    if not isinstance(num_bins, int | np.integer) or num_bins < 2:
        raise ValueError(f"num_bins must be an integer of at least 2, got {num_bins}")


def _default_edges(num_bins: int) -> np.ndarray:
    _check_num_bins(num_bins)
    outermost = np.arcsinh(OUTERMOST / LINEAR_RANGE)
    edges = LINEAR_RANGE * np.sinh(np.linspace(-outermost, outermost, num_bins - 1))
    # `linspace` rounds its two sides differently, and a fall must have the bin of the rise mirrored.
    return (edges - edges[::-1]) / 2


def _default_centers(edges: np.ndarray) -> np.ndarray:
    grid = np.arcsinh(edges / LINEAR_RANGE)
    # A single edge has no neighbour whose distance to continue; with 2, up and down are +-0.59 volatilities.
    padded = np.pad(grid, 1, mode="reflect", reflect_type="odd") if len(grid) > 1 else grid + np.array([-2, 0, 2])
    return LINEAR_RANGE * np.sinh((padded[:-1] + padded[1:]) / 2)


def _checked_bins(num_bins: int | None, edges, centers) -> tuple[tuple[float, ...], tuple[float, ...]]:
    edges = _finite(edges, "edges")
    if edges.ndim != 1 or not edges.size:
        raise ValueError(f"edges must be a list of at least 1 number, got {edges.tolist()}")
    falls = np.flatnonzero(np.diff(edges) <= 0)
    if falls.size:
        raise ValueError(f"edges must be strictly increasing, got {edges[falls[0] + 1]} after {edges[falls[0]]}")
    centers = _finite(_default_centers(edges) if centers is None else centers, "centers")
    for name, count in (("num_bins", num_bins), ("the number of centers", len(centers))):
        if count not in (None, len(edges) + 1):
            raise ValueError(f"{name} must be {len(edges) + 1} with {len(edges)} edges, got {count}")
    outside = np.flatnonzero(np.searchsorted(edges, centers, side="right") != np.arange(len(centers)))
    if outside.size:
        raise ValueError(f"centers must lie within their bins, got {centers[outside[0]]} for bin {outside[0]}")
    return tuple(edges.tolist()), tuple(centers.tolist())


def _equal_parts(counts: np.ndarray, num_parts: int) -> np.ndarray:
    """Where each part begins when distinct values with these counts are cut into parts of nearly equal counts."""
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    starts = [0]
    for left in range(num_parts, 1, -1):
        # Of what is left, so that a frequent value makes all later parts smaller instead of emptying some.
        target = cumulative[starts[-1]] + (cumulative[-1] - cumulative[starts[-1]]) / left
        end = np.searchsorted(cumulative, target)
        end -= target - cumulative[end - 1] < cumulative[end] - target
        starts.append(int(np.clip(end, starts[-1] + 1, len(counts) - left + 1)))
    return np.array(starts)


__all__ = ["SpaceExploreTokenizer"]
SpaceExploreTokenizer.register_for_auto_class("AutoTokenizer")
