"""Before the decoder: the wavelet against PyWavelets, norms against torch's, the CNN against plain loops."""

import math

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from spaceexploreai.configuration_spaceexplore import INPUT_NORMS as NORM_NAMES
from spaceexploreai.configuration_spaceexplore import WAVELETS, SpaceExploreConfig
from spaceexploreai.front_end_spaceexplore import (
    INPUT_NORMS,
    SCALING_FILTERS,
    SpaceExploreInputBatchNorm,
    SpaceExploreInputDyT,
    SpaceExploreInputRMSNorm,
    SpaceExploreMSCNN,
    SpaceExploreMSCNNBlock,
    SpaceExploreValueEmbedding,
    SpaceExploreWavelet,
    hold,
    last_real_step,
    pad_left,
)
from spaceexploreai.modeling_spaceexplore import SpaceExploreModel

# No two alike, the CNN's 3 branches of 7 channels included: with equal sizes a wrong scale or axis goes unseen.
BATCH, STEPS, FEATURES, HIDDEN, BRANCHES, WIDTH, KERNEL = 2, 11, 5, 24, 3, 21, 4
CNN = {
    "hidden_size": HIDDEN,
    "mscnn_num_blocks": 2,
    "mscnn_hidden_size": WIDTH,
    "mscnn_num_branches": BRANCHES,
    "mscnn_kernel_size": KERNEL,
    "wavelet": "db2",
    "wavelet_levels": 2,
}
EPS = 0.05  # large enough that a norm without it is another norm
NORMS = list(NORM_NAMES)

few = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**16)
wavelets = st.sampled_from(WAVELETS)
levels = st.integers(0, 5)
lengths = st.integers(1, 40)


def masks(steps: int) -> st.SearchStrategy[list[bool]]:
    """Of one row with at least one real step."""
    return st.lists(st.booleans(), min_size=steps, max_size=steps).filter(any)


EVERY_WAVELET = pytest.mark.parametrize("name", WAVELETS)
EVERY_NORM = pytest.mark.parametrize("norm", NORMS)


def make_config(**overrides) -> SpaceExploreConfig:
    sizes = {**CNN, "num_features": FEATURES, "rms_norm_eps": EPS, "initializer_range": 0.1}
    return SpaceExploreConfig(**{**sizes, **overrides})


def random_weights(module: nn.Module) -> nn.Module:
    """Also norms and biases, which start at a constant."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.eval()


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some(*shape: int, seed: int = 1, share: float = 0.7) -> torch.Tensor:
    """A random `share` of true."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < share


def gradients(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# --- padding ---


def newest(real: list[bool], step: int) -> int:
    """The scalar twin of `last_real_step`; `step` may lie before the series."""
    seen = [at for at in range(step + 1) if real[at]]
    return seen[-1] if seen else real.index(True)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 20).flatmap(lambda steps: st.lists(masks(steps), min_size=1, max_size=3)),
    dtype=st.sampled_from([torch.bool, torch.long, torch.float]),
)
def test_last_real_step_is_its_definition(rows, dtype):
    expected = [[newest(real, step) for step in range(len(real))] for real in rows]
    steps = last_real_step(torch.tensor(rows, dtype=dtype))
    assert steps.dtype == torch.long
    assert steps.tolist() == expected


def test_a_row_without_a_real_step_points_into_itself():
    assert last_real_step(torch.zeros(BATCH, STEPS)).tolist() == [[0] * STEPS] * BATCH


def test_without_a_mask_nothing_is_held():
    values = normal(BATCH, WIDTH, STEPS)
    assert last_real_step(None) is None
    assert hold(values, None) is values


def test_hold_repeats_the_last_real_value():
    values, mask = normal(BATCH, WIDTH, STEPS), some(BATCH, STEPS, share=0.5)
    held = hold(values, last_real_step(mask))
    for row, step in np.ndindex(BATCH, STEPS):
        assert torch.equal(held[row, :, step], values[row, :, newest(mask[row].tolist(), step)])


@pytest.mark.parametrize("steps", [0, 1, 3 * STEPS])
def test_pad_left_is_numpys_edge_padding(steps):
    values = normal(BATCH, WIDTH, STEPS)
    expected = np.pad(values.numpy(), [(0, 0), (0, 0), (steps, 0)], mode="edge")
    assert_close(pad_left(values, steps), torch.from_numpy(expected), rtol=0, atol=0)


# --- the wavelet ---


def test_every_wavelet_that_a_config_may_name_has_a_filter():
    assert set(SCALING_FILTERS) == set(WAVELETS)


@EVERY_WAVELET
def test_filter_is_pywavelets(name):
    assert SCALING_FILTERS[name] == pytest.approx(pywt.Wavelet(name).rec_lo, rel=0, abs=1e-15)


def stationary_approximations(series: np.ndarray, wavelet: pywt.Wavelet, count: int) -> list[np.ndarray]:
    """PyWavelets' approximations, the finest first, by circular convolution."""
    pairs = pywt.swt(series, wavelet, level=count, norm=True)
    return [approximation for approximation, _ in reversed(pairs)]


