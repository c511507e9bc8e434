"""The benchmarks: that they measure what they say, against closed forms."""

import json
import re
import tempfile
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_market

from spaceexploreai.benchmarks import ablation, data, kv_cache, train_step
from spaceexploreai.benchmarks.kv_cache import RECIPE, bytes_per_token, fill_cache, make_model, tokens_per_second
from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.prices import write_table
from spaceexploreai.data.stocks import open_stocks
from spaceexploreai.modeling_spaceexplore import SpaceExploreLatentAttention
from spaceexploreai.scripts import build_dataset

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
    for name, number in (("CONTEXT", 7), ("SHORT", 3), ("LONG", 9), ("NEW_TOKENS", 3), ("REPEATS", 2)):
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
    pairs = [(30.0, 10.0), (10.0, 20.0), (40.0, 20.0)]
    shown = kv_cache.format_speeds("one path", ("absorbed", "expanded"), pairs)
    assert shown.endswith("30.0 tokens/s absorbed, 20.0 expanded; ratio 2.00 (from 0.50 to 3.00)")


def test_the_command_prints_the_table(tmp_path, quick, capsys):
    kv_cache.main(["--model-config", write_recipe(tmp_path)])
    shown = capsys.readouterr().out
    assert "| mla | 168 | 14.6% | 6.86 |" in shown
    assert "tokens/s absorbed" in shown
    assert "tokens/s after 3 steps" in shown


