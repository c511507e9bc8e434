"""Several processes, here and on paper: the cost model against what is counted, and who waits for whom."""

from functools import cache

import pytest
import torch
from torch import distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from spaceexploreai.benchmarks import scaling
from spaceexploreai.benchmarks.scaling import Cost, Machine, Process, Round, cost_model
from spaceexploreai.benchmarks.train_step import RECIPE, Training, read_config
from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig

CONTEXT = 64
SLOW = Machine(flops=1e9, memory=1e8, link=1e7)
TINY = {
    "num_features": 5,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 16,
    "moe_intermediate_size": 24,
    "t2t_num_hidden_layers": 0,
}
# Each makes another term of the formulas a large one.
SHAPES = {
    "27m": {},
    "experts": {"num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 0},
    "dense": {"first_k_dense_replace": 4},
    "heads": {"num_attention_heads": 16, "num_hidden_layers": 6, "intermediate_size": 64, "moe_intermediate_size": 64},
    "latents": {"kv_lora_rank": 512, "intermediate_size": 64, "moe_intermediate_size": 64},
    "front end": {"mscnn_num_blocks": 4, "mscnn_hidden_size": 512, "num_hidden_layers": 1},
}


@cache
def make_training(shape: str) -> Training:
    return Training(SpaceExploreConfig(**read_config(RECIPE).to_dict() | SHAPES[shape]), 2 * CONTEXT, CONTEXT)


def make_cost(training: Training, gpus: int = 1, machine: Machine = SLOW) -> Cost:
    return cost_model(training.model.config, 2 * CONTEXT, CONTEXT, gpus, machine, width=4)


# --- on paper ---


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_are_those_that_torch_counts(shape):
    """Within what the front end's first layer, the wavelet, norms and biases are."""
    training = make_training(shape)
    assert make_cost(training).flops == pytest.approx(training.count_flops(), rel=0.02)


def bytes_kept(training: Training) -> int:
    """Of what the forward pass leaves behind, beside weights and batch."""
    known = {
        tensor.untyped_storage().data_ptr() for tensor in (*training.model.parameters(), *training.batch.values())
    }
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other gets its place
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = training.model(**training.batch).loss
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known)


@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_those_that_the_backward_pass_finds(shape):
    training = make_training(shape)
    assert make_cost(training).activations == pytest.approx(bytes_kept(training), rel=0.04)


@pytest.mark.parametrize("shape", ["27m", "experts"])
def test_states_are_those_of_the_optimiser(shape):
    training = make_training(shape)
    training.step()
    trained = [weight for weight in training.model.parameters() if weight.requires_grad]
    moments = [training.optimizer.state[weight][name] for weight in trained for name in ("exp_avg", "exp_avg_sq")]
    held = 2 * sum(weight.nbytes for weight in trained) + sum(moment.nbytes for moment in moments)
    cost = make_cost(training)
    assert cost.states == held
    assert cost.parameters == sum(weight.numel() for weight in trained)


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_a_ring_sends_what_it_is_said_to(gpus):
    """Step by step: each hands on one part, first added up, then whole."""
    parts = torch.randn(gpus, gpus, 5, dtype=torch.float64)  # of each GPU
    total, sent = parts.sum(0), 0
    for turn in range(2 * (gpus - 1)):
        moved = [(gpu, (gpu - turn) % gpus) for gpu in range(gpus)]
        before = parts.clone()
        for gpu, part in moved:
            neighbour = (gpu + 1) % gpus
            whole = turn >= gpus - 1
            parts[neighbour, part] = before[gpu, part] + (0 if whole else before[neighbour, part])
        sent += parts[0, 0].nbytes
    torch.testing.assert_close(parts, total.expand(gpus, -1, -1))
    assert scaling.ring(parts[0].nbytes, gpus) == pytest.approx(sent)


def test_a_step_is_the_slower_of_products_and_memory_and_then_the_gradients():
    cost = Cost(1, 1, 1.0, 1.0, 1.0, compute=3.0, memory=2.0, all_reduce=1.0)
    assert (cost.alone, cost.step, cost.efficiency) == (3.0, 4.0, 0.75)
    assert cost._replace(memory=5.0).alone == 5.0


def test_seconds_are_work_over_speed():
    training = make_training("27m")
    alone, together = (make_cost(training, gpus) for gpus in (1, 8))
    assert alone.compute == alone.flops / 1e9
    assert (alone.all_reduce, alone.efficiency) == (0, 1)
    assert together.all_reduce == pytest.approx(2 * 7 / 8 * 4 * alone.parameters / 1e7)
    # 16 bytes of a parameter that are read, 12 that are written, and the weights twice and gradients once before
    assert alone.memory == pytest.approx((40 * alone.parameters + 2 * alone.activations) / 1e8)
    half = cost_model(training.model.config, 2 * CONTEXT, CONTEXT, 1, SLOW)
    assert 2 * half.activations == alone.activations