def analysis_by_reconstruction(name: str) -> pywt.Wavelet:
    """
    The same wavelet with the filters for analysis and reconstruction exchanged, its scaling filter newest step first.

    PyWavelets' `inverse_filter_bank` is not it: that exchanges them and reverses each, which is the same wavelet.
    """
    dec_lo, dec_hi, rec_lo, rec_hi = pywt.Wavelet(name).filter_bank
    wavelet = pywt.Wavelet(f"{name} exchanged", filter_bank=(rec_lo, rec_hi, dec_lo, dec_hi))
    wavelet.orthogonal = True  # else `norm=True` warns
    return wavelet


@pytest.mark.parametrize("exchanged", [False, True], ids=["time reversed", "filters exchanged"])
@EVERY_WAVELET
def test_approximations_are_pywavelets_stationary_transform(name, exchanged):
    """
    With n taps, PyWavelets computes `a_j[t] = sum_k dec_lo[k] a_{j-1}[t + 2^(j-1) (n/2 - k)] / sqrt(2)`, t modulo T,
    where we have `sum_k rec_lo[k] a_{j-1}[t - 2^(j-1) k] / sqrt(2)`, and `rec_lo[k] = dec_lo[n - 1 - k]`.

    - In reversed time the index is `t - 2^(j-1) (n/2 - 1 - k')` with k' = n - 1 - k, so that theirs is ours of
      n/2 - 1 spacings later: over the levels 1 to j together, (2^j - 1) (n/2 - 1) steps.
    - With the filters exchanged theirs is ours of n/2 spacings later, together (2^j - 1) n/2 steps.

    The approximation of level j reads (2^j - 1) (n - 1) steps back; before that, theirs reads around the circle.
    """
    series, count, taps = normal(256, dtype=torch.double), 5, len(SCALING_FILTERS[name])
    if exchanged:
        expected = stationary_approximations(series.numpy(), analysis_by_reconstruction(name), count)
    else:
        backwards = stationary_approximations(series.flip(0).numpy(), pywt.Wavelet(name), count)
        expected = [approximation[::-1] for approximation in backwards]
    for level in range(1, count + 1):
        reach = 2**level - 1
        theirs = np.roll(expected[level - 1], reach * (taps // 2 - (not exchanged)))
        ours, _ = SpaceExploreWavelet(name, level).double()(series.expand(1, 1, -1))
        edge = reach * (taps - 1)
        assert_close(ours[0, 0, edge:], torch.from_numpy(theirs.copy())[edge:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "delay"), [("haar", 0.5), ("db2", (3 - math.sqrt(3)) / 2), ("db4", 1.0), ("sym4", 4.0)]
)
def test_delay_of_a_ramp(name, delay):
    """In closed form for haar and db2; the order of `dec_lo` would delay by 2.4 and 6.0 steps with db2 and db4."""
    ramp = torch.arange(100, dtype=torch.double)
    approximation, _ = SpaceExploreWavelet(name, 3).double()(ramp.expand(1, 1, -1))
    assert ramp[-1] - approximation[0, 0, -1].item() == pytest.approx(7 * delay, rel=0.01)


@few
@given(seed=seeds, name=wavelets, count=levels, steps=lengths)
def test_inverse_gives_the_series_back(seed, name, count, steps):
    values = normal(BATCH, WIDTH, steps, seed=seed)
    approximation, details = SpaceExploreWavelet(name, count)(values)
    assert [detail.shape for detail in details] == [values.shape] * count
    assert_close(SpaceExploreWavelet.inverse(approximation, details), values, rtol=1e-6, atol=1e-6)


@few
@given(seed=seeds, name=wavelets, count=levels, steps=lengths)
def test_details_come_the_finest_first(seed, name, count, steps):
    """Without the finest k details, the inverse is the approximation of level k."""
    values = normal(BATCH, WIDTH, steps, seed=seed)
    approximation, details = SpaceExploreWavelet(name, count)(values)
    for level in range(count + 1):
        expected, _ = SpaceExploreWavelet(name, level)(values)
        smooth = SpaceExploreWavelet.inverse(approximation, details[level:])
        assert_close(smooth, expected, rtol=1e-6, atol=1e-6)


@few
@given(seed=seeds, name=wavelets, count=levels, steps=lengths)
def test_split_is_the_inverse_of_either_part_alone(seed, name, count, steps):
    values, wavelet = normal(BATCH, WIDTH, steps, seed=seed), SpaceExploreWavelet(name, count)
    approximation, details = wavelet(values)
    long_term, short_term = wavelet.split(values)
    nothing = torch.zeros_like(values)
    assert_close(long_term, wavelet.inverse(approximation, [nothing] * count), rtol=1e-6, atol=1e-6)
    assert_close(short_term, wavelet.inverse(nothing, details), rtol=1e-6, atol=1e-6)
    assert_close(long_term + short_term, values, rtol=1e-6, atol=1e-6)


@few
@given(
    name=wavelets,
    count=levels,
    real=lengths.flatmap(masks),
    level=st.floats(-100, 100, width=32, allow_subnormal=False),
)
def test_a_level_is_long_term_from_the_first_step_on(name, count, real, level):
    values, steps = torch.full((1, WIDTH, len(real)), level), last_real_step(torch.tensor([real]))
    approximation, details = SpaceExploreWavelet(name, count)(values, steps)
    assert_close(approximation, values, rtol=1e-6, atol=0)
    for detail in details:
        assert_close(detail, torch.zeros_like(values), rtol=0, atol=1e-6 * abs(level))


@few
@given(seed=seeds, name=wavelets, steps=lengths)
def test_a_series_starts_without_details(seed, name, steps):
    values = normal(BATCH, WIDTH, steps, seed=seed, dtype=torch.double)
    approximation, _ = SpaceExploreWavelet(name, 3).double()(values)
    assert_close(approximation[..., 0], values[..., 0], rtol=0, atol=1e-6)


@few
@given(seed=seeds, name=wavelets, count=levels, factors=st.tuples(st.floats(-3, 3), st.floats(-3, 3)))
def test_wavelet_is_linear(seed, name, count, factors):
    wavelet = SpaceExploreWavelet(name, count).double()
    left, right = (normal(BATCH, WIDTH, STEPS, seed=seed + n, dtype=torch.double) for n in (0, 1))
    mixed, _ = wavelet(factors[0] * left + factors[1] * right)
    assert_close(mixed, factors[0] * wavelet(left)[0] + factors[1] * wavelet(right)[0], rtol=0, atol=1e-12)


@few
@given(seed=seeds, name=wavelets, count=levels, steps=lengths, data=st.data())
def test_wavelet_is_causal_to_the_bit(seed, name, count, steps, data):
    cut = data.draw(st.integers(0, steps - 1))
    values, wavelet = normal(BATCH, WIDTH, steps, seed=seed), SpaceExploreWavelet(name, count)
    changed = values.clone()
    changed[..., cut:] = data.draw(st.sampled_from([0.0, -1e30, math.inf, math.nan]))
    (before, details), (after, changed_details) = wavelet(values), wavelet(changed)
    for one, other in zip([before, *details], [after, *changed_details], strict=True):
        assert torch.equal(one[..., :cut], other[..., :cut])


@pytest.mark.parametrize("masked", [False, True])
@EVERY_WAVELET
def test_gradient_flows_through_the_wavelet(name, masked):
    wavelet = SpaceExploreWavelet(name, 2).double()
    values = normal(2, 3, 7, dtype=torch.double).requires_grad_()
    steps = last_real_step(some(2, 7)) if masked else None

    def flat(values):
        approximation, details = wavelet(values, steps)
        return approximation, *details, *wavelet.split(values, steps)

    assert list(wavelet.parameters()) == []
    assert torch.autograd.gradcheck(flat, (values,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.double, 1e-5)], ids=str)
@EVERY_WAVELET
def test_wavelet_keeps_the_type_of_the_series(name, dtype, tolerance):
    values = normal(BATCH, WIDTH, STEPS)
    wavelet = SpaceExploreWavelet(name, 3)
    for part, expected in zip(wavelet.split(values.to(dtype)), wavelet.split(values), strict=True):
        assert part.dtype == dtype
        assert_close(part.float(), expected, rtol=0, atol=tolerance)


# Of the whole network; the rest of it is small.
SMALL = {
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "t2t_num_hidden_layers": 0,
    "mscnn_num_blocks": 1,
}


def assert_has_filter(model: SpaceExploreModel, name: str):
    (block,) = model.mscnn.blocks
    expected = torch.tensor(pywt.Wavelet(name).rec_lo) / math.sqrt(2)
    assert_close(block.wavelet.scaling_filter, expected)


@EVERY_WAVELET
def test_filter_survives_a_checkpoint(name, tmp_path):
    model = random_weights(SpaceExploreModel(make_config(**SMALL, wavelet=name)))
    assert_has_filter(model, name)
    model.save_pretrained(tmp_path)
    loaded = SpaceExploreModel.from_pretrained(tmp_path)
    assert_has_filter(loaded, name)
    values = normal(BATCH, STEPS, HIDDEN)
    assert_close(loaded.mscnn(values), model.mscnn(values), rtol=0, atol=0)


def test_a_checkpoint_can_be_loaded_with_another_wavelet(tmp_path):
    """Their filters are equally long, so that a stored one would be taken without a complaint."""
    SpaceExploreModel(make_config(**SMALL, wavelet="db4")).save_pretrained(tmp_path)
    assert_has_filter(SpaceExploreModel.from_pretrained(tmp_path, wavelet="sym4"), "sym4")


# --- the multi-scale CNN, against plain loops ---

ACTIVATIONS = {"silu": lambda x: x / (1 + np.exp(-x)), "tanh": np.tanh}


def make_mscnn(**overrides) -> SpaceExploreMSCNN:
    """In double precision, so that what should be equal is so to many digits."""
    return random_weights(SpaceExploreMSCNN(make_config(**overrides))).double()


def at_real_steps(real: list[bool], value_at) -> list[np.ndarray | None]:
    """A series whose padded steps hold nothing that could be read."""
    return [value_at(step) if real[step] else None for step in range(len(real))]


def slow_filter(series: list, real: list[bool], taps: list[np.ndarray], spacing: int = 1) -> list:
    """Convolution with matrices, the tap of the newest step first; padded steps hold the last real value."""
    return at_real_steps(
        real, lambda t: sum(tap @ series[newest(real, t - spacing * k)] for k, tap in enumerate(taps))
    )


def slow_long_term(series: list, real: list[bool], config: SpaceExploreConfig) -> list:
    taps = [np.eye(len(series[newest(real, 0)])) * h / math.sqrt(2) for h in pywt.Wavelet(config.wavelet).rec_lo]
    for level in range(config.wavelet_levels):
        series = slow_filter(series, real, taps, spacing=2**level)
    return series


def slow_branches(inputs: list[list], real: list[bool], weights: dict, config: SpaceExploreConfig) -> list[list]:
    """F̄_1 = act(Conv_1(F_1)), F̄_i = act(Conv_i(F_i + F̄_{i-1})) (equations 1 and 2)."""
    act, features = ACTIVATIONS[config.hidden_act], []
    for i in range(BRANCHES):
        weight, bias = weights[f"convs.{i}.weight"], weights[f"convs.{i}.bias"]
        summed = inputs[0] if i == 0 else at_real_steps(real, lambda t, i=i: inputs[i][t] + features[i - 1][t])
        taps = [weight[:, :, k] for k in reversed(range(weight.shape[-1]))]
        convolved = slow_filter(summed, real, taps)
        features.append(at_real_steps(real, lambda t, c=convolved, b=bias: act(c[t] + b)))
    return features


def slow_block(states: list, real: list[bool], weights: dict, config: SpaceExploreConfig) -> list:
    def project(t: int) -> np.ndarray:
        normed = states[t] / np.sqrt(np.mean(states[t] ** 2) + EPS) * weights["norm.weight"]
        return weights["in_proj.weight"] @ normed + weights["in_proj.bias"]

    def assemble(t: int) -> np.ndarray:
        """S_i sums the short terms of branches up to i, L_i the long terms from i on (equations 5 and 6)."""
        short = [sum(features[k][t] - long_terms[k][t] for k in range(i + 1)) for i in range(BRANCHES)]
        long = [sum(long_terms[k][t] for k in range(i, BRANCHES)) for i in range(BRANCHES)]
        assembled = np.concatenate([short[i] + long[i] for i in range(BRANCHES)])
        return states[t] + weights["out_proj.weight"] @ assembled + weights["out_proj.bias"]

    size = WIDTH // BRANCHES
    inputs = [at_real_steps(real, lambda t, i=i: project(t)[i * size : (i + 1) * size]) for i in range(BRANCHES)]
    features = slow_branches(inputs, real, weights, config)
    long_terms = [slow_long_term(series, real, config) for series in features]
    return at_real_steps(real, assemble)


def slow_mscnn(mscnn: SpaceExploreMSCNN, states: np.ndarray, real: list[bool], config: SpaceExploreConfig) -> list:
    """One row, (T, D)."""
    series = at_real_steps(real, lambda t: states[t])
    for block in mscnn.blocks:
        weights = {name: parameter.detach().numpy() for name, parameter in block.named_parameters()}
        series = slow_block(series, real, weights, config)
    return series


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"wavelet": "db4", "wavelet_levels": 3},
        {"wavelet_levels": 0},
        {"mscnn_kernel_size": 1},
        {"hidden_act": "tanh", "wavelet": "sym4"},
    ],
    ids=str,
)
@settings(max_examples=4, deadline=None)
@given(seed=seeds, share=st.sampled_from([0.4, 0.8, 1.0]))
def test_mscnn_is_the_equations_of_llm_ps(overrides, seed, share):
    config, mscnn = make_config(**overrides), make_mscnn(**overrides)
    states = normal(BATCH, STEPS, HIDDEN, seed=seed, dtype=torch.double)
    mask = some(BATCH, STEPS, seed=seed, share=share)
    mask[:, -1] = True
    outputs = mscnn(states, None if share == 1.0 else mask)
    for row in range(BATCH):
        expected = slow_mscnn(mscnn, states[row].numpy(), mask[row].tolist(), config)
        known = [torch.from_numpy(value) for value in expected if value is not None]
        assert_close(outputs[row, mask[row]], torch.stack(known), rtol=1e-6, atol=1e-6)


