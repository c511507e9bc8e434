"""The return-bin tokenizer against NumPy, PyTorch, scikit-learn and pandas, and as TRL and a stranger use it."""

import copy
import json
import math
import os
import subprocess
import sys
from functools import cache
from itertools import groupby

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.preprocessing import KBinsDiscretizer

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer

SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>", "<ts>"]
RETURNS = arrays(np.float64, st.integers(1, 20), elements=st.floats(-2, 2, allow_subnormal=False))
SCALES = st.floats(1e-4, 0.5)
NUM_BINS = st.sampled_from([2, 3, 4, 7, 64, 255, 256])


@cache
def tokenizer(num_bins: int = 256) -> SpaceExploreTokenizer:
    return SpaceExploreTokenizer(num_bins=num_bins)


@cache
def fitted(num_bins: int = 8) -> SpaceExploreTokenizer:
    return SpaceExploreTokenizer.fit(np.random.default_rng(0).standard_t(4, 1000), num_bins)


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(ValueError, match=r".+") as refused:
        function(*args, **kwargs)
    return str(refused.value)


# --- the vocabulary ---


def test_ids_are_those_that_the_model_is_configured_with():
    bins = tokenizer()
    assert [bins.convert_ids_to_tokens(i) for i in range(7)] == [*SPECIALS, "<r0>", "<r1>"]
    assert bins.pad_token_id == 0
    assert bins.bos_token_id == 1
    assert bins.eos_token_id == 2
    assert bins.unk_token_id == 3
    assert bins.ts_token_id == 4
    assert bins.ts_token == "<ts>"


@pytest.mark.parametrize("num_bins", [2, 64, 256])
def test_size_is_five_and_the_bins(num_bins):
    bins = tokenizer(num_bins)
    assert len(bins) == bins.vocab_size == len(bins.get_vocab()) == 5 + num_bins
    assert sorted(bins.get_vocab().values()) == list(range(5 + num_bins))
    assert list(bins.return_token_ids) == list(range(5, 5 + num_bins))
    assert bins.suppress_tokens == [0, 1, 2, 3, 4]


def test_an_added_token_is_suppressed_too():
    grown = SpaceExploreTokenizer(num_bins=4)
    grown.add_tokens(["<split>"])
    assert grown("<split><r3>")["input_ids"] == [9, 8]
    assert grown.suppress_tokens == [0, 1, 2, 3, 4, 9]
    assert refusal(grown.decode_returns, np.array([9])) == "id 9 is <split>, not a return token"


def test_only_the_five_are_special():
    bins = tokenizer()
    assert sorted(bins.all_special_tokens) == sorted(SPECIALS)
    assert bins.decode([4, 4, 1, 133, 2], skip_special_tokens=True) == "<r128>"


# --- text ---


def test_text_to_ids():
    bins = tokenizer()
    assert bins("<ts><ts><bos>")["input_ids"] == [4, 4, 1]
    assert bins(" <r128>\n<r131>\t<eos> ")["input_ids"] == [133, 136, 2]
    assert bins("")["input_ids"] == []


@pytest.mark.parametrize("text", ["hello", "<r256>", "<r-1>", "<r01>", "<r>", "<", "<R3>", "r3", "涨", "<r٣>"])
def test_other_text_is_unknown(text):
    assert tokenizer()(text)["input_ids"] == [3]
    assert tokenizer()(f"<r3>{text}<ts>")["input_ids"] == [8, 3, 4]


@given(st.lists(st.sampled_from(list(tokenizer().get_vocab())), max_size=30))
def test_text_and_ids_round_trip(tokens):
    bins, text = tokenizer(), "".join(tokens)
    ids = bins(text)["input_ids"]
    assert ids == [bins.get_vocab()[token] for token in tokens]
    assert bins.decode(ids) == text
    assert bins(" ".join(tokens))["input_ids"] == ids


def scanned(text: str, vocab: dict[str, int]) -> list[int]:
    """Ids by looking for every token at every place; 3 for each stretch of other text."""
    ids, place = [], 0
    while place < len(text):
        found = [token for token in vocab if text.startswith(token, place)]
        ids += [vocab[found[0]]] if found else [] if text[place].isspace() else [3]
        place += len(found[0]) if found else 1
    return ids


def collapsed(ids: list[int]) -> list[int]:
    return [key for key, group in groupby(ids) for key in ([3] if key == 3 else group)]


@given(st.lists(st.sampled_from(["<ts>", "<bos>", "<r1>", "<r12>", *"<>rts1 \n"]), max_size=20).map("".join))
def test_tokens_are_found_in_any_text(text):
    bins = tokenizer(16)
    assert collapsed(bins(text)["input_ids"]) == collapsed(scanned(text, bins.get_vocab()))


