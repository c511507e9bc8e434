"""Windows to batches."""

import numpy as np
import torch

from spaceexploreai.data.windows import IGNORE_INDEX
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer

# What a padded step holds. The network never reads it; a scale of one keeps divisions finite.
PADDING = {"past_values": 0.0, "attention_mask": 0, "scale": 1.0, "labels": IGNORE_INDEX, "returns": np.nan}


def collate_windows(examples: list[dict[str, np.ndarray]], length: int = 0) -> dict[str, torch.Tensor]:
    """Stacks windows, padded on the left to the longest, or to `length` if that is more.

    Args:
        examples: `past_values` (T, F), `attention_mask` (T,) and what the head takes of `scale` (T,), `labels` (T, H)
            and `returns` (T,); T may differ.

    Returns:
        As many of `past_values` (B, T, F), `scale` (B, T), `labels` (B, T, H), `returns` (B, T), and `attention_mask`
        (B, T) of 0 and 1.
    """
    longest = max(length, *(len(example["past_values"]) for example in examples))
    batch = {name: _stack([example[name] for example in examples], longest, PADDING[name]) for name in examples[0]}
    batch["attention_mask"] = batch["attention_mask"].long()
    return batch


class PathCollator:
    """Contexts and paths (see `stocks.PathWindows`) to batches of the causal language model.

    A row of tokens is a `<ts>` for each unpadded step, `<bos>` and the path, padded on the right. The label of every
    step but the last is the token of the day after it, in units of the volatility known there: as many lessons as
    steps. Those of the path are in units of the volatility at its origin, as `generate` gives them.

    Args:
        tokenizer: bins of the returns.
        context_length, path_length: steps T and days L that all batches are padded to.
    """

    def __init__(self, tokenizer: SpaceExploreTokenizer, context_length: int, path_length: int):
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.path_length = path_length

    def __call__(self, examples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """`input_ids, attention_mask, labels` (B, T + 1 + L), `past_values` (B, T, F), `past_values_mask` (B, T)."""
        names = ("past_values", "attention_mask", "scale")
        context = collate_windows(
            [{name: example[name] for name in names} for example in examples], self.context_length
        )
        shape = (len(examples), self.context_length + 1 + self.path_length)
        ids, labels = np.full(shape, self.tokenizer.pad_token_id), np.full(shape, int(IGNORE_INDEX))
        for row, example in enumerate(examples):
            self._fill(ids[row], labels[row], example)
        ids = torch.from_numpy(ids)
        return {
            "input_ids": ids,
            "attention_mask": (ids != self.tokenizer.pad_token_id).long(),
            "labels": torch.from_numpy(labels),
            "past_values": context["past_values"],
            "past_values_mask": context["attention_mask"],
        }

    def _fill(self, ids: np.ndarray, labels: np.ndarray, example: dict[str, np.ndarray]) -> None:
        traded, scale, path = example["attention_mask"], example["scale"], example["path"]
        steps = int(traded.sum())
        tokens = self.tokenizer.encode_returns(path, scale[-1])
        ids[:steps] = self.tokenizer.ts_token_id
        ids[steps] = self.tokenizer.bos_token_id
        ids[steps + 1 : steps + 1 + len(path)] = labels[steps + 1 : steps + 1 + len(path)] = tokens
        # The model shifts labels by one: at each place stands what the place before it is to say.
        returns, scales = example["next_returns"][traded][:-1], scale[traded][:-1]
        known = np.flatnonzero(returns != IGNORE_INDEX)
        labels[known + 1] = self.tokenizer.encode_returns(returns[known, None], scales[known])[:, 0]


class PreferenceCollator:
    """Tokenised preference pairs to batches of TRL's `DPOTrainer`, with the numeric context that its own collator
    would leave out.

    A row of tokens is the prompt, a `<ts>` for each unpadded step and `<bos>`, and the path, padded on the right: what
    `PathCollator` trained on. So the `<eos>` that ends a path as text is dropped; the model never learnt to say it.

    Args:
        series: histories that the contexts are cut from (`stocks.SeriesStore`).
        tokenizer: bins of the returns.
    """

    def __init__(self, series, tokenizer: SpaceExploreTokenizer):
        self.series = series
        self.tokenizer = tokenizer

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """`input_ids, attention_mask, completion_mask` (2B, S), `past_values` (2B, T, F), `past_values_mask` (2B, T):
        the chosen paths, then the rejected ones. What the reference says of them, (B,), if it is among the columns."""
        contexts = [self.series.steps(one["series"], one["first"], one["last"] + 1) for one in examples]
        context = collate_windows([{"past_values": one.values, "attention_mask": one.traded} for one in contexts])
        sides = ("chosen_ids", "rejected_ids")
        rows = [(one["prompt_ids"], self._path(one[side])) for side in sides for one in examples]
        batch = self._tokens(rows) | {
            "past_values": context["past_values"].repeat(2, 1, 1),
            "past_values_mask": context["attention_mask"].repeat(2, 1),
        }
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([one[name] for one in examples])
        return batch

    def _tokens(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        """Of prompts and paths."""
        shape = (len(rows), max(len(prompt) + len(path) for prompt, path in rows))
        ids, completion = np.full(shape, self.tokenizer.pad_token_id), np.zeros(shape, dtype=np.int64)
        for row, mask, (prompt, path) in zip(ids, completion, rows, strict=True):
            stop = len(prompt) + len(path)
            row[:stop], mask[len(prompt) : stop] = [*prompt, *path], 1
        ids = torch.from_numpy(ids)
        attention_mask = (ids != self.tokenizer.pad_token_id).long()
        return {"input_ids": ids, "attention_mask": attention_mask, "completion_mask": torch.from_numpy(completion)}

    def _path(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token != self.tokenizer.eos_token_id]


def _stack(arrays: list[np.ndarray], longest: int, padding: float) -> torch.Tensor:
    stacked = np.full((len(arrays), longest, *arrays[0].shape[1:]), padding, dtype=np.float32)
    for row, array in zip(stacked, arrays, strict=True):
        row[longest - len(array) :] = array
    return torch.from_numpy(stacked)