@few
@given(seed=seeds, steps=lengths, data=st.data())
def test_mscnn_is_causal(seed, steps, data):
    cut, size = data.draw(st.integers(0, steps - 1)), data.draw(st.sampled_from([0.0, 1.0, 1e6]))
    mscnn, states = make_mscnn(), normal(BATCH, steps, HIDDEN, seed=seed, dtype=torch.double)
    changed = states.clone()
    changed[:, cut:] = size * normal(BATCH, steps - cut, HIDDEN, seed=seed + 1, dtype=torch.double)
    outputs = mscnn(states)
    assert torch.equal(mscnn(changed)[:, :cut], outputs[:, :cut])
    assert_close(mscnn(states[:, : cut + 1]), outputs[:, : cut + 1], rtol=0, atol=1e-9)


@few
@given(seed=seeds, padding=st.integers(1, 30), size=st.sampled_from([0.0, 1.0, 1e6]))
def test_mscnn_does_not_see_left_padding(seed, padding, size):
    mscnn, states = make_mscnn(), normal(BATCH, STEPS, HIDDEN, seed=seed, dtype=torch.double)
    garbage = size * normal(BATCH, padding, HIDDEN, seed=seed + 1, dtype=torch.double)
    mask = torch.cat((torch.zeros(BATCH, padding), torch.ones(BATCH, STEPS)), dim=1).long()
    padded, plain = mscnn(torch.cat((garbage, states), dim=1), mask)[:, padding:], mscnn(states)
    assert_close(padded, plain, rtol=0, atol=1e-9)
    weights = normal(BATCH, STEPS, HIDDEN, dtype=torch.double)
    expected = gradients(mscnn, (plain * weights).sum())
    for name, gradient in gradients(mscnn, (padded * weights).sum()).items():
        assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