def test_a_batch_is_padded_on_the_left():
    batch = tokenizer()(["<ts><ts><bos>", "<bos>"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[4, 4, 1], [0, 0, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


@given(RETURNS, st.integers(1, 9))
def test_prompt_and_completion_are_tokenized_as_their_concatenation(returns, num_steps):
    """What TRL's trainers do with `prompt`, `chosen` and `rejected`."""
    bins = tokenizer()
    prompt, chosen = bins.prompt(num_steps), bins.to_text(returns, 0.02)
    prompt_ids, chosen_ids = bins(text=prompt)["input_ids"], bins(text=chosen)["input_ids"]
    assert prompt_ids == [4] * num_steps + [1]
    assert chosen_ids == [*bins.encode_returns(returns, 0.02), 2]
    assert bins(text=prompt + chosen)["input_ids"] == prompt_ids + chosen_ids
    assert chosen.endswith(bins.eos_token)


def test_text_of_a_tensor():
    assert tokenizer().to_text(torch.tensor([0.0, 9.0, -9.0]), 0.5) == "<r128><r255><r0><eos>"


# --- bins ---


def test_default_edges_are_uniform_in_asinh():
    step = 2 * math.asinh(24) / 254
    expected = [0.5 * math.sinh(step * i) for i in range(-127, 128)]
    np.testing.assert_allclose(tokenizer().edges, expected, rtol=1e-12, atol=1e-12)
    assert tokenizer().edges[-1] == pytest.approx(12)


@pytest.mark.parametrize("num_bins", [3, 255, 256])
def test_default_centers_are_the_middles_in_asinh(num_bins):
    step = 2 * math.asinh(24) / (num_bins - 2)
    expected = [0.5 * math.sinh(step * (i - (num_bins - 1) / 2)) for i in range(num_bins)]
    np.testing.assert_allclose(tokenizer(num_bins).centers, expected, rtol=1e-12, atol=1e-12)


def test_two_bins_are_down_and_up():
    assert tokenizer(2).edges == (0.0,)
    assert tokenizer(2).centers == pytest.approx((-0.5 * math.sinh(1), 0.5 * math.sinh(1)))
    assert tokenizer(2).encode_returns(np.array([-1e-9, 0.0, 1e-9]), 1.0).tolist() == [5, 6, 6]


def test_given_edges_are_used():
    bins = SpaceExploreTokenizer(edges=[-1, 0.5, 3])
    assert bins.edges == (-1.0, 0.5, 3.0)
    assert bins.num_bins == 4
    assert bins.centers[0] < -1 < bins.centers[1] < 0.5 < bins.centers[2] < 3 < bins.centers[3]
    assert SpaceExploreTokenizer(edges=[-1, 1], centers=[-2, 0.1, 2], num_bins=3).centers == (-2.0, 0.1, 2.0)


@given(NUM_BINS, RETURNS, SCALES)
def test_ids_are_those_of_numpy_and_torch(num_bins, returns, scale):
    bins = tokenizer(num_bins)
    ids = bins.encode_returns(returns, scale)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, 5 + np.digitize(returns / scale, bins.edges))
    edges, tensor = torch.tensor(bins.edges, dtype=torch.float64), torch.from_numpy(returns)
    encoded = bins.encode_returns(tensor, scale)
    assert encoded.dtype == torch.int64
    assert torch.equal(encoded, 5 + torch.bucketize(tensor / scale, edges, right=True))


@given(NUM_BINS, RETURNS, SCALES)
def test_a_decoded_return_lies_in_the_bin_of_the_return(num_bins, returns, scale):
    bins = tokenizer(num_bins)
    decoded = bins.decode_returns(bins.encode_returns(returns, scale), scale)
    np.testing.assert_array_equal(np.digitize(decoded / scale, bins.edges), np.digitize(returns / scale, bins.edges))


@pytest.mark.parametrize("make", [tokenizer, fitted])
@pytest.mark.parametrize("dtype", [np.float64, torch.float32, torch.float64])
def test_every_id_survives_decoding_and_encoding(make, dtype):
    ids = np.array(make().return_token_ids)
    ids = ids if dtype is np.float64 else torch.from_numpy(ids)
    decoded = make().decode_returns(ids, 0.0137)
    assert make().encode_returns(decoded, 0.0137).tolist() == ids.tolist()
    assert type(decoded) is type(ids)


@given(NUM_BINS, RETURNS, SCALES)
def test_a_larger_return_has_no_smaller_id(num_bins, returns, scale):
    assert (np.diff(tokenizer(num_bins).encode_returns(np.sort(returns), scale)) >= 0).all()


@given(NUM_BINS, RETURNS, SCALES)
def test_a_fall_has_the_mirrored_bin_of_the_rise(num_bins, returns, scale):
    bins = tokenizer(num_bins)
    assume(not np.isin(returns / scale, bins.edges).any())
    mirrored = 5 + (5 + num_bins - 1) - bins.encode_returns(returns, scale)
    np.testing.assert_array_equal(bins.encode_returns(-returns, scale), mirrored)
    np.testing.assert_allclose(bins.centers, np.negative(bins.centers[::-1]), rtol=1e-12, atol=1e-15)


@given(RETURNS, SCALES, st.floats(0.01, 100))
def test_only_the_ratio_of_return_and_scale_counts(returns, scale, factor):
    edges = np.array(tokenizer().edges)
    assume(np.abs(returns[:, None] / scale - edges).min() > 1e-9)  # there a last digit decides
    ids = tokenizer().encode_returns(returns, scale)
    np.testing.assert_array_equal(tokenizer().encode_returns(factor * returns, factor * scale), ids)


# --- arrays and tensors ---


def test_each_sequence_has_its_scale():
    returns, scale = np.linspace(-0.1, 0.1, 24).reshape(2, 3, 4), np.array([[0.01, 0.02, 0.03], [0.04, 0.05, 0.06]])
    ids = tokenizer().encode_returns(returns, scale)
    decoded = tokenizer().decode_returns(ids, scale)
    assert ids.shape == decoded.shape == returns.shape
    for place in np.ndindex(2, 3):
        np.testing.assert_array_equal(ids[place], tokenizer().encode_returns(returns[place], scale[place]))
        np.testing.assert_allclose(decoded[place], tokenizer().decode_returns(ids[place]) * scale[place], rtol=1e-12)


def test_paths_of_one_sequence_may_share_its_scale():
    ids = torch.tensor([[[5, 260], [133, 134]]])
    decoded = tokenizer().decode_returns(ids, torch.tensor([[0.5]]))
    torch.testing.assert_close(decoded, tokenizer().decode_returns(ids) * 0.5)


def test_decoded_returns_have_the_type_of_the_ids():
    assert tokenizer().decode_returns(torch.tensor([[133]])).dtype == torch.float32
    assert tokenizer().decode_returns(np.array([[133]], dtype=np.int32)).dtype == np.float64
    assert tokenizer().decode_returns([133], 0.01).shape == (1,)


def test_half_precision_and_gradients_do_no_harm():
    returns = torch.tensor([0.5, -0.25], dtype=torch.bfloat16, requires_grad=True)
    assert tokenizer().encode_returns(returns, torch.tensor(1.0, dtype=torch.bfloat16)).tolist() == [
        *tokenizer().encode_returns(np.array([0.5, -0.25]), 1.0)
    ]


# --- fitting ---


@pytest.mark.parametrize("num_bins", [2, 5, 32])
def test_fitted_bins_are_those_of_scikit_learn_and_pandas(num_bins):
    returns = np.random.default_rng(1).standard_t(3, num_bins * 40)
    bins = SpaceExploreTokenizer.fit(returns, num_bins)
    discretizer = KBinsDiscretizer(num_bins, encode="ordinal", strategy="quantile", quantile_method="linear")
    expected = discretizer.fit_transform(returns[:, None])[:, 0]
    np.testing.assert_array_equal(bins.encode_returns(returns, 1.0) - 5, expected)
    means = pd.Series(returns).groupby(pd.qcut(returns, num_bins, labels=False)).mean()
    np.testing.assert_allclose(bins.centers, means, rtol=1e-12)


@settings(max_examples=200)
@given(
    st.integers(2, 12), arrays(np.float64, st.integers(12, 80), elements=st.floats(-9, 9).map(lambda x: round(x, 1)))
)
def test_every_fitted_bin_has_members_and_their_mean(num_bins, returns):
    assume(len(np.unique(returns)) >= num_bins)
    bins = SpaceExploreTokenizer.fit(torch.from_numpy(returns), num_bins)
    members = pd.Series(returns).groupby(np.digitize(returns, bins.edges))
    assert bins.num_bins == members.ngroups == num_bins
    np.testing.assert_allclose(bins.centers, members.mean(), rtol=1e-9, atol=1e-12)


@given(st.integers(2, 12), st.integers(12, 200))
def test_distinct_returns_fill_the_bins_evenly(num_bins, count):
    returns = np.random.default_rng(count).normal(size=count)
    bins = SpaceExploreTokenizer.fit(returns, num_bins)
    assert np.ptp(np.bincount(bins.encode_returns(returns, 1.0))[5:]) <= 1


def test_an_unchanged_price_has_a_bin_for_itself():
    returns = np.concatenate([np.random.default_rng(0).normal(size=1000), np.zeros(100)])
    bins = SpaceExploreTokenizer.fit(np.random.default_rng(1).permutation(returns), 64)
    ids = bins.encode_returns(returns, 1.0)
    assert (ids == ids[-1]).sum() == 100
    assert bins.decode_returns(ids[-1:])[0] == 0.0


@pytest.mark.parametrize("count", [3, 43])
def test_the_mean_of_equal_returns_is_not_rounded(count):
    assert 0.1 * count / count != 0.1
    assert SpaceExploreTokenizer.fit([0.1] * count + [0.2] * count, 2).centers == (0.1, 0.2)


def test_bins_between_neighbouring_numbers():
    returns = np.array([1.0, np.nextafter(1, 2), np.nextafter(np.nextafter(1, 2), 2)])
    bins = SpaceExploreTokenizer.fit(returns, 3)
    assert bins.encode_returns(returns, 1.0).tolist() == [5, 6, 7]
    assert bins.decode_returns(np.array([5, 6, 7])).tolist() == returns.tolist()


# --- refusals ---

INFINITE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("num_bins", [1, 0, -3, 2.5, "256", True])
def test_refuses_a_number_of_bins(num_bins):
    message = f"num_bins must be an integer of at least 2, got {num_bins}"
    assert refusal(SpaceExploreTokenizer, num_bins=num_bins) == message
    assert refusal(SpaceExploreTokenizer.fit, [1.0, 2.0, 3.0], num_bins) == message


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        ({"edges": []}, "edges must be a list of at least 1 number, got []"),
        ({"edges": [[0.0, 1.0]]}, "edges must be a list of at least 1 number, got [[0.0, 1.0]]"),
        ({"edges": [0.0, 0.5, 0.5]}, "edges must be strictly increasing, got 0.5 after 0.5"),
        ({"edges": [0.0, 2.0, 1.0]}, "edges must be strictly increasing, got 1.0 after 2.0"),
        ({"edges": [0.0, 1.0], "num_bins": 4}, "num_bins must be 3 with 2 edges, got 4"),
        ({"edges": [0.0, 1.0], "centers": [0.5, 2]}, "the number of centers must be 3 with 2 edges, got 2"),
        ({"edges": [0, 1], "centers": [-1, 1, 2]}, "centers must lie within their bins, got 1.0 for bin 1"),
        ({"edges": [0, 1], "centers": [0, 0.5, 2]}, "centers must lie within their bins, got 0.0 for bin 0"),
        ({"num_bins": 2, "centers": [-1, -0.5]}, "centers must lie within their bins, got -0.5 for bin 1"),
        *[({"edges": [0.0, value]}, f"edges must be finite, got {value}") for value in INFINITE],
        *[({"num_bins": 2, "centers": [-1, value]}, f"centers must be finite, got {value}") for value in INFINITE],
    ],
    ids=str,
)
def test_refuses_bins(bins, message):
    assert refusal(SpaceExploreTokenizer, **bins) == message


