"""The benchmark of inference: its sides forecast, and the same where they should; it measures what it says."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import RECIPE, make_market
from torch import nn

from spaceexploreai.benchmarks import inference, train_step
from spaceexploreai.benchmarks.inference import BOLT, FEW, GENERATE, MANY, NO_CACHE, OURS, PEERS, Network
from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.prices import write_table
from spaceexploreai.modeling_spaceexplore import SpaceExploreForCausalLM
from spaceexploreai.paths_spaceexplore import sample_paths
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer


def tiny(**fields) -> SpaceExploreConfig:
    return SpaceExploreConfig(**{**json.loads((RECIPE / "config.json").read_text(encoding="utf-8")), **fields})


# --- paths ---


@pytest.fixture(scope="module")
def language() -> tuple[SpaceExploreForCausalLM, SpaceExploreTokenizer]:
    """With weights so large that a day's return depends on all that was before."""
    torch.manual_seed(0)
    tokenizer = SpaceExploreTokenizer()
    model = SpaceExploreForCausalLM(tiny(num_features=5, vocab_size=len(tokenizer))).eval()
    for weight in model.parameters():
        weight.data *= 6 if weight.ndim > 1 else 1
    return model, tokenizer


def histories(seed: int) -> dict[str, torch.Tensor]:
    """One padded on the left, one with a halt."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = mask[1, 20:26] = 0
    values = torch.randn(2, 40, 5, generator=generator)
    return {"past_values": values, "attention_mask": mask, "scale": 0.01 + torch.rand(2, 40, generator=generator)}


@pytest.mark.parametrize("seed", range(3))
def test_paths_without_a_cache_are_those_of_the_shared_prefill(language, seed):
    shocks = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(seed + 10))
    found = inference.paths_without_cache(*language, histories(seed), shocks)
    np.testing.assert_array_equal(sample_paths(*language, histories(seed), shocks), found)
    other = {**histories(seed), "past_values": histories(seed + 1)["past_values"]}
    assert (inference.paths_without_cache(*language, other, shocks) != found).mean() > 0.5


def test_every_day_depends_on_the_path_before(language):
    """Else a decoder that forgets it would pass for one that does not."""
    shocks = torch.randn(1, 8, 6)
    one = {name: values[1:] for name, values in histories(0).items()}
    found = inference.paths_without_cache(*language, one, shocks)
    shocks[..., 0] += 1
    changed = inference.paths_without_cache(*language, one, shocks) != found
    assert changed[..., 1:].any(axis=(0, 1)).all()


def test_the_library_draws_as_many_returns(language):
    _, tokenizer = language
    torch.manual_seed(0)
    tokens = inference.paths_of_generate(
        *language, {name: one[:1] for name, one in histories(0).items()}, torch.zeros(1, 6, 5)
    )
    assert tokens.shape == (6, 5)
    assert set(tokens.flatten().tolist()) <= set(tokenizer.return_token_ids)
    assert len(tokens.unique(dim=0)) == 6


def test_few_paths_are_measured_by_all_sides_and_many_by_the_fast(monkeypatch):
    asked = []

    def side(name):
        return lambda model, tokenizer, context, shocks: asked.append((name, *context["scale"].shape, *shocks.shape))

    monkeypatch.setattr(inference, "SIDES", {name: side(name) for name in inference.SIDES})
    monkeypatch.setattr(inference, "take_turns", lambda runs, rounds: [run() for run in runs.values()])
    inference.measure_paths(tiny(), context=11, rounds=1)
    few = [(name, 1, 11, 1, FEW, 20) for name in (OURS, GENERATE, NO_CACHE)]
    assert asked == few + [(name, 1, 11, 1, MANY, 20) for name in (OURS, GENERATE)]


@pytest.mark.parametrize(("slowest", "fails"), [(21.0, False), (19.0, True)])
def test_the_goal_of_paths_is_that_of_the_measured_ones(monkeypatch, capsys, slowest, fails):
    few, many = {OURS: 1.0, GENERATE: 3.0, NO_CACHE: slowest}, {OURS: 4.0, GENERATE: 20.0}
    monkeypatch.setattr(inference, "measure_paths", lambda *_: {FEW: [few], MANY: [many]})
    if fails:
        with pytest.raises(SystemExit, match=r"^10 paths: 19\.0 and not 20 times"):
            inference.main(["--parts", "paths"])
    else:
        inference.main(["--parts", "paths"])
    shown = capsys.readouterr().out
    assert "| 100 | generate | 20.00 | 5.0 | 5.0 |" in shown
    assert f"| 100 | no cache: not measured, 10 times 10 | {10 * slowest:.2f} |" in shown
    assert f"| {10 * slowest / 4:.1f} |" in shown


# --- networks ---


@pytest.mark.parametrize(
    ("name", "millions"), [("chronos-bolt-tiny", 9), (BOLT, 48), ("chronos-2", 120), ("timesfm-2.5", 231)]
)
def test_peers_have_the_published_size(name, millions):
    """Model cards of amazon/chronos-bolt-*, amazon/chronos-2 and google/timesfm-2.5-200m-transformers."""
    with torch.device("meta"):
        model = PEERS[name]().model
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)


@pytest.mark.parametrize(
    ("name", "context", "horizon", "levels"), [("chronos-bolt-tiny", 40, 64, 9), ("chronos-2", 64, 16, 21)]
)
def test_chronos_forecasts_quantiles(name, context, horizon, levels):
    torch.manual_seed(0)
    with torch.inference_mode():
        quantiles = PEERS[name]().start(2, context)().quantile_preds
    assert quantiles.shape == (2, levels, horizon)
    assert quantiles.isfinite().all()


# Weights that a token meets: of a layer those of attention and MLP; of the embedding those of a residual block.
BOLT_LAYER = 4 * 512 * 512 + 2 * 512 * 2048 + 2 * 512 * 512  # with the decoder's keys and values
CHRONOS2_LAYER = 2 * 4 * 768 * 768 + 2 * 768 * 3072  # of time and of groups


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        (BOLT, 6 * BOLT_LAYER + 32 * 2048 + 2048 * 512 + 32 * 512),
        ("chronos-2", 12 * CHRONOS2_LAYER + 48 * 3072 + 3072 * 768 + 48 * 768),
    ],
)
def test_chronos_reads_sixteen_days_as_a_token(name, weights):
    """Two operations for each weight, and some for the scores of attention."""
    network = PEERS[name]()
    operations = [inference.flops_of_one(network, context) for context in (64, 128)]
    assert operations[1] - operations[0] == pytest.approx(4 * 2 * weights, rel=0.01)


def test_timesfm_reads_the_whole_context(monkeypatch):
    small = partial(inference.TimesFm2_5Config, num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=16)
    monkeypatch.setattr(inference, "TimesFm2_5Config", partial(small, num_attention_heads=2, num_key_value_heads=2))
    values = torch.randn(2, 40)
    torch.manual_seed(0)
    network = PEERS["timesfm-2.5"]()

    @torch.inference_mode()
    def forecast(values):
        monkeypatch.setattr(inference, "make_values", lambda *_: values)
        return network.start(2, 40)().full_predictions

    assert forecast(values).shape == (2, 128, 10)
    values_of_one_day = values.index_fill(1, torch.tensor([0]), 5.0)
    assert not torch.allclose(forecast(values_of_one_day), forecast(values))


def test_the_next_day_is_that_of_the_whole_pass():
    networks = inference.make_ours(tiny(), "tiny")
    runs = []
    for network in networks.values():
        torch.manual_seed(3)
        runs.append(network.start(3, 30))
    whole, next_day = runs
    with torch.inference_mode():
        expected = whole().quantiles[:, -1:]
        for _ in range(2):  # the first leaves the cache as it was
            torch.testing.assert_close(next_day().quantiles, expected, rtol=1e-4, atol=1e-6)
    assert expected.shape[:2] == (3, 1)


def test_many_series_go_in_batches():
    started, ran = [], []

    def start(series, context):
        started.append((series, context))
        return lambda: ran.append(series)

    run = inference.in_batches(Network(nn.Identity(), start), 70, 64)
    run()
    run()
    assert ran == [32, 32, 6] * 2
    assert sorted(started) == [(6, 64), (32, 64)]


def test_operations_are_those_of_one_series():
    model = nn.Linear(7, 5)
    network = Network(model, lambda series, context: partial(model, torch.ones(series, context, 7)))
    assert inference.flops_of_one(network, 11) == 2 * 11 * 7 * 5


def test_a_day_takes_two_operations_for_each_weight_that_it_meets():
    """docs/architecture.md: 12.2 of the 27 million; the next day, once the front end has read the history again."""
    config = train_step.read_config(train_step.RECIPE)
    whole, next_day = inference.make_ours(config, "27m").values()
    assert inference.flops_of_one(whole, 64) == pytest.approx(64 * 2 * 12.2e6, rel=0.01)
    assert inference.flops_of_one(next_day, 64) < 0.06 * inference.flops_of_one(whole, 64)


def test_sides_take_turns_and_the_first_round_does_not_count(monkeypatch):
    now, turns = [0.0], []

    def side(name, cost):
        def run():
            turns.append(name)
            now[0] += cost * len(turns)

        return run

    monkeypatch.setattr(train_step, "clock", lambda: now[0])
    rounds = inference.take_turns({"a": side("a", 1.0), "b": side("b", 2.0), "c": side("c", 3.0)}, 2)
    assert "".join(turns) == "abccbaabc"
    assert rounds == [{"c": 12.0, "b": 10.0, "a": 6.0}, {"a": 7.0, "b": 16.0, "c": 27.0}]


def test_the_speedup_is_the_median_of_ratios_within_a_round():
    rounds = [{"a": 1.0, "b": 4.0}, {"a": 10.0, "b": 11.0}, {"a": 2.0, "b": 12.0}]
    assert inference.speedup(rounds, "a", "b") == 4.0  # of 4, 1.1 and 6, where 5.5 is the ratio of the medians
    assert inference.typical(rounds, "b") == 11.0


@pytest.fixture
def stub(monkeypatch) -> Network:
    """A quick network in the place of the published one, and times as if it took two seconds."""
    network = Network(nn.Linear(3, 4), lambda series, context: partial(torch.ones, series))
    monkeypatch.setitem(PEERS, BOLT, lambda: network)
    seconds = {"tiny": 1.5, "tiny, next day": 0.5, BOLT: 2.0}
    monkeypatch.setattr(inference, "take_turns", lambda runs, rounds: [{name: seconds[name] for name in runs}])
    return network


def test_the_table_of_networks_and_the_goal(stub, capsys):
    options = ["--parts", "networks", "--model-config", str(RECIPE / "config.json")]
    with pytest.raises(SystemExit, match=r"^3 x 16: 1\.33 and not 1\.5 times as many as chronos-bolt-small$"):
        inference.main([*options, "--series", "3", "--context", "16", "--peers", BOLT])
    head, _, *rows, _ = capsys.readouterr().out.splitlines()
    cells = [row.strip("| ").split(" | ") for row in (head, *rows)]
    assert cells[0][2:] == [
        "network",
        "M parameters",
        "GFLOP a series",
        "series/s",
        "tiny over it",
        "next day over it",
    ]
    assert [row[:3] for row in cells[1:]] == [["3", "16", name] for name in ("tiny", "tiny, next day", BOLT)]
    assert [row[5:] for row in cells[1:]] == [
        ["2.0", "1.00", "3.00"],
        ["6.0", "0.33", "1.00"],
        ["1.5", "1.33", "4.00"],
    ]
    inference.main([*options, "--series", "1", "--context", "16", "--peers"])  # without what the goal is about


def test_the_goal_is_met_at_one_and_a_half_times(stub, monkeypatch):
    rounds = [{"tiny": 1.0, "tiny, next day": 9.0, BOLT: 1.5}]
    monkeypatch.setattr(inference, "take_turns", lambda runs, count: rounds)
    options = ["--parts", "networks", "--model-config", str(RECIPE / "config.json"), "--peers", BOLT]
    inference.main([*options, "--series", "1", "--context", "16"])


# --- start ---


def test_a_new_process_forecasts_from_the_folder_alone(tmp_path, monkeypatch):
    folder, prices = tmp_path / "model", tmp_path / "prices.parquet"
    folder.mkdir()
    inference.make_checkpoint(tiny(), folder)
    write_table(make_market(tickers=3, days=120), prices)
    checks = ("'spaceexploreai' not in sys.modules", "set(table['ticker']) == {'T0'}", "len(inputs['scale']) == 3")
    monkeypatch.setattr(inference, "CHILD", "\nassert ".join((inference.CHILD, *checks)))
    stages, market = inference.start_process(folder, prices, tmp_path / "modules")
    assert stages.shape == (len(inference.STAGES), 2)
    assert ((stages > 0) & (stages < 300)).all()
    assert stages[0, 0] > 0.5  # torch and transformers
    assert market.keys() == {"whole", "features", "network"}
    assert min(market.values()) > 0
    assert any((tmp_path / "modules").rglob("pipeline_spaceexplore.py"))


def test_what_the_new_process_says_is_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "CHILD", "import sys; raise SystemExit('no model at ' + sys.argv[1])")
    with pytest.raises(ValueError, match=r"empty does not forecast: no model at .*empty$"):
        inference.start_process(tmp_path / "empty", tmp_path, tmp_path)


def test_stages_and_parts_are_medians_of_the_starts(monkeypatch, capsys, tmp_path):
    def start(cpu, whole):
        stages = np.outer([4 * cpu, cpu, cpu / 2, 0.1], [1, 2])
        return inference.Start(stages, {"whole": whole, "features": 2.0, "network": 5.0})

    starts = iter([start(9.0, 90.0), start(1.0, 9.0), start(3.0, 10.0), start(2.0, 17.0)])
    folders = []
    monkeypatch.setattr(inference, "start_process", lambda folder, *_: folders.append(folder) or next(starts))
    inference.main(["--parts", "start", "--rounds", "3", "--model", str(tmp_path)])
    shown = capsys.readouterr().out
    assert folders == [tmp_path] * 4  # the first of which copies the code and does not count
    assert "| imports | 8.00 | 16.00 |" in shown
    assert "| second forecast | 0.10 | 0.20 |" in shown
    assert "| to the first forecast | 11.00 | 22.00 |" in shown
    assert "| pipeline | 10.00 | 50.0 | 100% |" in shown
    assert "| features | 2.00 | 250.0 | 20% |" in shown
    assert "| network | 5.00 | 100.0 | 50% |" in shown
    assert "| dates, table, batches | 3.00 | 166.7 | 30% |" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--series", "1", "0"], "--series must be at least 1, got 0"),
        (["--paths-context", "-3"], "--paths-context must be at least 1, got -3"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--peers", "moirai"], "argument --peers: invalid choice: 'moirai'"),
    ],
)
def test_a_mistake_is_an_error_of_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        inference.main(options)
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip().startswith(f"error: {message}")
