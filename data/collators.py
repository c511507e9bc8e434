"""Windows to batches."""

import numpy as np
import torch

from spaceexploreai.data.windows import IGNORE_INDEX

# What a padded step holds. The network never reads it; a scale of one keeps divisions finite.
PADDING = {"past_values": 0.0, "attention_mask": 0, "scale": 1.0, "labels": IGNORE_INDEX}


def collate_windows(examples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stacks windows, padded on the left to the longest.

    Args:
        examples: `past_values` (T, F), `attention_mask` (T,), `scale` (T,) and, in training, `labels` (T, H); T may
            differ.

    Returns:
        `past_values` (B, T, F), `scale` (B, T), `labels` (B, T, H), `attention_mask` (B, T) of 0 and 1.
    """
    longest = max(len(example["scale"]) for example in examples)
    batch = {name: _stack([example[name] for example in examples], longest, PADDING[name]) for name in examples[0]}
    batch["attention_mask"] = batch["attention_mask"].long()
    return batch


def _stack(arrays: list[np.ndarray], longest: int, padding: float) -> torch.Tensor:
    stacked = np.full((len(arrays), longest, *arrays[0].shape[1:]), padding, dtype=np.float32)
    for row, array in zip(stacked, arrays, strict=True):
        row[longest - len(array) :] = array
    return torch.from_numpy(stacked)