def test_refuses_to_fit_more_bins_than_distinct_returns():
    assert refusal(SpaceExploreTokenizer.fit, [0.0, 1.0, 1.0, 2.0], 4) == "4 bins need as many distinct returns, got 3"
    assert SpaceExploreTokenizer.fit([0.0, 1.0, 1.0, 2.0], 3).centers == (0.0, 1.0, 2.0)


@pytest.mark.parametrize("value", INFINITE)
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_refuses_returns(value, kind):
    message = f"returns must be finite, got {value}"
    assert refusal(tokenizer().encode_returns, kind([[0.1, value]]), 1.0) == message
    assert refusal(tokenizer().to_text, kind([0.1, value]), 1.0) == message
    assert refusal(SpaceExploreTokenizer.fit, kind([0.1, 0.2, value]), 2) == message


SCALE_REFUSALS = [
    (0.0, "scale must be positive, got 0.0"),
    ([0.1, -0.2], "scale must be positive, got -0.2"),
    (math.nan, "scale must be finite, got nan"),
    ([0.1, math.inf], "scale must be finite, got inf"),
    ([0.1, 0.1, 0.1], "scale of shape (3,) does not fit returns of shape (2, 3)"),
    ([[0.1, 0.1, 0.1]], "scale of shape (1, 3) does not fit returns of shape (2, 3)"),
]