@few
@given(seed=seeds, size=st.sampled_from([0.0, 1.0, 1e6]))
def test_mscnn_does_not_see_padded_steps_anywhere(seed, size):
    mscnn, mask = make_mscnn(), some(BATCH, STEPS, seed=seed, share=0.6)
    states, garbage = (normal(BATCH, STEPS, HIDDEN, seed=seed + n, dtype=torch.double) for n in (0, 1))
    changed = torch.where(mask.unsqueeze(-1), states, size * garbage)
    assert_close(mscnn(changed, mask)[mask], mscnn(states, mask)[mask], rtol=0, atol=0)


def test_a_mask_without_padding_changes_nothing():
    mscnn, states = make_mscnn(), normal(BATCH, STEPS, HIDDEN, dtype=torch.double)
    assert_close(mscnn(states, torch.ones(BATCH, STEPS)), mscnn(states), rtol=0, atol=0)


def test_rows_of_a_batch_do_not_see_each_other():
    """Among them one that is padding alone."""
    mscnn, states = make_mscnn(), normal(4, STEPS, HIDDEN, dtype=torch.double)
    mask = some(4, STEPS)
    mask[3] = False
    together = mscnn(states, mask)
    for row in range(4):
        alone = mscnn(states[row : row + 1], mask[row : row + 1])
        assert_close(alone[0], together[row], rtol=0, atol=1e-9)
    assert together.isfinite().all()