def test_decoding_that_slows_down_with_the_context_is_an_error(tmp_path, quick, monkeypatch):
    def measure(model, cache, absorbed):
        return 3.1 / (1 + cache.get_seq_length() // 9)  # half as fast after nine steps

    monkeypatch.setattr(kv_cache, "tokens_per_second", measure)
    with pytest.raises(SystemExit, match=r"a token after 9 steps takes more than 1\.5 times as long as after 3"):
        kv_cache.main(["--model-config", write_recipe(tmp_path)])


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


# --- the data path ---


@pytest.fixture(scope="module")
def bars():
    return make_market(tickers=1, days=400)


@pytest.fixture(scope="module")
def both_sides(bars):
    return [side(bars) for side in list(data.sides().values())[:2]]


def test_the_library_writes_every_column(bars, both_sides):
    ours, theirs = both_sides
    data.refuse_differences("T0", ours, theirs)
    assert sorted(theirs) == sorted(data.COLUMNS)
    for column in theirs.values():
        assert np.isfinite(column.iloc[-100:]).all()
    pd.testing.assert_frame_equal(bars, make_market(tickers=1, days=400))  # nothing was appended


@pytest.mark.parametrize("name", data.COLUMNS)
def test_another_value_is_refused(both_sides, name):
    ours, theirs = both_sides
    for planted in (theirs[name] + 1e-5 * np.maximum(1, theirs[name].abs()), theirs[name] * np.nan):
        with pytest.raises(SystemExit, match=rf"^T0: {name} of df\.ta "):
            data.refuse_differences("T0", ours, {**theirs, name: planted})
    rounded = theirs[name] + 1e-8
    rounded.iloc[:300] = np.nan  # as of a longer warm-up
    data.refuse_differences("T0", ours, {**theirs, name: rounded})


def test_sides_take_turns_and_the_first_call_does_not_count(monkeypatch):
    clock, turns = [0.0], []

    def side(name, cost):
        def run(bars):
            turns.append((name, bars["ticker"][0]))
            clock[0] += cost
            return name

        return run

    monkeypatch.setattr(data, "sides", lambda: {"ours": side("ours", 1.0), "theirs": side("theirs", 4.0)})
    monkeypatch.setattr(data.time, "process_time", lambda: clock[0])
    compared = []
    monkeypatch.setattr(data, "refuse_differences", lambda *arguments: compared.append(arguments))
    sample = [pd.DataFrame({"ticker": [name]}) for name in ("A", "B")]
    assert data.compare_columns(sample) == {"ours": 2.0, "theirs": 8.0}
    assert turns[2:] == [("ours", "A"), ("theirs", "A"), ("ours", "B"), ("theirs", "B")]
    assert compared == [("A", "ours", "theirs"), ("B", "ours", "theirs")]


def test_columns_are_shown_over_ours():
    shown = data.format_columns({"compute_indicators": 2.0, "df.ta": 9.0}, [pd.DataFrame(index=range(18))] * 3)
    assert "| compute_indicators | 2.00 | 27 | 1.00 |" in shown
    assert "| df.ta | 9.00 | 6 | 4.50 |" in shown


def test_the_sample_is_of_all_parts_of_the_market():
    market = make_market(tickers=6, days=data.LEAST_BARS)
    market = market[(market["ticker"] != "T0") | (market["date"] > market["date"].iloc[0])]
    assert [bars["ticker"].unique().tolist() for bars in data.evenly_spaced(market, 3)] == [["T1"], ["T3"], ["T5"]]
    assert len(data.evenly_spaced(market, 40)) == 5
    assert all(bars.index[0] == 0 and len(bars) == data.LEAST_BARS for bars in data.evenly_spaced(market, 5))
    with pytest.raises(ValueError, match="no ticker has 300 bars"):
        data.evenly_spaced(market[market["ticker"] == "T0"], 1)


LINUX = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc")
HOLD = "import mmap, subprocess, sys, time\n{}\ntime.sleep(1.5)"
OWN = "held = b'1' * 150_000_000"
MAPPED = "file = open({!r}, 'rb'); held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); held[::4096]"


@LINUX
def test_memory_is_that_of_the_process_and_its_workers(tmp_path):
    (tmp_path / "mapped").write_bytes(b"1" * 150_000_000)
    worker = f"subprocess.run([sys.executable, '-c', {HOLD.format(OWN)!r}])"
    peaks = [
        data.in_new_process(exec, HOLD.format(what))[1]
        for what in (OWN, MAPPED.format(str(tmp_path / "mapped")), worker)
    ]
    held = 150_000_000 / 2**20
    for (resident, anonymous), mine in zip(peaks, (held, 0, held), strict=True):
        assert held < resident < held + 60
        assert mine < anonymous < mine + 60


@LINUX
def test_sizes_are_read_by_name():
    sizes = data.kibibytes("/proc/self/status")
    assert sizes["VmHWM"] >= sizes["VmRSS"] > 10_000
    assert "Name" not in sizes


def test_what_fails_in_the_process_fails_here():
    with pytest.raises(ZeroDivisionError):
        data.in_new_process(divmod, 1, 0)


def test_every_window_is_drawn_once_in_batches(monkeypatch):
    drawn = []
    monkeypatch.setattr(data, "collate_windows", drawn.append)
    speeds = data.draw(range(200), seed=0)
    assert [len(batch) for batch in drawn] == [64, 64, 64, 8]
    order = list(chain(*drawn))
    assert sorted(order) == list(range(200)) != order
    assert min(speeds) > 0
    monkeypatch.setattr(data, "DRAWN_WINDOWS", 64)
    data.draw(range(200), seed=1)
    assert [len(batch) for batch in drawn[4:]] == [64]
    assert drawn[4] != order[:64]


@LINUX
def test_the_command_builds_and_reopens_a_cache_of_its_own(tmp_path, monkeypatch, capsys):
    write_table(make_market(tickers=2, days=400), tmp_path / "market.parquet")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    data.main(["--prices", str(tmp_path / "market.parquet"), "--sample", "1"])
    assert list((tmp_path / "temporary").iterdir()) == []
    shown = capsys.readouterr().out
    assert "2 tickers, 800 bars, 64 columns" in shown
    for stage in ("indicators", "series", "sft", "together"):
        assert re.search(rf"^\| {stage} \| \d+\.\d \| \d+\.\d \| \d+ \|$", shown, flags=re.MULTILINE)
    # 320 days train, the first 20 without a volatility and the last 10 without a label: 19 windows, 16 steps apart.
    assert "to the first of 38 windows" in shown
    sizes = re.search(r"the builder (\d+) MiB; .* once, (\d+) MiB, of which (\d+) MiB", shown)
    most, resident, anonymous = map(int, sizes.groups())
    assert 0 < anonymous < resident <= most + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample", "0"], "error: sample must be at least 1, got 0"),
        (["--tickers", "FB"], "error: no ticker has 300 bars, which the columns need"),
    ],
)
def test_a_mistake_is_an_error_of_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        data.main(options)
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == message