def test_longer_contexts_cost_what_more_keys_do():
    config = read_config(RECIPE)
    short, long = (cost_model(config, 512, context, 1, SLOW).flops for context in (64, 512))
    assert long - short == 512 * 6 * 4 * 4 * (64 + 64) * (512 - 64) / 2


def test_another_attention_is_refused():
    with pytest.raises(ValueError, match="attention_type 'mla', got 'gqa'"):
        cost_model(SpaceExploreConfig(attention_type="gqa"), 64, 64, 1, SLOW)


def test_the_table_is_of_both_networks_on_one_and_eight_gpus():
    rows = [line.split(" | ") for line in scaling.format_paper(Machine(1e12, 1e12, 1e12)).splitlines()]
    assert {len(row) for row in (rows[0], *rows[2:])} == {14}
    assert [(row[0][2:], row[2]) for row in rows[2:]] == 2 * [("27m", "1"), ("27m", "8")] + 2 * [
        ("300m", "1"),
        ("300m", "8"),
    ]
    assert [row[4] for row in rows[2::4]] == ["12.1", "120.7"]


def test_the_h100_is_compared_with_its_measured_steps():
    """Of 4,096 and 32,768 tokens, in 31.5 ms and at 486,000 tokens a second."""
    few, many = scaling.compare_h100(Machine(1e13, 1e15, 1e12)).splitlines()
    tokens = 6 * 12.1e6 / 1e13
    assert f"31.5 ms measured (docs/LOG.md), {0.0315 / 4096 / tokens:.0f} times" in few
    assert f"67.4 ms measured (docs/LOG.md), {1 / 486e3 / tokens:.0f} times" in many


def test_views_are_no_operations():
    with scaling.Operations() as operations:
        torch.ones(2, 3).T.contiguous().view(6)[1:].exp()  # ones, a copy of the transposed, and exp
    assert operations.count == 3


def test_a_wider_network_has_as_many_operations_and_a_deeper_one_more():
    counts = [
        scaling.operations_of(SpaceExploreConfig(**TINY | {"num_hidden_layers": layers, "intermediate_size": width}))
        for layers, width in ((2, 40), (2, 80), (3, 40), (4, 40))  # the first has no experts
    ]
    assert counts[0] == counts[1]
    assert counts[3] - counts[2] == counts[2] - counts[1] > 50


# --- here ---


@pytest.fixture
def process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Process(Training(SpaceExploreConfig(**TINY), 32, 16))
    dist.destroy_process_group()


def test_a_round_trains_alone_then_apart_then_together(process, monkeypatch):
    trained = []

    def step():
        network = process.training.model
        averages = network is not process.bare and network.require_backward_grad_sync
        trained.append((network is process.bare, averages))
        type(process.training).step(process.training)

    monkeypatch.setattr(process.training, "step", step)
    assert min(process.measure()) > 0
    assert trained == [(True, False), (False, False), (False, True)]


def test_others_wait_while_one_is_timed(process, monkeypatch):
    calls = []
    monkeypatch.setattr(dist, "barrier", lambda: calls.append("barrier"))
    assert scaling.timed(lambda: calls.append("step")) > 0
    assert scaling.timed(None) > 0
    assert calls == ["barrier", "step", "barrier", "barrier", "barrier"]
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(scaling, "timed", lambda function: float(function is not None))
    assert process.measure() == Round(0, 0, 1, 0, 1, 1)  # the product, the copy and the step alone are the first's


def test_two_processes_train_and_average():
    measured = scaling.measure(2, SpaceExploreConfig(**TINY), 32, 16, 1)
    assert 0 < min(measured) < max(measured) < 60


def test_speeds_are_those_of_the_measured_round(monkeypatch):
    monkeypatch.setattr(scaling, "SQUARE", 100)
    machine = scaling.machine_of(Round(product=0.5, copy=0.25, all_reduce=4.0, alone=1, apart=1, together=1), 2)
    assert machine == Machine(flops=4e6, memory=8 * 25 * 2**20, link=25 * 2**20 / 4)


def test_the_command_puts_paper_beside_what_was_measured(monkeypatch, capsys):
    times = Round(product=0.2, copy=0.01, all_reduce=0.1, alone=1.5, apart=2.0, together=2.5)
    monkeypatch.setattr(scaling, "measure", lambda *_: times)
    scaling.main(["--flops", "1e12"])
    shown = capsys.readouterr().out
    for row in ("one alone | 1.500", "all at once, without averaging | 2.000", "averaging | 0.500"):
        assert f"\n| {row} | " in shown
    # 105 MB of gradients at 25 MiB in 0.1 s
    assert "| averaging | 0.500 | 0.401 |" in shown
    assert "| efficiency | 0.60 | 0." in shown
    assert "| 27m | 4,096 | 1 | 26.3 | 12.1 | 73.2 | 0.42 | 0.69 | 299." in shown


def test_one_process_has_nothing_to_average(capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--processes", "1"])
    assert capsys.readouterr().err == "error: processes must be at least 2, got 1\n"