@pytest.mark.parametrize("kernel", [1, 2, 5])
def test_receptive_field_grows_from_branch_to_branch(kernel):
    steps = 20
    block = random_weights(SpaceExploreMSCNNBlock(make_config(mscnn_kernel_size=kernel)))
    inputs = normal(1, WIDTH, steps).requires_grad_()
    features = block.extract(inputs.chunk(BRANCHES, dim=1), None).chunk(BRANCHES, dim=1)
    for branch, feature in enumerate(features, start=1):
        (gradient,) = torch.autograd.grad(feature[..., -1].sum(), inputs, retain_graph=True)
        seen = gradient[0].any(dim=0).nonzero().flatten().tolist()
        assert seen == list(range(steps - 1 - branch * (kernel - 1), steps))


@pytest.mark.parametrize("count", [0, 2])
def test_every_parameter_of_the_mscnn_gets_a_gradient(count):
    mscnn = make_mscnn(wavelet_levels=count).train()
    outputs = mscnn(normal(BATCH, STEPS, HIDDEN, dtype=torch.double), some(BATCH, STEPS))
    found = gradients(mscnn, (outputs * torch.randn_like(outputs)).sum())
    assert len(found) == 2 * (5 + 2 * BRANCHES)
    assert [name for name, gradient in found.items() if not gradient.abs().max() > 1e-6] == []


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_of_the_mscnn_is_its_slope(masked):
    """Through every path: one that is cut off would leave the parameters their gradients by the others."""
    mscnn, states = make_mscnn(), normal(BATCH, STEPS, HIDDEN, dtype=torch.double).requires_grad_()
    mask = some(BATCH, STEPS) if masked else None
    assert torch.autograd.gradcheck(lambda states: mscnn(states, mask), (states,), fast_mode=True)


