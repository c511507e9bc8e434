"""The check of the benchmarks' ratios: that they mean what their names say, and what is too low."""

import json

import pytest

from spaceexploreai.benchmarks import check, data, kv_cache, peers, scoring, train_step


def committed() -> dict[str, dict[str, float]]:
    return json.loads(check.EXPECTED.read_text(encoding="utf-8"))


def test_every_ratio_is_committed():
    assert list(committed()) == list(check.RATIOS)
    for entry in committed().values():
        assert set(entry) == {"ratio", "tolerance"}
        assert entry["ratio"] > 0
        assert 0 <= entry["tolerance"] < 1


def test_ratios_are_the_better_the_higher(monkeypatch):
    """The time of the others over ours; ours takes a second of each."""
    measured = {
        peers.OURS: [peers.Round(4.0, 1.0)] * 3,
        peers.EQUAL: [peers.Round(1.0, 1.0)] * 3,
        "DeepSeek-V3": [peers.Round(step, 3.0) for step in (2.0, 1.5, 9.0)],
        "Mixtral": [peers.Round(5.0, 6.0)] * 3,
    }
    monkeypatch.setattr(check, "rounds_beside_peers", lambda: measured)
    monkeypatch.setattr(check, "TOKENS", 64)
    monkeypatch.setattr(train_step, "measure", lambda training, rounds: [train_step.Round(2.0, 1.0, 1.0, {})])
    monkeypatch.setattr(train_step.Training, "count_flops", lambda training: 1)
    monkeypatch.setattr(kv_cache, "compare_sizes", lambda recipe: {"mla": 2.0, "gqa": 6.0, "mha": 12.0})
    monkeypatch.setattr(kv_cache, "compare_speeds", lambda recipe: [(30.0, 10.0), (10.0, 5.0), (9.0, 1.0)])
    monkeypatch.setattr(data, "compare_columns", lambda sample: {"compute_indicators": 2.0, "df.ta": 14.0})
    monkeypatch.setattr(scoring, "evaluate", lambda recipe, tickers, years: ({"ratio": 12.0}, 100))
    assert {name: ratio() for name, ratio in check.RATIOS.items()} == {
        "utilisation of a 27m step": 0.5,
        "step, DeepSeek-V3 over our decoder": 2.0,
        "step, Mixtral over our decoder": 5.0,
        "step, our decoder over all of ours": 0.25,
        "forward, DeepSeek-V3 over our decoder": 3.0,
        "forward, Mixtral over our decoder": 6.0,
        "bytes cached, mha over mla": 6.0,
        "decoding speed, absorbed over expanded": 3.0,
        "indicators, df.ta over ours": 7.0,
        "forecasts, a window each day over shared ones": 12.0,
    }


def test_peers_are_measured_once_for_all_their_ratios(monkeypatch):
    calls = []
    monkeypatch.setattr(train_step, "Training", lambda *arguments: arguments[-1])
    monkeypatch.setattr(peers, "measure", lambda trainings, rounds: calls.append((list(trainings), rounds)) or {})
    check.rounds_beside_peers.cache_clear()
    assert check.rounds_beside_peers() is check.rounds_beside_peers()
    check.rounds_beside_peers.cache_clear()
    assert calls == [([peers.OURS, peers.EQUAL, "DeepSeek-V3", "Mixtral"], check.ROUNDS)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command, with one committed ratio of 2 that may lose a quarter, and what is measured of it."""
    monkeypatch.setattr(check, "EXPECTED", tmp_path / "expected.json")
    entry = {"ratio": 2.0, "tolerance": 0.25}
    check.EXPECTED.write_text(json.dumps({"one": entry, "gone": entry}), encoding="utf-8")

    def with_ratios(*options: str, **ratios: float):
        monkeypatch.setattr(check, "RATIOS", {name: lambda ratio=ratio: ratio for name, ratio in ratios.items()})
        check.main(list(options))

    return with_ratios


@pytest.mark.parametrize("now", [1.5, 1.4996, 2.0, 40.0])
def test_what_is_within_its_tolerance_or_higher_passes(now, run, capsys):
    run(one=now)
    assert f"| one | 2.000 | {now:.3f} | {now / 2 - 1:+.1%} | 25% |\n" in capsys.readouterr().out


@pytest.mark.parametrize("now", [1.4994, 0.1])
def test_what_fell_further_fails(now, run, capsys):
    with pytest.raises(SystemExit, match=r"^lower than committed: one$"):
        run(one=now, other=0.1)
    assert "| one | 2.000 | " in capsys.readouterr().out
    assert committed()["one"]["ratio"] == 2.0


def test_what_is_new_is_shown_and_no_failure(run, capsys):
    run(one=2.0, other=0.1)
    assert "| other | new | 0.100 | | |" in capsys.readouterr().out


def test_an_update_keeps_tolerances_and_drops_what_is_gone(run):
    run("--update", one=0.12345, other=3.0)
    assert committed() == {"one": {"ratio": 0.123, "tolerance": 0.25}, "other": {"ratio": 3.0, "tolerance": 0.1}}
    run(one=0.12345, other=2.8)
    with pytest.raises(SystemExit, match="other"):
        run(one=0.12345, other=2.6)