@pytest.mark.parametrize(("scale", "message"), SCALE_REFUSALS)
def test_refuses_a_scale(scale, message):
    assert refusal(tokenizer().encode_returns, np.zeros((2, 3)), np.array(scale)) == message
    ids = torch.full((2, 3), 133)
    assert refusal(tokenizer().decode_returns, ids, torch.tensor(scale, dtype=torch.float64)) == message


@pytest.mark.parametrize(
    ("index", "message"),
    [
        *[(i, f"id {i} is {token}, not a return token") for i, token in enumerate(SPECIALS)],
        (261, "id 261 is not among the 261 of the vocabulary"),
        (-1, "id -1 is not among the 261 of the vocabulary"),
        (-100, "id -100 is not among the 261 of the vocabulary"),
    ],
)
def test_refuses_to_decode(index, message):
    assert refusal(tokenizer().decode_returns, torch.tensor([133, index])) == message
    assert refusal(tokenizer().decode_returns, np.array([[133, index]]), 0.02) == message


@pytest.mark.parametrize("index", [-100, -1, 261])
def test_refuses_an_id_outside_of_the_vocabulary(index):
    assert refusal(tokenizer().decode, [index]) == f"id {index} is not among the 261 of the vocabulary"


def test_refuses_what_is_no_id():
    assert refusal(tokenizer().decode_returns, np.array([133.0])) == "ids must be integers, got float64"


