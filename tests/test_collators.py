"""Batches: windows padded on the left, and what is padding told apart from what is not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from spaceexploreai.data.collators import PADDING, collate_windows
from spaceexploreai.data.windows import IGNORE_INDEX, WindowDataset
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries

FEATURES, HORIZONS = 3, 2


def make_windows(lengths: list[int], labels: bool = True) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(len(lengths))
    shapes = {"past_values": (FEATURES,), "scale": ()} | ({"labels": (HORIZONS,)} if labels else {})
    windows = [
        {name: rng.normal(size=(length, *shape)).astype(np.float32) for name, shape in shapes.items()}
        for length in lengths
    ]
    return [window | {"attention_mask": np.ones(len(window["scale"]), dtype=bool)} for window in windows]


def test_padding_is_what_the_network_expects():
    assert {
        "past_values": 0.0,
        "attention_mask": 0,
        "scale": 1.0,
        "labels": IGNORE_INDEX,
        "returns": np.nan,
    } == PADDING
    assert IGNORE_INDEX == -100


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.booleans())
def test_windows_are_padded_on_the_left(lengths, labels):
    windows = make_windows(lengths, labels)
    batch = collate_windows(windows)
    longest = max(lengths)
    assert sorted(batch) == sorted(windows[0])
    assert batch["attention_mask"].shape == batch["scale"].shape == (len(lengths), longest)
    assert batch["past_values"].shape == (len(lengths), longest, FEATURES)
    for row, (length, window) in enumerate(zip(lengths, windows, strict=True)):
        padded = longest - length
        assert batch["attention_mask"][row].tolist() == [0] * padded + [1] * length
        for name, array in window.items():
            np.testing.assert_array_equal(batch[name][row, padded:], array, err_msg=name)
    padding = batch["attention_mask"] == 0
    assert (batch["past_values"][padding] == 0).all()
    assert (batch["scale"][padding] == 1).all()
    if labels:
        assert batch["labels"].shape == (len(lengths), longest, HORIZONS)
        assert (batch["labels"][padding] == -100).all()


def test_masked_steps_stay_masked():
    long, short = make_windows([4, 2])
    long["attention_mask"][1] = short["attention_mask"][0] = False
    assert collate_windows([long, short])["attention_mask"].tolist() == [[1, 0, 1, 1], [0, 0, 0, 1]]


def test_batch_of_equal_lengths_has_no_padding():
    windows = make_windows([7, 7, 7])
    batch = collate_windows(windows)
    assert (batch["attention_mask"] == 1).all()
    for name in windows[0]:
        np.testing.assert_array_equal(batch[name], np.stack([window[name] for window in windows]))


@pytest.mark.parametrize("lengths", [[4, 4], [4, 1]])
def test_types(lengths):
    batch = collate_windows(make_windows(lengths))
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "past_values": torch.float32,
        "scale": torch.float32,
        "labels": torch.float32,
        "attention_mask": torch.int64,
    }
    assert all(tensor.is_contiguous() for tensor in batch.values())


def test_undefined_values_and_unsupervised_steps_stay():
    long, short = make_windows([4, 2])
    short["past_values"][0, 1] = np.nan
    short["labels"][1] = IGNORE_INDEX
    batch = collate_windows([long, short])
    assert torch.isnan(batch["past_values"]).nonzero().tolist() == [[1, 2, 1]]
    assert (batch["labels"][1] == IGNORE_INDEX).all(dim=1).tolist() == [True, True, False, True]


def test_windows_are_not_written_to():
    windows = make_windows([3, 5])
    before = [{name: array.copy() for name, array in window.items()} for window in windows]
    batch = collate_windows(windows)
    for tensor in batch.values():
        tensor.zero_()
    for window, copy in zip(windows, before, strict=True):
        for name, array in copy.items():
            np.testing.assert_array_equal(window[name], array)


def test_loader_gives_the_windows_of_a_dataset():
    rng = np.random.default_rng(0)
    values, scale = rng.normal(size=(9, FEATURES)).astype(np.float32), rng.uniform(1, 2, 9).astype(np.float32)
    dates = np.arange("2020-01-01", "2020-01-10", dtype="datetime64[D]").astype("datetime64[ns]")
    series = EncodedSeries("AAA", dates, np.ones(9), values, scale)
    dataset = WindowDataset([series], np.array([[0, 8], [0, 1]]), context_length=5)
    (batch,) = DataLoader(dataset, batch_size=2, collate_fn=collate_windows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(batch["past_values"][0], values[4:])
    np.testing.assert_array_equal(batch["scale"][1, 3:], scale[:2])
