"""The step beside other people's decoders: that they are of one size, and that equals are compared."""

import json
import re
import time

import pytest
import torch

from spaceexploreai.benchmarks import peers, train_step
from spaceexploreai.benchmarks.peers import EQUAL, NETWORKS, OURS, Round
from spaceexploreai.benchmarks.train_step import Training
from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig

# No two alike, so that no closed form holds by accident; but heads of one size, which fused attention wants.
LAYERS, DENSE, HIDDEN, HEADS, LATENT, NOPE, ROTARY, VALUE = 4, 1, 48, 6, 10, 12, 4, 16
EXPERTS, CHOSEN, SHARED, WIDTH, DENSE_WIDTH, FEATURES, HORIZONS, LEVELS = 8, 3, 2, 24, 136, 5, 4, 19
SIZES = {
    "num_features": FEATURES,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE_WIDTH,
    "num_hidden_layers": LAYERS,
    "first_k_dense_replace": DENSE,
    "num_attention_heads": HEADS,
    "kv_lora_rank": LATENT,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROTARY,
    "v_head_dim": VALUE,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "n_shared_experts": SHARED,
    "moe_intermediate_size": WIDTH,
    "t2t_num_hidden_layers": 0,
}
TOKENS, CONTEXT = 32, 16


def make_config(**overrides) -> SpaceExploreConfig:
    return SpaceExploreConfig(**{**SIZES, **overrides})


def make_training(name: str, **overrides) -> Training:
    return Training(make_config(**overrides), TOKENS, CONTEXT, NETWORKS[name])


def write_recipe(folder) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(SIZES), encoding="utf-8")
    return str(path)


# --- sizes ---


HEAD_AND_FEATURES = HORIZONS * (2 * HIDDEN + 1 + LEVELS) + (FEATURES + 1) * HIDDEN
NORMS = LAYERS * 2 * HIDDEN + HIDDEN


def parameters_of_deepseek(experts: int) -> int:
    """With so many routed experts a layer (DeepSeek-V2, arXiv 2405.04434, sections 2.1 and 2.2)."""
    query, output = HIDDEN * HEADS * (NOPE + ROTARY), HEADS * VALUE * HIDDEN
    latents = HIDDEN * (LATENT + ROTARY) + LATENT + LATENT * HEADS * (NOPE + VALUE)
    mixture = (SHARED + experts) * 3 * HIDDEN * WIDTH + HIDDEN * EXPERTS
    mlps = DENSE * 3 * HIDDEN * DENSE_WIDTH + (LAYERS - DENSE) * mixture
    return HEAD_AND_FEATURES + NORMS + LAYERS * (query + latents + output) + mlps


def parameters_of_mixtral(experts: int, width: int) -> int:
    """With so many routed experts a layer (Mixtral, arXiv 2401.04088, section 2)."""
    attention = 4 * HIDDEN * HEADS * VALUE
    return HEAD_AND_FEATURES + NORMS + LAYERS * (attention + experts * 3 * HIDDEN * width + HIDDEN * EXPERTS)


@pytest.mark.parametrize("name", [EQUAL, "DeepSeek-V3"])
def test_our_decoder_and_deepseeks_have_the_parameters_of_the_paper(name):
    size = peers.size_of(make_training(name))
    assert (size.parameters, size.active) == (parameters_of_deepseek(EXPERTS), parameters_of_deepseek(CHOSEN))


@pytest.mark.parametrize("dense_width", [136, 520])
def test_mixtral_has_as_many_active_parameters_as_eight_columns_allow(dense_width):
    size = peers.size_of(make_training("Mixtral", intermediate_size=dense_width))
    deepseek = peers.size_of(make_training("DeepSeek-V3", intermediate_size=dense_width))
    experts = NETWORKS["Mixtral"](make_config(intermediate_size=dense_width)).model.decoder.layers[0].mlp.experts
    width = experts.intermediate_dim
    assert (size.parameters, size.active) == tuple(parameters_of_mixtral(n, width) for n in (EXPERTS, CHOSEN))
    assert width % 8 == 0
    assert abs(size.active - deepseek.active) <= 4 * LAYERS * CHOSEN * 3 * HIDDEN


def test_the_front_end_is_in_ours_alone():
    training = make_training(OURS)
    front_end = sum(weight.numel() for name, weight in training.model.named_parameters() if "mscnn" in name)
    size, without = peers.size_of(training), peers.size_of(make_training(EQUAL))
    missing_and_tanh = FEATURES * HIDDEN + 3 * FEATURES
    assert size.active - without.active == size.parameters - without.parameters == front_end + missing_and_tanh


def test_what_is_frozen_does_not_count():
    with_extractor = make_training(OURS, t2t_num_hidden_layers=2)
    assert peers.size_of(with_extractor) == peers.size_of(make_training(OURS))


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Mixtral"])
def test_a_step_is_three_forward_passes_but_for_the_gradient_of_the_features(name):
    grouped, loop = (peers.size_of(make_training(one)) for one in (name, f"{name}, loop over experts"))
    assert grouped.flops.step == 3 * grouped.flops.forward - 2 * TOKENS * FEATURES * HIDDEN
    assert loop == grouped


@pytest.mark.parametrize("name", NETWORKS)
def test_experts_are_computed_as_the_table_says(name):
    network = NETWORKS[name](make_config()).model
    config = getattr(network, "decoder", network).config
    assert config._experts_implementation == ("eager" if "loop" in name else "grouped_mm")


@pytest.mark.parametrize("make", [peers.make_deepseek, peers.make_mixtral])
def test_grouped_products_are_the_librarys_own_choice(make):
    assert make(make_config()).config._experts_implementation == "grouped_mm"