# --- train_step ---


def products_of_a_step(config: SpaceExploreConfig, context: int) -> int:
    """Multiplications and additions a token, forward and backward: 6 for each weight that the token meets."""
    model, heads, width = (
        config.hidden_size,
        config.num_attention_heads,
        config.mscnn_hidden_size or config.hidden_size,
    )
    query, horizons = config.qk_nope_head_dim + config.qk_rope_head_dim, len(config.horizons)
    embedding = 5 / 3 * config.num_features * model  # whether a value is missing gets no gradient
    branches = config.mscnn_num_branches * (width // config.mscnn_num_branches) ** 2 * config.mscnn_kernel_size
    wavelet = 2 / 3 * config.wavelet_levels * width * 8  # the taps of db4 get no gradient
    front_end = embedding + config.mscnn_num_blocks * (2 * model * width + branches + wavelet)
    latent = model * (config.kv_lora_rank + config.qk_rope_head_dim)
    expanded = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    scores = heads * (context + 1) / 2 * (query + config.v_head_dim)
    attention = model * heads * query + latent + expanded + scores + heads * config.v_head_dim * model
    expert = 3 * model * config.moe_intermediate_size
    chosen = config.n_shared_experts + config.num_experts_per_tok
    sparse = config.num_hidden_layers - config.first_k_dense_replace
    dense = config.first_k_dense_replace * 3 * model * config.intermediate_size
    mlps = dense + sparse * (chosen * expert + model * config.n_routed_experts)
    last = model * horizons * 2  # a mean and a stretch
    return round(6 * (front_end + config.num_hidden_layers * attention + mlps + last))


# Heads of one size, without which torch has no fused attention on CPU; else no two alike.
STEP_SIZES = {**SIZES, "v_head_dim": 16, "mscnn_hidden_size": 36, "mscnn_kernel_size": 5, "wavelet_levels": 2}


def make_training(**overrides) -> train_step.Training:
    return train_step.Training(SpaceExploreConfig(**{**STEP_SIZES, **overrides}), tokens=32, context=16)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"num_experts_per_tok": 3, "n_shared_experts": 2}, {"first_k_dense_replace": 2, "mscnn_num_blocks": 1}],
)
def test_the_products_of_a_step_are_those_of_the_formula(overrides):
    training = make_training(**overrides)
    assert training.count_flops() == 32 * products_of_a_step(training.model.config, 16)


def test_the_products_are_those_of_the_model_whatever_runs_it():
    training = make_training()
    expected = training.count_flops()
    training.model.set_experts_implementation("eager")  # one by one, which the counter of torch knows
    assert training.count_flops() == expected


def test_a_token_of_the_27m_recipe_takes_six_operations_a_weight_that_it_meets():
    config = SpaceExploreConfig(**json.loads(train_step.RECIPE.read_text(encoding="utf-8")))
    flops = train_step.Training(config, tokens=64, context=64).count_flops()
    assert flops == 64 * products_of_a_step(config, 64) == pytest.approx(64 * 6 * 12.2e6, rel=0.01)