def test_without_blocks_the_mscnn_is_nothing():
    mscnn, states = make_mscnn(mscnn_num_blocks=0), normal(BATCH, STEPS, HIDDEN)
    assert list(mscnn.parameters()) == []
    assert torch.equal(mscnn(states, some(BATCH, STEPS)), states)


def test_channels_are_the_hidden_size_where_nothing_else_is_said():
    block = SpaceExploreMSCNNBlock(make_config(mscnn_hidden_size=None))
    assert block.out_proj.weight.shape == block.in_proj.weight.shape == (HIDDEN, HIDDEN)
    assert [conv.in_channels for conv in block.convs] == [HIDDEN // BRANCHES] * BRANCHES


@pytest.mark.parametrize("autocast", [False, True])
def test_mscnn_in_bfloat16(autocast):
    mscnn, states, mask = make_mscnn().float(), normal(BATCH, STEPS, HIDDEN), some(BATCH, STEPS)
    expected = mscnn(states, mask)
    if not autocast:
        mscnn, states = mscnn.bfloat16(), states.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = mscnn(states, mask)
    assert outputs.dtype == (torch.float if autocast else torch.bfloat16)
    assert (outputs.float() - expected).abs().max() < 0.03 * expected.abs().max()


ENOUGH = 110  # steps, more than it looks back
PARTS = [{}, {"mscnn_num_blocks": 1, "wavelet": "haar"}, {"wavelet_levels": 0}, {"mscnn_num_branches": 7}]


@pytest.mark.parametrize("sizes", PARTS, ids=str)
def test_it_looks_back_as_far_as_it_says(sizes):
    cnn, values = make_mscnn(**sizes), normal(1, ENOUGH, HIDDEN, dtype=torch.double).requires_grad_()
    known = ENOUGH - 1
    (seen,) = torch.autograd.grad(cnn(values)[:, known:].square().sum(), values)
    oldest = seen.any(dim=-1).nonzero()[0, 1].item()
    assert cnn.first_needed(None, known) == oldest > 0
    assert cnn.first_needed(None, known - oldest) == 0


@pytest.mark.parametrize("sizes", PARTS, ids=str)
@settings(max_examples=15, deadline=None)
@given(seed=seeds, new=st.integers(1, 4), share=st.floats(0.2, 1))
def test_new_steps_are_those_of_the_whole_history(sizes, seed, new, share):
    """Padding in the middle makes it look further back."""
    cnn, values = make_mscnn(**sizes), normal(BATCH, ENOUGH, HIDDEN, seed=seed, dtype=torch.double)
    mask, known = some(BATCH, ENOUGH, seed=seed, share=share), ENOUGH - new
    mask[:, -1] = True
    first = cnn.first_needed(mask, known)
    newest = cnn(values[:, first:], mask[:, first:])[:, known - first :]
    real = mask[:, known:]
    assert_close(newest[real], cnn(values, mask)[:, known:][real])


# --- input norms ---


def make_norm(norm: str) -> nn.Module:
    return random_weights(INPUT_NORMS[norm](FEATURES, EPS))


def everything(values: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def test_every_norm_that_a_config_may_name_exists():
    classes = {"dyt": SpaceExploreInputDyT, "batch": SpaceExploreInputBatchNorm, "rms": SpaceExploreInputRMSNorm}
    assert classes == INPUT_NORMS
    assert list(classes) == NORMS
    for norm in NORMS:
        assert isinstance(SpaceExploreValueEmbedding(make_config(input_norm=norm)).input_norm, classes[norm])


def assert_same_training(ours: SpaceExploreInputBatchNorm, theirs: nn.BatchNorm1d, values: torch.Tensor):
    """(B, T, F) values in which all is known: outputs and all gradients."""
    left, right = values.clone().requires_grad_(), values.clone().requires_grad_()
    actual, expected = ours(left, everything(values)), theirs(right.flatten(0, 1)).view_as(right)
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(values)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)
    for name in ("weight", "bias"):
        assert_close(getattr(ours, name).grad, getattr(theirs, name).grad, rtol=1e-4, atol=1e-5)


def test_batch_norm_is_torchs_where_all_is_known():
    torch.manual_seed(0)
    ours, theirs = make_norm("batch").train(), nn.BatchNorm1d(FEATURES, eps=EPS)
    theirs.load_state_dict(ours.state_dict())
    for seed in range(3):
        assert_same_training(ours, theirs, 2 + 3 * normal(BATCH, STEPS, FEATURES, seed=seed))
    for (name, actual), (_, expected) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")
    values = normal(BATCH, STEPS, FEATURES, seed=9)
    assert_close(ours.eval()(values, everything(values)), theirs.eval()(values.flatten(0, 1)).view_as(values))


def one_feature(norm: SpaceExploreInputBatchNorm, feature: int) -> nn.BatchNorm1d:
    """Torch's, of one feature."""
    single = nn.BatchNorm1d(1, eps=EPS)
    state = {name: value[feature : feature + 1] if value.ndim else value for name, value in norm.state_dict().items()}
    single.load_state_dict(state)
    return single


@few
@given(seed=seeds, share=st.sampled_from([0.3, 0.7]))
def test_batch_norm_is_torchs_over_the_known_values_alone(seed, share):
    ours = make_norm("batch").train()
    theirs = [one_feature(ours, feature) for feature in range(FEATURES)]
    for batch in range(3):
        values = 2 + 3 * normal(BATCH, STEPS, FEATURES, seed=seed + batch)
        known = some(BATCH, STEPS, FEATURES, seed=seed + batch, share=share)
        known[0, :2] = True  # torch refuses to normalise a single value
        outputs = ours(torch.where(known, values, 0.0), known)
        for feature, single in enumerate(theirs):
            at = known[..., feature]
            expected = single(values[..., feature][at].unsqueeze(-1)).squeeze(-1)
            assert_close(outputs[..., feature][at], expected, rtol=1e-5, atol=1e-5)
    assert_close(ours.running_mean, torch.cat([single.running_mean for single in theirs]))
    assert_close(ours.running_var, torch.cat([single.running_var for single in theirs]))


@few
@given(seed=seeds, garbage=st.sampled_from([math.nan, math.inf, 1e30]))
def test_batch_norm_learns_nothing_from_padding(seed, garbage):
    """Of the whole embedding, which is what sees the mask."""
    values, mask = normal(BATCH, STEPS, FEATURES, seed=seed), some(BATCH, STEPS, seed=seed)
    mask[0, :2] = True
    embeddings = [random_weights(SpaceExploreValueEmbedding(make_config(input_norm="batch"))) for _ in range(2)]
    padded, plain = (embedding.train() for embedding in embeddings)
    outputs = padded(values.masked_fill(~mask.unsqueeze(-1), garbage), mask.long())
    expected = plain(values[mask].unsqueeze(0))
    assert_close(outputs[mask], expected[0], rtol=1e-5, atol=1e-5)
    for name, buffer in padded.named_buffers():
        assert_close(buffer, plain.get_buffer(name))


def test_a_single_value_teaches_no_variance():
    norm, values = make_norm("batch").train(), normal(BATCH, STEPS, FEATURES)
    known = everything(values)
    known[..., 2] = False
    known[0, 0, 2] = True
    norm(torch.where(known, values, 0.0), known)
    assert (norm.running_mean != 0).all()
    assert (norm.running_var != 1).tolist() == [feature != 2 for feature in range(FEATURES)]


def test_a_feature_that_is_nowhere_known_teaches_nothing():
    norm, values = make_norm("batch").train(), normal(BATCH, STEPS, FEATURES)
    norm(5 * values, everything(values))
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    known = everything(values)
    known[..., 2] = False
    outputs = norm(torch.where(known, values, 0.0), known)
    assert outputs.isfinite().all()
    for name in ("running_mean", "running_var"):
        changed = getattr(norm, name) != before[name]
        assert changed.tolist() == [True, True, False, True, True]


def test_rms_norm_is_torchs_where_all_is_known():
    ours, theirs = make_norm("rms"), nn.RMSNorm(FEATURES, eps=EPS)
    theirs.load_state_dict(ours.state_dict())
    values = 3 * normal(BATCH, STEPS, FEATURES)
    assert_close(ours(values, everything(values)), theirs(values))


def test_rms_norm_is_torchs_over_the_known_features_alone():
    norm, values, known = make_norm("rms"), 3 * normal(BATCH, STEPS, FEATURES), some(BATCH, STEPS, FEATURES)
    outputs = norm(torch.where(known, values, 0.0), known)
    for step in np.ndindex(BATCH, STEPS):
        there = values[step][known[step]]
        expected = F.rms_norm(there, there.shape, norm.weight[known[step]], EPS)
        assert_close(outputs[step][known[step]], expected)


def test_dynamic_tanh_is_its_formula():
    norm, values = make_norm("dyt"), 3 * normal(BATCH, STEPS, FEATURES)
    assert norm.alpha.shape == (FEATURES,)  # one of all features would be broadcast
    alpha, weight, bias = (getattr(norm, name).detach().numpy() for name in ("alpha", "weight", "bias"))
    expected = weight * np.tanh(alpha * values.numpy()) + bias
    assert_close(norm(values, everything(values)), torch.from_numpy(expected))


# --- value embedding ---


def make_embedding(norm: str) -> SpaceExploreValueEmbedding:
    """Also its running statistics are not those of a new one."""
    embedding = random_weights(SpaceExploreValueEmbedding(make_config(input_norm=norm)))
    for position, buffer in enumerate(embedding.buffers()):
        buffer.copy_(0.5 + position + torch.arange(buffer.numel()).view_as(buffer))
    return embedding


@EVERY_NORM
def test_noise_is_on_known_values_and_in_training_alone(norm):
    embedding = SpaceExploreValueEmbedding(make_config(input_norm=norm, input_noise=0.5))
    seen = []
    embedding.input_norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    values = spoil(normal(200, STEPS, FEATURES), seed=4)
    mask = some(200, STEPS, seed=5)
    for training in (False, True):
        embedding.train(training)(values, mask)
    (plain, known), (noisy, still_known) = seen
    assert torch.equal(known, still_known)
    assert torch.equal(plain, torch.where(values.isfinite() & mask.unsqueeze(-1), values, 0.0))
    assert (noisy[~known] == 0).all()
    noise = (noisy - plain)[known]
    assert noise.std().item() == pytest.approx(0.5, rel=0.03)
    assert abs(noise.mean().item()) < 0.03


def spoil(values: torch.Tensor, seed: int, share: float = 0.3) -> torch.Tensor:
    """A `share` of the values is not a finite number."""
    kinds = torch.tensor([math.nan, math.inf, -math.inf])
    chosen = kinds[torch.randint(3, values.shape, generator=torch.Generator().manual_seed(seed))]
    return torch.where(some(*values.shape, seed=seed, share=share), chosen, values)


@EVERY_NORM
@few
@given(seed=seeds, padded=st.booleans())
def test_a_missing_value_is_zero_plus_its_indicator(norm, seed, padded):
    embedding, values = make_embedding(norm), spoil(normal(BATCH, STEPS, FEATURES, seed=seed), seed)
    mask = some(BATCH, STEPS, seed=seed + 1) if padded else torch.ones(BATCH, STEPS, dtype=torch.bool)
    known = values.isfinite() & mask.unsqueeze(-1)
    normed = embedding.input_norm(torch.where(known, values, 0.0), known)
    outputs = embedding(values, mask.long() if padded else None)
    for row, step in np.ndindex(BATCH, STEPS):
        expected = embedding.value_proj.bias
        for feature in range(FEATURES):
            if known[row, step, feature]:
                expected = expected + embedding.value_proj.weight[:, feature] * normed[row, step, feature]
            else:
                expected = expected + embedding.missing_proj.weight[:, feature]
        assert_close(outputs[row, step], expected, rtol=1e-5, atol=1e-5)


@EVERY_NORM
@few
@given(seed=seeds, garbage=st.sampled_from([math.nan, math.inf, -math.inf]), data=st.data())
def test_a_missing_value_never_spreads(norm, seed, garbage, data):
    """To no other step, and within its own to no other feature, but that root mean squares are over what is known."""
    embedding, values = make_embedding(norm), normal(BATCH, STEPS, FEATURES, seed=seed)
    row, step, feature = (data.draw(st.integers(0, size - 1)) for size in values.shape)
    spoiled = values.clone()
    spoiled[row, step, feature] = garbage
    plain, outputs = embedding(values), embedding(spoiled)
    elsewhere = torch.ones(BATCH, STEPS, dtype=torch.bool)
    elsewhere[row, step] = False
    assert torch.equal(outputs[elsewhere], plain[elsewhere])
    assert outputs.isfinite().all()
    if norm != "rms":
        own = embedding.input_norm(values, everything(values))[row, step, feature]
        change = embedding.missing_proj.weight[:, feature] - own * embedding.value_proj.weight[:, feature]
        assert_close(outputs[row, step] - plain[row, step], change, rtol=1e-5, atol=1e-5)


@EVERY_NORM
@few
@given(seed=seeds, length=st.integers(1, STEPS))
def test_outside_training_each_step_is_embedded_alone(norm, seed, length):
    embedding, values = make_embedding(norm), spoil(normal(BATCH, STEPS, FEATURES, seed=seed), seed)
    outputs = embedding(values)
    assert_close(embedding(values[:, :length]), outputs[:, :length], rtol=1e-6, atol=1e-6)
    assert_close(embedding(values[1:]), outputs[1:], rtol=1e-6, atol=1e-6)


@EVERY_NORM
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_missing_values_leave_the_gradients_finite(norm, share):
    """At 1.0 nothing is known."""
    embedding, values = make_embedding(norm).train(), spoil(normal(BATCH, STEPS, FEATURES), 0, share)
    outputs = embedding(values)
    found = gradients(embedding, (outputs * torch.randn_like(outputs)).sum())
    assert all(gradient.isfinite().all() for gradient in found.values())
    learns = [name for name, gradient in found.items() if gradient.any()]
    assert learns == (list(found) if share < 1 else ["value_proj.bias", "missing_proj.weight"])


@EVERY_NORM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.double], ids=str)
def test_embedding_in_other_types_in_training_too(norm, dtype):
    values = spoil(normal(BATCH, STEPS, FEATURES), 0)
    expected = make_embedding(norm).train()(values)
    outputs = make_embedding(norm).to(dtype).train()(values.to(dtype))
    assert outputs.dtype == dtype
    assert (outputs.float() - expected).abs().max() < 0.03 * expected.abs().max()