def test_deepseek_computes_what_our_decoder_does():
    ours, theirs = make_training(EQUAL), make_training("DeepSeek-V3")
    loaded = theirs.model.load_state_dict(ours.model.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert all(name.endswith("e_score_correction_bias") for name in loaded.missing_keys)
    theirs.model.model.decoder.config.rope_interleave = False  # another order of the same dimensions
    for batch in (ours.batch, {**ours.batch, "past_values": 3 * ours.batch["past_values"]}):
        actual, expected = ours.model(**batch), theirs.model(**batch)
        for name in ("loss", "aux_loss", "mean", "quantiles"):
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_learns(name):
    training = make_training(name)
    before = training.model(**training.batch).loss.item()
    for _ in range(3):
        training.step()
    assert training.model(**training.batch).loss.item() < before
    peers.forward(training)
    assert training.model.training


# --- times ---


def test_all_take_turns_and_the_first_round_does_not_count(monkeypatch):
    turns = []

    def seconds(function):
        turns.append(function)
        return float(len(turns))

    class Fake:
        def __init__(self, name):
            self.step = name

    monkeypatch.setattr(peers, "seconds", seconds)
    measured = peers.measure({name: Fake(name) for name in "abc"}, rounds=2)
    assert turns[::2] == list("cba" + "abc" + "cba")
    assert measured["a"] == [Round(7.0, 8.0), Round(17.0, 18.0)]


def of_steps(**steps: list[float]) -> dict[str, list[Round]]:
    return {name: [Round(step, 1.0) for step in found] for name, found in steps.items()}


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_times():
    measured = of_steps(ours=[1.0, 2.0, 8.0], theirs=[3.0, 2.0, 4.0]) | {EQUAL: [Round(2.0, 1.0)] * 3}
    sizes = {name: peers.Size(10**7, 10**6, Round(flops, flops)) for name, flops in (("ours", 10**9), ("theirs", 4e9))}
    row = peers.format_part("step", 30, sizes, measured).splitlines()[-1]
    # 3.0, 1.0 and 0.5 times ours, with four times the work; 1.5, 1.0 and 2.0 times our decoder
    assert row == "| theirs | 10.00 | 1.00 | 4.0 | 3.000 | 10 | 1.3 | 1.000 | 0.250 | 1.500 |"


def test_a_peer_is_faster_when_it_is_so_in_nine_of_ten_rounds():
    """Of ten, eight are what equals come to by chance once in eighteen times."""
    measured = {
        EQUAL: [Round(1.0, 1.0)] * 10,
        "lucky": [Round(0.9, 1.0)] * 8 + [Round(1.1, 1.0)] * 2,
        "faster": [Round(0.9, 2.0)] * 9 + [Round(1.9, 2.0)],
    }
    assert peers.faster_peers(measured) == ["step of faster"]


@pytest.mark.parametrize("theirs", [0.5, 2.0])
def test_the_command_fails_beside_a_faster_peer(theirs, tmp_path, monkeypatch, capsys):
    times = {name: [Round(1.0, theirs if name == "Mixtral" else 1.0)] for name in NETWORKS}
    monkeypatch.setattr(peers, "measure", lambda trainings, rounds: times)
    options = ["--model-config", write_recipe(tmp_path), "--tokens", str(TOKENS), "--context", str(CONTEXT)]
    if theirs < 1:
        with pytest.raises(SystemExit, match=r"same shape: forward of Mixtral$"):
            peers.main(options)
    else:
        peers.main(options)
    row = rf"^\| Mixtral \|.* \| {theirs:.3f} \| {TOKENS / theirs:.0f} \|"
    assert re.search(row, capsys.readouterr().out, flags=re.MULTILINE)


def test_the_command_prints_a_table_of_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "faster_peers", lambda measured: [])  # on so few tokens it may be
    options = ["--model-config", write_recipe(tmp_path), "--tokens", str(TOKENS), "--context", str(CONTEXT)]
    peers.main([*options, "--rounds", "1"])
    step, forward = capsys.readouterr().out.split("\n\n")
    for table, head in ((step, "| step of 32 tokens |"), (forward, "| forward of 32 tokens |")):
        assert table.startswith(head)
        rows = [line.split(" | ") for line in table.strip().splitlines()]
        assert [row[0].removeprefix("| ") for row in rows[2:]] == list(NETWORKS)
        assert {len(row) for row in (rows[0], *rows[2:])} == {10}
        assert rows[2][7:9] == ["1.000", "1.000"]


# --- the clock of train_step ---


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_one_thread_is_timed_by_what_it_worked_and_two_by_the_clock(threads):
    slept = []
    for count in (1, 2):
        threads(count)
        slept.append(train_step.seconds(lambda: time.sleep(0.1)))
    assert slept[0] < 0.05 < 0.1 <= slept[1]


def test_the_step_command_sets_its_threads(threads, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_step, "measure", lambda *_: [train_step.Round(1.0, 1.0, 1e9, {"front end": 0.5})])
    monkeypatch.setattr(Training, "count_flops", lambda training: 1)
    options = ["--model-config", write_recipe(tmp_path), "--tokens", str(TOKENS), "--context", str(CONTEXT)]
    train_step.main([*options, "--threads", "2"])
    assert torch.get_num_threads() == 2
    assert "\n| 32 | 2 | given back |" in capsys.readouterr().out


@pytest.mark.parametrize("program", [train_step, peers])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "100"], "tokens must be a multiple of the context, got 100 and 64"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_an_error_of_one_line(program, options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(options)
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == f"error: {message}"