@pytest.mark.parametrize("num_steps", [0, -1])
def test_refuses_a_prompt_without_context(num_steps):
    assert refusal(tokenizer().prompt, num_steps) == f"num_steps must be at least 1, got {num_steps}"


def test_refuses_a_text_of_several_paths():
    message = "a text has returns of shape (H,), got (2, 3)"
    assert refusal(tokenizer().to_text, torch.zeros(2, 3), 1.0) == message


# --- saving and loading ---

STRANGER = """
import json
import sys
sys.modules["spaceexploreai"] = None  # any import of it raises ImportError
from transformers import AutoTokenizer

folder, output = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(output)
loaded = [AutoTokenizer.from_pretrained(path, trust_remote_code=True) for path in (folder, output)]
text = loaded[0].prompt(2) + loaded[0].to_text([0.01, -0.03, 0.2], 0.02)
print(json.dumps([
    [tokenizer.edges, tokenizer.centers, tokenizer.get_vocab(), tokenizer.ts_token_id, tokenizer(text)["input_ids"],
     tokenizer.padding_side, len(tokenizer), type(tokenizer).__module__.startswith("transformers_modules")]
    for tokenizer in loaded
]))
"""


def test_a_stranger_gets_the_same_tokenizer_also_after_saving_it_again(tmp_path):
    bins = fitted()
    SpaceExploreConfig().save_pretrained(tmp_path / "first")  # as in a checkpoint; the second folder has none
    bins.save_pretrained(tmp_path / "first")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "first"), str(tmp_path / "second")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = [4, 4, 1, *bins.encode_returns(np.array([0.01, -0.03, 0.2]), 0.02).tolist(), 2]
    expected = [list(bins.edges), list(bins.centers), bins.get_vocab(), 4, ids, "left", 13, True]
    assert json.loads(done.stdout) == [expected, expected]


@pytest.mark.parametrize("make", [tokenizer, fitted])
def test_a_folder_holds_the_bins_as_json_and_the_code(tmp_path, make):
    make().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer_config.json", "tokenization_spaceexplore.py"}
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["auto_map"] == {"AutoTokenizer": ["tokenization_spaceexplore.SpaceExploreTokenizer", None]}
    assert (saved["edges"], saved["centers"]) == (list(make().edges), list(make().centers))
    loaded = SpaceExploreTokenizer.from_pretrained(tmp_path)
    assert (loaded.edges, loaded.centers, loaded.get_vocab()) == (make().edges, make().centers, make().get_vocab())


def test_saved_bins_are_not_replaced_by_a_number_of_bins(tmp_path):
    fitted(8).save_pretrained(tmp_path)
    message = "num_bins must be 8 with 7 edges, got 64"
    assert refusal(SpaceExploreTokenizer.from_pretrained, tmp_path, num_bins=64) == message


def test_a_copy_is_the_same():
    copied = copy.deepcopy(fitted())
    assert (copied.edges, copied.centers, copied.get_vocab()) == (
        fitted().edges,
        fitted().centers,
        fitted().get_vocab(),
    )
    assert copied("<ts><r3><eos>")["input_ids"] == [4, 8, 2]
