"""The benchmarks: that they measure what they say, against closed forms."""

import json
from unittest.mock import patch

import pytest
import torch

from spaceexploreai.benchmarks import kv_cache
from spaceexploreai.benchmarks.kv_cache import RECIPE, bytes_per_token, fill_cache, make_model, tokens_per_second
from spaceexploreai.modeling_spaceexplore import SpaceExploreLatentAttention

LAYERS, HEADS, SHARED_HEADS, HEAD, LATENT, ROTARY = 3, 6, 2, 8, 10, 4
# No two alike, so that no closed form holds by accident; mha caches 96 floats a token and layer, mla 14.
SIZES = {
    "num_features": 5,
    "hidden_size": HEADS * HEAD,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "kv_lora_rank": LATENT,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": ROTARY,
    "v_head_dim": 18,
    "moe_intermediate_size": 24,
    "t2t_num_hidden_layers": 0,
}
FLOATS = {"mla": LATENT + ROTARY, "gqa": 2 * SHARED_HEADS * HEAD, "mha": 2 * HEADS * HEAD}


@pytest.fixture
def quick(monkeypatch):
    """As few tokens and repeats as there can be."""
    for name, number in (("CONTEXT", 7), ("NEW_TOKENS", 3), ("REPEATS", 2)):
        monkeypatch.setattr(kv_cache, name, number)


def write_recipe(folder, **overrides):
    path = folder / "config.json"
    path.write_text(json.dumps({**SIZES, **overrides}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("kind", list(FLOATS))
def test_bytes_of_a_token_are_those_of_the_papers(kind, dtype, width):
    """DeepSeek-V2 (arXiv 2405.04434), table 1."""
    shared = {"num_key_value_heads": SHARED_HEADS} if kind == "gqa" else {}
    model = make_model({**SIZES, **shared}, kind).to(dtype)
    for context in (2, 9):
        assert bytes_per_token(fill_cache(model, context)) == LAYERS * FLOATS[kind] * width


def test_bytes_are_those_of_the_memory_not_of_a_view():
    cache = fill_cache(make_model(SIZES, "mla"), 8)
    cache.crop(-4)
    assert bytes_per_token(cache) == 2 * LAYERS * FLOATS["mla"] * 4


def test_the_27m_recipe_caches_a_sixth_of_multi_head_attention(monkeypatch):
    monkeypatch.setattr(kv_cache, "CONTEXT", 2)
    sizes = kv_cache.compare_sizes(json.loads(RECIPE.read_text(encoding="utf-8")))
    assert sizes == {"mla": 4 * 4 * (64 + 16), "gqa": 4 * 4 * 2 * 2 * 64, "mha": 4 * 4 * 2 * 4 * 64}
    assert sizes["mla"] <= sizes["mha"] / 6


@pytest.mark.parametrize("absorbed", [True, False])
def test_each_form_of_decoding_is_the_one_it_is_called(absorbed, quick):
    model = make_model(SIZES, "mla")
    cache = fill_cache(model, 7)
    expand = SpaceExploreLatentAttention.expand_kv
    with patch.object(SpaceExploreLatentAttention, "expand_kv", autospec=True, side_effect=expand) as expanded:
        assert tokens_per_second(model, cache, absorbed) > 0
    assert expanded.call_count == (0 if absorbed else LAYERS * 3)
    assert cache.get_seq_length() == 7  # untouched: the next repeat starts from the same prompt


def test_the_two_forms_take_turns(quick, monkeypatch):
    turns = []

    def measure(model, cache, absorbed):
        turns.append(absorbed)
        return 3.0 if absorbed else 2.0

    monkeypatch.setattr(kv_cache, "tokens_per_second", measure)
    assert kv_cache.compare_speeds(SIZES) == [(3.0, 2.0)] * 2  # and one more before, to warm up
    assert turns == [False, True, True, False, False, True]


def test_the_ratio_of_speeds_is_the_median_of_pairs():
    shown = kv_cache.format_speeds([(30.0, 10.0), (10.0, 20.0), (40.0, 20.0)])
    assert "30.0 tokens/s absorbed, 20.0 expanded; ratio 2.00 (from 0.50 to 3.00)" in shown


def test_the_command_prints_the_table(tmp_path, quick, capsys):
    kv_cache.main(["--model-config", write_recipe(tmp_path)])
    shown = capsys.readouterr().out
    assert "| mla | 168 | 14.6% | 6.86 |" in shown
    assert "median of 2 pairs" in shown


def test_the_command_fails_when_the_cache_is_too_large(tmp_path, quick, capsys):
    with pytest.raises(SystemExit, match="more than 1/6"):
        kv_cache.main(["--model-config", write_recipe(tmp_path, kv_lora_rank=13)])
    assert "| mla | 204 |" in capsys.readouterr().out
    kv_cache.main(["--model-config", write_recipe(tmp_path, kv_lora_rank=12)])  # 16 of 96 floats are enough


def test_a_missing_recipe_is_an_error_of_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        kv_cache.main(["--model-config", str(tmp_path / "missing.json")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