def test_utilisation_is_the_median_of_the_rounds_ratios():
    rounds = [train_step.Round(step, 0.1, speed, {}) for step, speed in ((2.0, 50.0), (1.0, 50.0), (4.0, 10.0))]
    assert train_step.utilisation(rounds, flops=80) == pytest.approx(1.6)  # of 0.8, 1.6 and 2.0


def test_the_parts_leave_nothing_out_but_norms():
    training = make_training()
    training.backward()
    whole = {name: weight.grad for name, weight in training.model.named_parameters() if weight.grad is not None}
    training.optimizer.zero_grad()
    parts = list(train_step.parts_of(training).values())
    for run in chain(*parts[:-2]):  # but clipping and the optimiser, which change the gradients
        run()
    alone = {name: weight.grad for name, weight in training.model.named_parameters() if weight.grad is not None}
    left_out = {name for name in whole if name not in alone}
    assert left_out == {name for name in whole if re.search(r"model\.(layers\.\d+\.\w+_layernorm|norm)\.", name)}
    torch.testing.assert_close(alone["quantile_head.weight"], whole["quantile_head.weight"])


def test_the_clock_of_products_counts_those_alone():
    def run(tokens):
        factor = torch.ones(400, 400)
        with train_step.ProductClock() as products:
            for _ in range(50):
                factor = factor @ factor / 400 if tokens else torch.sin(factor)
        return products.seconds

    assert run(False) == 0 < run(True)


@pytest.mark.parametrize(("tokens", "step", "fails"), [(64, 9.0, False), (2048, 9.0, True), (2048, 1e-9, False)])
def test_the_step_command_fails_below_three_quarters(tokens, step, fails, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_step, "measure", lambda *_: [train_step.Round(step, step, 1e9, {"front end": step / 4})])
    arguments = ["--model-config", write_recipe(tmp_path), "--tokens", str(tokens)]
    if fails:
        with pytest.raises(SystemExit, match=r"below 0\.75"):
            train_step.main(arguments)
    else:
        train_step.main(arguments)
    assert "| front end | 25.0% |" in capsys.readouterr().out


# --- ablation ---


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_table(make_market(tickers=2), folder / "market.parquet")
    options = ["--prices", str(folder / "market.parquet"), "--output-dir", str(folder / "stocks"), "--config", "sft"]
    build_dataset.main([*options, "--stride", "32"])
    return folder / "stocks"


def test_networks_and_their_averages_are_scored_alike(dataset, capsys, tmp_path):
    runs = tmp_path / "runs.jsonl"
    options = ["--steps", "2", "--batch-size", "4", "--seeds", "0", "1", "--variants", "full", "dense for moe"]
    decays = ["--decays", "0", "0.9"]
    ablation.main(["--dataset", str(dataset), *options, *decays, "--output", str(runs)])
    found = pd.read_json(runs, lines=True).set_index(["variant", "seed"]).drop(columns="parameters")
    assert len(found) == 12
    assert found.stack().between(-100, 100).all()
    for name in ("full", "dense for moe"):
        for seed in (0, 1):  # without decay, an average is the last weights
            last, same, slow = (found.loc[(name + which, seed)] for which in ("", ", average 0.0", ", average 0.9"))
            assert same.tolist() == pytest.approx(last.tolist(), abs=1e-6)
            assert (slow - last).abs().max() > 1e-6
    assert "dense for moe, average 0.9" in capsys.readouterr().out


def test_the_last_position_alone_keeps_its_labels(dataset):
    windows = open_stocks(str(dataset)).train
    whole, last = windows[0], ablation.LastPositionOnly(windows)[0]
    assert (last["labels"][:-1] == -100).all()
    assert last["labels"][-1].tolist() == whole["labels"][-1].tolist()
    assert (whole["labels"][:-1] != -100).any()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["--variants", "full", "t2t"], "the variant t2t needs an --extractor"), (["--variants", "none"], "got 'none'")],
)
def test_the_ablation_refuses(dataset, options, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        ablation.main(["--dataset", str(dataset), *options])
    assert complaint in capsys.readouterr().err
