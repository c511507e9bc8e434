"""The network: against foreign implementations of its parts, and properties that every causal forecaster must have."""

import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import mean_pinball_loss
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    DeepseekV3Config,
    DynamicCache,
    LlamaConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3MLP,
    DeepseekV3MoE,
    DeepseekV3RotaryEmbedding,
    DeepseekV3TopkRouter,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from spaceexploreai.configuration_spaceexplore import AUTO_MAP, INPUT_NORMS, SpaceExploreConfig
from spaceexploreai.modeling_spaceexplore import (
    SpaceExploreAttention,
    SpaceExploreForCausalLM,
    SpaceExploreForClassification,
    SpaceExploreForRegression,
    SpaceExploreForTimeToText,
    SpaceExploreLatentAttention,
    SpaceExploreMLP,
    SpaceExploreModel,
    SpaceExploreMoE,
    SpaceExploreQuantileHead,
    SpaceExploreRMSNorm,
    SpaceExploreRotaryEmbedding,
    SpaceExploreTopkRouter,
    pinball_loss,
)

BATCH, STEPS, FEATURES, HIDDEN, EXPERTS = 3, 12, 5, 32, 8
LAYERS, DENSE_LAYERS = 3, 1
MOE_LAYERS = LAYERS - DENSE_LAYERS
HORIZONS = [1, 2, 5]
LEVELS = [0.1, 0.3, 0.5, 0.9]
# No two alike, sums included: with equal sizes a wrong scale or axis goes unseen.
LATENT = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 16,
}
SHARED_HEADS = {"attention_type": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
ONE_HEAD_EACH = {"attention_type": "mha", "num_attention_heads": 4, "head_dim": 6}
ATTENTION_TYPES = {"mla": {}, "gqa": SHARED_HEADS, "mha": ONE_HEAD_EACH}
FRONT_END = {
    "mscnn_num_blocks": 1,
    "mscnn_hidden_size": 12,
    "mscnn_num_branches": 3,
    "wavelet": "db2",
    "wavelet_levels": 2,
    "t2t_num_hidden_layers": 0,
}
MIXTURE = {
    "intermediate_size": 72,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": DENSE_LAYERS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.7,
}
EVERY_QUERY = pytest.mark.parametrize("q_lora_rank", [None, 20])
EVERY_ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])
EVERY_TYPE = pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
EVERY_NORM = pytest.mark.parametrize("input_norm", INPUT_NORMS)
EXPERT_BACKENDS = ["eager", "batched_mm", "grouped_mm"]

ROOT = Path(__file__).resolve().parents[1]

few = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 2**16)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Several only wait for each other in a network this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_config(**overrides) -> SpaceExploreConfig:
    sizes = {
        **LATENT,
        **MIXTURE,
        **FRONT_END,
        "num_features": FEATURES,
        "horizons": HORIZONS,
        "quantile_levels": LEVELS,
    }
    # At the usual 0.02 so small a network hardly routes or attends, and a mistake there goes unseen.
    return SpaceExploreConfig(**{**sizes, "initializer_range": 0.1, "max_position_embeddings": 64, **overrides})


def make_model(seed: int = 0, **overrides) -> SpaceExploreForRegression:
    torch.manual_seed(seed)
    return SpaceExploreForRegression(make_config(**overrides)).eval()


@functools.cache
def shared_model() -> SpaceExploreForRegression:
    """For tests that only read it."""
    return make_model().requires_grad_(False)


def make_batch(seed: int = 0, batch: int = BATCH, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Random features with gaps, the first row left-padded, a fifth of the labels unknown."""
    generator = torch.Generator().manual_seed(seed)
    past_values = torch.randn(batch, steps, FEATURES, generator=generator)
    past_values[torch.rand(past_values.shape, generator=generator) < 0.2] = torch.nan
    attention_mask = torch.ones(batch, steps, dtype=torch.long)
    attention_mask[0, : steps // 4] = 0
    labels = 0.02 * torch.randn(batch, steps, len(HORIZONS), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100.0
    return {
        "past_values": past_values,
        "attention_mask": attention_mask,
        "scale": 0.01 + 0.02 * torch.rand(batch, steps, generator=generator),
        "labels": labels.masked_fill(attention_mask[..., None] == 0, -100.0),
    }


def random_weights(module: nn.Module) -> nn.Module:
    """Also norms, biases and routers, which start at a constant."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.eval()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: torch.zeros(()) if grad is None else grad for name, grad in zip(names, found, strict=True)}


def assert_same_forecast(actual, expected, at=..., **tolerance):
    """Everywhere, or `at` some of the (B, T) steps alone: a padded one is nobody's forecast."""
    assert_close(actual.mean[at], expected.mean[at], **tolerance)
    assert_close(actual.quantiles[at], expected.quantiles[at], **tolerance)


# --- the parts, against foreign implementations ---


def make_foreign_config(**overrides) -> DeepseekV3Config:
    return DeepseekV3Config(
        **{**LATENT, **MIXTURE, **overrides},
        num_key_value_heads=LATENT["num_attention_heads"],
        rope_interleave=False,
        n_group=1,
        topk_group=1,
        max_position_embeddings=64,
    )


def hidden_states(seed: int = 1) -> torch.Tensor:
    return torch.randn(BATCH, STEPS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def additive_mask() -> torch.Tensor:
    """Causal, the first row left-padded, (B, 1, T, T)."""
    allowed = torch.ones(STEPS, STEPS).tril().bool().expand(BATCH, 1, -1, -1).clone()
    allowed[0, :, 4:, :4] = False
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float).min)


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm_is_torchs(eps):
    ours, theirs = SpaceExploreRMSNorm(HIDDEN, eps), nn.RMSNorm(HIDDEN, eps)
    theirs.load_state_dict(random_weights(ours).state_dict())
    assert_close(ours(hidden_states()), theirs(hidden_states()))


def test_rms_norm_computes_in_float32():
    """The squares of these overflow half precision."""
    normed = SpaceExploreRMSNorm(HIDDEN).half()(torch.full((1, HIDDEN), 1000.0).half())
    assert normed.dtype == torch.float16
    assert_close(normed, torch.ones_like(normed))


ROPES = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 0.8},
]
EVERY_ROPE = pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])


def make_position_ids() -> torch.Tensor:
    return torch.arange(STEPS).expand(BATCH, -1) + torch.tensor([[0], [3], [40]])


@EVERY_ROPE
def test_rotary_embedding_is_deepseeks(rope):
    ours = SpaceExploreRotaryEmbedding(make_config(rope_parameters=dict(rope)))
    theirs = DeepseekV3RotaryEmbedding(make_foreign_config(rope_parameters=dict(rope)))
    for positions in (make_position_ids(), 5 * make_position_ids()):
        for actual, expected in zip(ours(hidden_states(), positions), theirs(hidden_states(), positions), strict=True):
            assert actual.shape == (BATCH, STEPS, LATENT["qk_rope_head_dim"])
            assert_close(actual, expected, rtol=0, atol=0)


@EVERY_ATTENTION
@EVERY_QUERY
@EVERY_ROPE
def test_latent_attention_is_deepseeks(attention, q_lora_rank, rope):
    sizes = {"q_lora_rank": q_lora_rank, "attn_implementation": attention, "attention_bias": rope is ROPES[0]}
    config = make_config(**sizes, rope_parameters=dict(rope))
    ours = random_weights(SpaceExploreLatentAttention(config, layer_idx=0))
    theirs = DeepseekV3Attention(make_foreign_config(**sizes, rope_parameters=dict(rope)), layer_idx=0).eval()
    theirs.load_state_dict(ours.state_dict())
    inputs = (hidden_states(), SpaceExploreRotaryEmbedding(config)(hidden_states(), make_position_ids()))
    assert_close(ours(*inputs, additive_mask())[0], theirs(*inputs, additive_mask())[0], rtol=1e-5, atol=1e-5)


@EVERY_ATTENTION
@pytest.mark.parametrize("sizes", [SHARED_HEADS, ONE_HEAD_EACH], ids=["gqa", "mha"])
@pytest.mark.parametrize("attention_bias", [False, True])
def test_attention_is_llamas(attention, sizes, attention_bias):
    sizes = {**sizes, "attention_bias": attention_bias, "attn_implementation": attention}
    config = make_config(**sizes)
    foreign = LlamaConfig(hidden_size=HIDDEN, num_hidden_layers=1, **{"num_key_value_heads": None, **sizes})
    ours, theirs = random_weights(SpaceExploreAttention(config, layer_idx=0)), LlamaAttention(foreign, layer_idx=0)
    theirs.eval().load_state_dict(ours.state_dict())
    rotary = SpaceExploreRotaryEmbedding(config)(hidden_states(), make_position_ids())
    for actual, expected in zip(
        rotary, LlamaRotaryEmbedding(foreign)(hidden_states(), make_position_ids()), strict=True
    ):
        assert_close(actual, expected, rtol=0, atol=0)
    inputs = (hidden_states(), rotary, additive_mask())
    assert_close(ours(*inputs)[0], theirs(*inputs)[0], rtol=1e-5, atol=1e-5)


def test_dense_layers_are_deepseeks():
    ours = random_weights(SpaceExploreMLP(make_config()))
    theirs = DeepseekV3MLP(make_foreign_config())
    theirs.load_state_dict(ours.state_dict())
    assert_close(ours(hidden_states()), theirs(hidden_states()), rtol=0, atol=0)
    kinds = [type(layer.mlp) for layer in shared_model().model.layers]
    assert kinds == [SpaceExploreMLP] * DENSE_LAYERS + [SpaceExploreMoE] * MOE_LAYERS


def by_expert(weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B*T, E), since the order in which the experts were chosen means nothing."""
    return torch.zeros(len(weights), EXPERTS).scatter(1, index, weights)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_router_is_deepseeks(norm_topk_prob):
    ours = random_weights(SpaceExploreTopkRouter(make_config(norm_topk_prob=norm_topk_prob)))
    theirs = DeepseekV3TopkRouter(make_foreign_config(norm_topk_prob=norm_topk_prob)).eval()
    assert theirs.load_state_dict(ours.state_dict(), strict=False).missing_keys == ["e_score_correction_bias"]
    logits, *chosen = ours(hidden_states())
    expected_logits, *expected = theirs(hidden_states())
    assert_close(logits, expected_logits)
    assert_close(by_expert(*chosen), by_expert(*expected))
    assert (by_expert(*chosen) > 0).sum(-1).eq(2).all()


def test_router_computes_in_float32():
    router = random_weights(SpaceExploreTopkRouter(make_config()))
    rounded = router.weight.bfloat16().float()
    logits, weights, _ = router.bfloat16()(hidden_states().bfloat16())
    assert logits.dtype == weights.dtype == torch.float32
    assert_close(logits, hidden_states().bfloat16().float().view(-1, HIDDEN) @ rounded.T)


def test_router_computes_in_float32_under_autocast():
    router = random_weights(SpaceExploreTopkRouter(make_config()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, weights, _ = router(hidden_states())
    assert_close((logits, weights), router(hidden_states())[:2], rtol=0, atol=0)


def make_mixtures(backend: str) -> tuple[SpaceExploreMoE, DeepseekV3MoE]:
    ours = random_weights(SpaceExploreMoE(make_config(experts_implementation=backend)))
    theirs = DeepseekV3MoE(make_foreign_config(experts_implementation="eager")).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours, theirs


@pytest.mark.parametrize("backend", EXPERT_BACKENDS)
def test_mixture_is_deepseeks_on_every_backend(backend):
    torch.manual_seed(0)
    ours, theirs = make_mixtures(backend)
    outputs, expected = ours(hidden_states()), theirs(hidden_states())
    assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(outputs)
    foreign = gradients(theirs, (expected * weights).sum())
    for name, gradient in gradients(ours, (outputs * weights).sum()).items():
        assert_close(gradient, foreign[name], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["batched_mm", "grouped_mm"])
def test_experts_backend_can_be_switched(backend, monkeypatch):
    """The library reads the source of the modeling file to decide whether it may, and is silent where it may not."""
    model, calls = make_model(), []
    assert model.config._experts_implementation == "grouped_mm"
    model.set_experts_implementation("eager")
    model.set_experts_implementation(backend)
    library = ALL_EXPERTS_FUNCTIONS[backend]
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping, backend, lambda *args: calls.append(backend) or library(*args)
    )
    model(**make_batch())
    assert calls == [backend] * MOE_LAYERS


# --- the heads ---


def random_quantiles(seed: int, size: float, **fields) -> torch.Tensor:
    torch.manual_seed(seed)
    head = SpaceExploreQuantileHead(make_config(**fields))
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=size)
    return head(hidden_states(seed))


@pytest.mark.parametrize("form", ["scale", "free"])
@pytest.mark.parametrize("levels", [[0.05], [0.2, 0.8], LEVELS, [i / 20 for i in range(1, 20)]], ids=len)
@few
@given(seed=seeds, size=st.sampled_from([0.01, 1.0, 30.0]))
def test_quantiles_never_cross(levels, form, seed, size):
    quantiles = random_quantiles(seed, size, quantile_levels=levels, quantile_form=form)
    assert quantiles.shape == (BATCH, STEPS, len(HORIZONS), len(levels))
    assert quantiles.isfinite().all()
    assert (quantiles.diff(dim=-1) >= 0).all()


@few
@given(seed=seeds)
def test_input_stretches_one_shape_alone(seed):
    """No input has a direction."""
    quantiles = random_quantiles(seed, 1.0, quantile_levels=[0.1, 0.3, 0.5, 0.7, 0.9]).flatten(0, 1)  # (N, H, 5)
    centre = quantiles[..., 2:3]
    assert_close(centre, centre[:1].expand_as(centre))
    offsets = quantiles - centre
    stretch = offsets[..., 4] - offsets[..., 0]  # (N, H)
    assert (stretch.std(dim=0) > 0.01 * stretch.mean(dim=0)).all()
    widest = offsets[stretch.argmax(dim=0), torch.arange(len(HORIZONS))]  # (H, 5)
    expected = (stretch / stretch.amax(dim=0)).unsqueeze(-1) * widest
    assert_close(offsets, expected, rtol=1e-3, atol=1e-5)


def test_free_quantiles_have_a_direction():
    quantiles = random_quantiles(0, 1.0, quantile_levels=[0.1, 0.5, 0.9], quantile_form="free").flatten(0, 1)
    assert quantiles[:, 0, 1].std() > 0.1
    down, up = quantiles[:, 0].diff(dim=-1).T
    assert ((up.diff() > 0) != (down.diff() > 0)).any()


def silence_heads(model: SpaceExploreForRegression):
    """What is left of their answers are the biases."""
    for head in (model.mean_head, model.quantile_head):
        for weight in (parameter for parameter in head.parameters() if parameter.ndim == 2):
            nn.init.zeros_(weight)


@pytest.mark.parametrize("form", [None, "free"])
@pytest.mark.parametrize("levels", [LEVELS, [0.5], [0.2, 0.8], [i / 20 for i in range(1, 20)]], ids=len)
def test_starts_from_the_marginal_distribution(levels, form):
    model = make_model(quantile_levels=levels, quantile_form=form)
    mean = torch.tensor([0.03, -0.05, 0.2])
    # Of Student's t with 2 degrees of freedom, whose quantiles have a closed form, moved and widened by horizon.
    p = torch.tensor(levels)
    quantiles = mean[:, None] + torch.tensor([[1.0], [0.7], [2.0]]) * (2 * p - 1) / (2 * p * (1 - p)).sqrt()
    model.start_from_marginal(mean, quantiles)
    silence_heads(model)
    outputs = model(make_batch()["past_values"])
    assert_close(outputs.mean, mean.expand(BATCH, STEPS, -1), rtol=0, atol=0)
    assert_close(outputs.quantiles, quantiles.expand(BATCH, STEPS, -1, -1), rtol=1e-5, atol=1e-5)


def assert_unit_normal(model: SpaceExploreForRegression):
    silence_heads(model)
    outputs = model(make_batch()["past_values"])
    expected = torch.tensor(norm.ppf(LEVELS), dtype=torch.float).expand_as(outputs.quantiles)
    assert_close(outputs.quantiles, expected, rtol=1e-5, atol=1e-5)
    assert_close(outputs.mean, torch.zeros_like(outputs.mean))


def test_new_network_predicts_unit_normal_quantiles():
    assert_unit_normal(make_model())


def test_new_head_on_a_trained_trunk_predicts_unit_normal_quantiles(tmp_path):
    shared_model().model.save_pretrained(tmp_path)
    model, info = SpaceExploreForRegression.from_pretrained(tmp_path, output_loading_info=True)
    assert all("head" in key for key in info["missing_keys"])
    assert_unit_normal(model)


@few
@given(seed=seeds, factor=st.floats(0.125, 8.0))
def test_forecast_is_proportional_to_scale(seed, factor):
    batch = make_batch(seed)
    scale = batch["scale"]
    once = shared_model()(batch["past_values"], scale=scale)
    assert_close(shared_model()(batch["past_values"], scale=factor * scale).mean, factor * once.mean)
    unit = shared_model()(batch["past_values"])
    step = scale[..., None] * torch.tensor([math.sqrt(horizon) for horizon in HORIZONS])
    assert_close(once.mean, unit.mean * step)
    assert_close(once.quantiles, unit.quantiles * step[..., None])


# --- properties of the whole network ---


@st.composite
def cuts(draw) -> tuple[int, int]:
    """Length of a series, and how much of it is known."""
    steps = draw(st.integers(2, 24))
    return steps, draw(st.integers(1, steps - 1))


def change_the_future(batch: dict, known: int, seed: int) -> dict:
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    other = make_batch(seed + 1, steps=batch["scale"].shape[1])
    changed["past_values"][:, known:] = 5 * other["past_values"][:, known:] + 1
    changed["scale"][:, known:] = 3 * other["scale"][:, known:]
    changed["labels"][:, known:] = 2 * other["labels"][:, known:]
    return changed


@functools.cache
def causal_model(attention: str = "sdpa", backend: str = "batched_mm", **overrides) -> SpaceExploreForRegression:
    model = make_model(attn_implementation=attention, experts_implementation=backend, **overrides)
    return model.requires_grad_(False)


# Other backends group tokens by expert, so that the future changes the shape, and the rounding, of their products.
@pytest.mark.parametrize(("backend", "tolerance"), [("batched_mm", 0.0), ("grouped_mm", 1e-6), ("eager", 1e-6)])
@EVERY_ATTENTION
@few
@given(cut=cuts(), seed=seeds, padded=st.booleans())
def test_future_never_reaches_a_forecast(attention, backend, tolerance, cut, seed, padded):
    steps, known = cut
    model, batch = causal_model(attention, backend), make_batch(seed, steps=steps)
    if not padded:
        del batch["attention_mask"]
    real = batch.get("attention_mask", torch.ones(BATCH, steps)).bool()
    before, after = model(**batch), model(**change_the_future(batch, known, seed))
    assert_same_forecast(after, before, real & (torch.arange(steps) < known), rtol=0, atol=tolerance)
    assert not torch.equal(after.mean[:, known:], before.mean[:, known:])


def test_every_earlier_day_reaches_a_forecast():
    """A network that looks at today alone is causal too."""
    values = make_batch()["past_values"].nan_to_num().requires_grad_()
    model = make_model(num_hidden_layers=1)
    (gradient,) = torch.autograd.grad(model(values).mean[:, -1].sum(), values)
    assert (gradient.abs().amax(dim=-1) > 0).all()


@functools.cache
def market_model(attention_type: str, input_norm: str) -> SpaceExploreForRegression:
    """One that was trained for a few steps, so that running statistics and slopes are not those of a new one."""
    model = make_model(input_norm=input_norm, **ATTENTION_TYPES[attention_type], experts_implementation="batched_mm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        model.train()(**make_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


@EVERY_TYPE
@EVERY_NORM
@few
@given(cut=cuts(), seed=seeds)
def test_future_never_reaches_a_forecast_of_any_network(attention_type, input_norm, cut, seed):
    steps, known = cut
    model, batch = market_model(attention_type, input_norm), make_batch(seed, steps=steps)
    real = batch["attention_mask"].bool() & (torch.arange(steps) < known)
    before, after = model(**batch), model(**change_the_future(batch, known, seed))
    assert_same_forecast(after, before, real, rtol=0, atol=0)


@EVERY_TYPE
@EVERY_NORM
@few
@given(seed=seeds, batch_size=st.integers(2, 5), steps=st.integers(1, 16))
def test_other_rows_of_a_batch_change_nothing(attention_type, input_norm, seed, batch_size, steps):
    batch, model = make_batch(seed, batch_size, steps), market_model(attention_type, input_norm)
    del batch["labels"]
    together = model(**batch)
    for row in range(batch_size):
        alone = model(**{name: tensor[row : row + 1] for name, tensor in batch.items()})
        real = batch["attention_mask"][row].bool()
        assert_close(alone.mean[0, real], together.mean[row, real], rtol=0, atol=1e-5)
        assert_close(alone.quantiles[0, real], together.quantiles[row, real], rtol=0, atol=1e-5)


@EVERY_TYPE
@EVERY_NORM
@few
@given(seed=seeds, padding=st.integers(1, 9), garbage=st.sampled_from([math.nan, math.inf, 0.0, 1e6, -1e30]))
def test_left_padding_changes_nothing(attention_type, input_norm, seed, padding, garbage):
    model, batch = market_model(attention_type, input_norm), make_batch(seed)
    values, scale = batch["past_values"], batch["scale"]
    rows = torch.full((BATCH, padding), garbage)
    padded = model(
        torch.cat((rows[..., None].expand(-1, -1, FEATURES), values), dim=1),
        attention_mask=torch.cat((torch.zeros_like(rows), torch.ones_like(scale)), dim=1).long(),
        scale=torch.cat((rows, scale), dim=1),
    )
    plain = model(values, scale=scale)
    assert_close(padded.mean[:, padding:], plain.mean, rtol=0, atol=1e-5)
    assert_close(padded.quantiles[:, padding:], plain.quantiles, rtol=0, atol=1e-5)


@EVERY_NORM
@few
@given(seed=seeds, share=st.sampled_from([0.1, 0.5, 1.0]), missing=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_missing_values_never_spread(input_norm, seed, share, missing):
    values = torch.randn(BATCH, STEPS, FEATURES, generator=torch.Generator().manual_seed(seed))
    values[torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) < share] = missing
    outputs = market_model("mla", input_norm)(values)
    assert outputs.mean.isfinite().all()
    assert outputs.quantiles.isfinite().all()


def test_only_distances_in_time_matter():
    values, positions = make_batch()["past_values"], torch.arange(STEPS).expand(BATCH, -1)
    expected = shared_model()(values)
    assert_same_forecast(shared_model()(values, position_ids=positions + 17), expected, rtol=0, atol=1e-5)
    stretched = shared_model()(values, position_ids=2 * positions, attention_mask=torch.ones(BATCH, STEPS))
    assert (stretched.mean - expected.mean).abs().max() > 1e-4


def test_eager_and_sdpa_agree():
    batch = make_batch()
    eager, sdpa = (causal_model(attention, "grouped_mm")(**batch) for attention in ("eager", "sdpa"))
    assert_same_forecast(eager, sdpa, batch["attention_mask"].bool(), rtol=0, atol=1e-6)
    assert_close(eager.loss, sdpa.loss)


# --- the cache ---


@pytest.mark.parametrize("chunks", [(5, 4, 3), (4, *(1,) * (STEPS - 4)), (11, 1)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "sizes", [*ATTENTION_TYPES.values(), {"q_lora_rank": 20}], ids=[*ATTENTION_TYPES, "low-rank query"]
)
def test_cached_equals_uncached(chunks, padded, sizes):
    """The history is given whole each time, because the multi-scale CNN looks back; only new steps are decoded."""
    model, batch = make_model(**sizes).requires_grad_(False), make_batch()
    mask = batch["attention_mask"] if padded else torch.ones_like(batch["attention_mask"])
    expected = model(batch["past_values"], attention_mask=mask, scale=batch["scale"], use_cache=False)
    cache, end = DynamicCache(config=model.config), 0
    for chunk in chunks:
        start, end = end, end + chunk
        part = model(
            batch["past_values"][:, :end],
            attention_mask=mask[:, :end] if padded else None,
            scale=batch["scale"][:, :end],
            cache=cache,
        )
        real = mask[:, start:end].bool()
        assert part.mean.shape[1] == end - start
        assert_close(part.mean[real], expected.mean[:, start:end][real], rtol=0, atol=1e-5)
        assert_close(part.quantiles[real], expected.quantiles[:, start:end][real], rtol=0, atol=1e-5)


def test_absorbed_is_expanded(monkeypatch):
    model, values = make_model().requires_grad_(False), make_batch()["past_values"].nan_to_num()
    calls = []
    absorb = SpaceExploreLatentAttention.attend_to_latents
    monkeypatch.setattr(
        SpaceExploreLatentAttention, "attend_to_latents", lambda *args: calls.append(args[0]) or absorb(*args)
    )

    def newest(allowed: bool) -> torch.Tensor:
        monkeypatch.setattr(SpaceExploreLatentAttention, "can_absorb", lambda attention: allowed)
        cache = model(values[:, :-1], use_cache=True).cache
        return model(values, cache=cache, output_attentions=True).quantiles

    expanded = newest(allowed=False)
    assert calls == []
    assert_close(newest(allowed=True), expanded, rtol=0, atol=1e-5)
    assert len(calls) == LAYERS


def test_refuses_new_steps_without_their_history():
    values = make_batch()["past_values"]
    cache = shared_model()(values, use_cache=True).cache
    with pytest.raises(ValueError, match=f"the {STEPS} steps in the cache and newer ones; got 1 steps"):
        shared_model()(values[:, :1], cache=cache)


def test_cache_holds_single_head_latents():
    outputs = shared_model()(make_batch()["past_values"], use_cache=True)
    assert len(outputs.cache.layers) == LAYERS
    for layer in outputs.cache.layers:
        assert layer.keys.shape == (BATCH, 1, STEPS, LATENT["kv_lora_rank"])
        assert layer.values.shape == (BATCH, 1, STEPS, LATENT["qk_rope_head_dim"])


def test_cache_is_not_made_when_it_is_not_wanted():
    assert shared_model()(make_batch()["past_values"], use_cache=False).cache is None


# --- the loss ---


def test_pinball_loss_is_scikit_learns():
    targets, quantiles = torch.randn(50, dtype=torch.double), torch.randn(50, len(LEVELS), dtype=torch.double)
    losses = pinball_loss(targets, quantiles, torch.tensor(LEVELS, dtype=torch.double))
    expected = [mean_pinball_loss(targets, q, alpha=level) for q, level in zip(quantiles.T, LEVELS, strict=True)]
    assert losses.shape == (50,)
    assert losses.mean().item() == pytest.approx(sum(expected) / len(LEVELS))


def plain_loss(model: SpaceExploreForRegression, batch: dict) -> tuple[float, int]:
    """Sum over the known labels, and their number, by the definition and one at a time."""
    outputs = model(batch["past_values"], attention_mask=batch["attention_mask"])
    mean, quantiles = outputs.mean.tolist(), outputs.quantiles.tolist()
    scale, labels = batch["scale"].tolist(), batch["labels"].tolist()
    total, count = 0.0, 0
    for b, t, h in torch.cartesian_prod(*map(torch.arange, batch["labels"].shape)).tolist():
        if labels[b][t][h] == -100:
            continue
        target = labels[b][t][h] / (scale[b][t] * math.sqrt(HORIZONS[h]))
        total += model.config.mean_loss_weight * (mean[b][t][h] - target) ** 2
        for level, quantile in zip(LEVELS, quantiles[b][t][h], strict=True):
            error = target - quantile
            total += model.config.quantile_loss_weight * max(level * error, (level - 1) * error) / len(LEVELS)
        count += 1
    return total, count


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.0), (0.0, 1.3), (0.7, 1.3)], ids=str)
def test_loss_is_its_definition(weights):
    model, batch = make_model(mean_loss_weight=weights[0], quantile_loss_weight=weights[1]), make_batch()
    total, count = plain_loss(model, batch)
    assert 0 < count < batch["labels"].numel()
    assert model(**batch).loss.item() == pytest.approx(total / count, rel=1e-5)
    assert model(**batch, num_items_in_batch=1000).loss.item() == pytest.approx(total / 1000, rel=1e-5)
    assert model(**batch, num_items_in_batch=torch.tensor(7)).loss.item() == pytest.approx(total / 7, rel=1e-5)


def test_loss_is_the_same_with_and_without_the_scaled_outputs():
    batch = make_batch()
    outputs = shared_model()(**batch)
    assert_same_forecast(outputs, shared_model()(**{**batch, "labels": None}), rtol=0, atol=0)
    assert shared_model()(**{**batch, "labels": None}).loss is None


def test_micro_batches_add_up_to_the_large_batch():
    model, batch = make_model(router_aux_loss_coef=0.0).train(), make_batch(batch=4)
    items = (batch["labels"] != -100).sum()
    whole = model(**batch, num_items_in_batch=items).loss
    parts = [
        model(**{name: tensor[rows] for name, tensor in batch.items()}, num_items_in_batch=items).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert_close(whole, model(**batch).loss)
    assert_close(sum(parts), whole)
    expected = gradients(model, whole)
    for name, gradient in gradients(model, sum(parts)).items():
        assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_micro_batches_weigh_the_load_balancing_loss_by_their_labels():
    """The same rows twice: had each micro-batch its whole load-balancing loss, two would count it twice."""
    model, batch = make_model(router_aux_loss_coef=0.5).train(), make_batch()
    items = 2 * (batch["labels"] != -100).sum()
    assert_close(2 * model(**batch, num_items_in_batch=items).loss, model(**batch).loss)


@pytest.mark.parametrize("items", [None, 0, 50])
def test_nothing_to_learn_is_no_loss(items):
    """No label is known. `items` as the trainer counts them."""
    model, batch = make_model().train(), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100.0)
    loss = model(**batch, num_items_in_batch=items).loss
    assert loss.item() == 0
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


def test_padded_scale_is_never_divided_by():
    model, batch = make_model().train(), make_batch()
    expected = model(**batch).loss
    batch["scale"] = batch["scale"].masked_fill(batch["attention_mask"] == 0, 0.0)
    loss = model(**batch).loss
    assert_close(loss, expected, rtol=0, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


def mixtrals_loss(layers: tuple[torch.Tensor, ...], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Of each layer by itself, on average."""
    return sum(load_balancing_loss_func((layer,), EXPERTS, 2, mask) for layer in layers) / len(layers)


def test_load_balancing_loss_is_mixtrals_over_unpadded_steps():
    model, batch = make_model(), make_batch()
    outputs = model(**batch, output_router_logits=True)
    logits, mask = outputs.router_logits, batch["attention_mask"]
    assert_close(outputs.aux_loss, mixtrals_loss(logits, mask))
    real = tuple(layer[mask.flatten().bool()] for layer in logits)
    assert_close(outputs.aux_loss, mixtrals_loss(real))
    assert not torch.isclose(outputs.aux_loss, mixtrals_loss(logits))


def test_favourites_of_one_layer_do_not_make_up_for_those_of_another():
    """Each of two layers asks half of the experts alone: together they ask all alike, and neither is in balance."""
    halves = torch.full((2, 100, EXPERTS), -20.0)
    halves[0, :, : EXPERTS // 2] = halves[1, :, EXPERTS // 2 :] = 0.0
    layers = tuple(halves + 1e-3 * torch.rand(halves.shape, generator=torch.Generator().manual_seed(0)))
    outputs = MoeModelOutputWithPast(last_hidden_state=torch.zeros(1, 100, 4), router_logits=layers)
    assert load_balancing_loss_func(layers, EXPERTS, 2).item() == pytest.approx(2, rel=1e-3)
    assert make_model().load_balancing_loss(outputs, None).item() == pytest.approx(4, rel=1e-2)


def test_load_balancing_loss_is_part_of_the_training_loss_alone():
    model, batch = make_model(router_aux_loss_coef=0.5), make_batch()
    total, count = plain_loss(model, batch)
    evaluated, trained = model.eval()(**batch), model.train()(**batch)
    assert evaluated.aux_loss is None
    assert evaluated.router_logits is None
    assert evaluated.loss.item() == pytest.approx(total / count, rel=1e-5)
    assert_close(trained.loss, evaluated.loss + 0.5 * trained.aux_loss)


def test_expert_load_is_a_count_of_the_chosen():
    model, batch = make_model(), make_batch()
    outputs = model(**batch, output_router_logits=True)
    load = model.expert_load(outputs.router_logits, batch["attention_mask"])
    real = batch["attention_mask"].flatten().bool()
    for row, logits in zip(load, outputs.router_logits, strict=True):
        chosen = [
            expert for token in logits[real].tolist() for expert in sorted(range(EXPERTS), key=token.__getitem__)[-2:]
        ]
        assert_close(row, torch.tensor([chosen.count(expert) / len(chosen) for expert in range(EXPERTS)]))
    assert load.shape == (MOE_LAYERS, EXPERTS)


def test_a_dense_network_has_no_load_to_balance():
    model, batch = make_model(first_k_dense_replace=LAYERS), make_batch()
    outputs = model.train()(**batch)
    assert outputs.aux_loss is None
    assert_close(outputs.loss, model.eval()(**batch).loss)


# --- directions ---


def make_classifier(**overrides) -> SpaceExploreForClassification:
    torch.manual_seed(0)
    return SpaceExploreForClassification(make_config(**overrides)).eval()


def plain_direction(label: float, scale: float, horizon: int, band: float) -> int:
    if label == -100:
        return -100
    move = label / (scale * math.sqrt(horizon))
    return 0 if move < -band else 2 if move > band else 1


@pytest.mark.parametrize("band", [0.0, 0.25, 1.1])
def test_classification_loss_is_its_definition(band):
    model, batch = make_classifier(flat_band=band), make_batch()
    outputs = model(**batch)
    assert outputs.logits.shape == (BATCH, STEPS, len(HORIZONS), 3)
    probabilities = outputs.logits.softmax(-1).tolist()
    total, count, seen = 0.0, 0, set()
    for b, t, h in torch.cartesian_prod(*map(torch.arange, batch["labels"].shape)).tolist():
        which = plain_direction(batch["labels"][b, t, h].item(), batch["scale"][b, t].item(), HORIZONS[h], band)
        if which != -100:
            total, count = total - math.log(probabilities[b][t][h][which]), count + 1
            seen.add(which)
    assert seen == ({0, 2} if band == 0 else {0, 1, 2})
    assert outputs.loss.item() == pytest.approx(total / count, rel=1e-5)
    assert model(**batch, num_items_in_batch=1000).loss.item() == pytest.approx(total / 1000, rel=1e-5)


def test_classes_have_their_names():
    assert make_config().id2label == {0: "down", 1: "flat", 2: "up"}


def test_classification_is_causal():
    model, batch = make_classifier(experts_implementation="batched_mm"), make_batch()
    before, after = model(**batch).logits, model(**change_the_future(batch, 7, seed=0)).logits
    real = batch["attention_mask"].bool() & (torch.arange(STEPS) < 7)
    assert_close(after[real], before[real], rtol=0, atol=0)
    assert not torch.equal(after[:, 7:], before[:, 7:])


def test_classification_trains_with_the_load_balancing_loss():
    model, batch = make_classifier(router_aux_loss_coef=0.5), make_batch()
    evaluated, trained = model(**batch), model.train()(**batch)
    assert evaluated.aux_loss is None
    assert_close(trained.loss, evaluated.loss + 0.5 * trained.aux_loss)


# --- gradients ---


@pytest.mark.parametrize("backend", EXPERT_BACKENDS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"q_lora_rank": 20, "attention_bias": True, "input_norm": "batch"},
        {**SHARED_HEADS, "input_norm": "rms"},
        {**ONE_HEAD_EACH, "mscnn_num_blocks": 2},
    ],
    ids=["default", "low-rank query", "gqa", "mha"],
)
@pytest.mark.parametrize("head", [SpaceExploreForRegression, SpaceExploreForClassification])
def test_every_parameter_gets_a_gradient(head, backend, sizes):
    """Without exception: there is no extractor here. tests/test_t2t.py and tests/test_causal_lm.py have theirs."""
    torch.manual_seed(0)
    # Steps enough for every expert to be chosen.
    model, batch = head(make_config(experts_implementation=backend, **sizes)).train(), make_batch(batch=8, steps=48)
    assert batch["past_values"].isnan().any(dim=(0, 1)).all()
    found = gradients(model, model(**batch).loss)
    assert [name for name, gradient in found.items() if not gradient.any()] == []
    assert [name for name, gradient in found.items() if not gradient.isfinite().all()] == []
    experts = [gradient for name, gradient in found.items() if ".experts." in name]
    assert len(experts) == 2 * MOE_LAYERS
    assert all(gradient.flatten(1).any(dim=1).all() for gradient in experts)


@pytest.mark.parametrize("backend", EXPERT_BACKENDS)
def test_router_learns_from_the_forecast_itself(backend):
    model = make_model(router_aux_loss_coef=0.0, experts_implementation=backend).train()
    found = gradients(model, model(**make_batch()).loss)
    routers = [gradient for name, gradient in found.items() if name.endswith("gate.weight")]
    assert len(routers) == MOE_LAYERS
    assert all(gradient.abs().max() > 1e-6 for gradient in routers)


def test_gradient_checkpointing_changes_no_gradient():
    model, batch = make_model().train(), make_batch()
    expected = model(**batch).loss
    expected_gradients = gradients(model, expected)
    model.activation_checkpointing_enable()
    assert any(layer.gradient_checkpointing for layer in model.model.layers)
    loss = model(**batch).loss
    # Checkpointing runs the layers again only for a backward pass that accumulates.
    loss.backward()
    assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected_gradients[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dropout", ["attention_dropout", "hidden_dropout", "input_noise"])
def test_dropout_is_for_training_alone(dropout):
    model, batch = make_model(**{dropout: 0.5}), make_batch()
    assert_same_forecast(model(**batch), shared_model()(**batch))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(**batch).mean, model(**batch).mean)


def test_hidden_dropout_is_on_every_branch():
    """Without any, what is left is the embedding."""
    trunk, values = make_model(hidden_dropout=1.0).train().model, make_batch()["past_values"]
    assert_close(trunk(values).last_hidden_state, trunk.norm(trunk.embed_values(values, None)))


# --- what the library expects ---


def test_recorded_outputs():
    model, values = make_model(attn_implementation="eager"), make_batch()["past_values"]
    outputs = model(values, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    heads = LATENT["num_attention_heads"]
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(BATCH, STEPS, HIDDEN)] * (LAYERS + 1)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(BATCH, heads, STEPS, STEPS)] * LAYERS
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(BATCH * STEPS, EXPERTS)] * MOE_LAYERS
    assert_close(outputs.hidden_states[0], model.model.embed_values(values, None))
    assert_close(outputs.hidden_states[-1], model.model(values).last_hidden_state)
    for weights in outputs.attentions:
        assert_close(weights.sum(-1), torch.ones(BATCH, heads, STEPS))
        assert not weights.triu(1).any()


def test_nothing_is_recorded_unasked():
    outputs = shared_model()(make_batch()["past_values"])
    assert outputs.hidden_states is outputs.attentions is outputs.router_logits is outputs.loss is None


def test_outputs_are_a_tuple_when_asked():
    values = make_batch()["past_values"]
    outputs = shared_model()(values, return_dict=False)
    assert isinstance(outputs, tuple)
    assert_close(outputs[0], shared_model()(values).mean)


def test_bfloat16():
    """The heads answer in float32, where steps between quantiles are not rounded away."""
    model, batch = make_model().bfloat16().train(), make_batch()
    unscaled, outputs = model(batch["past_values"]), model(**batch)
    assert unscaled.mean.dtype == unscaled.quantiles.dtype == outputs.loss.dtype == torch.float32
    assert outputs.mean.isfinite().all()
    assert (outputs.quantiles.diff(dim=-1) >= 0).all()
    assert outputs.loss.item() == pytest.approx(make_model().train()(**batch).loss.item(), rel=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients(model, outputs.loss).values())


@EVERY_NORM
def test_compiles_without_graph_breaks(input_norm):
    model, batch = make_model(input_norm=input_norm).requires_grad_(False), make_batch()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    outputs = compiled(**batch)
    assert_same_forecast(outputs, model(**batch))
    assert_close(outputs.loss, model(**batch).loss)


def test_flex_attention_agrees():
    batch = {name: make_batch()[name] for name in ("past_values", "attention_mask", "scale")}
    flex, sdpa = (
        make_model(num_hidden_layers=1, attn_implementation=attention).requires_grad_(False)
        for attention in ("flex_attention", "sdpa")
    )
    assert_same_forecast(flex(**batch), sdpa(**batch), batch["attention_mask"].bool(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters", "tolerance"), [("5m", 5e6, 0.05), ("27m", 27e6, 0.03), ("300m", 300e6, 0.05)]
)
def test_presets_are_as_large_as_they_are_called(name, parameters, tolerance):
    config = SpaceExploreConfig.from_json_file(ROOT / "recipes" / name / "config.json")
    with torch.device("meta"):
        model = SpaceExploreForRegression(config)
    assert model.num_parameters() == pytest.approx(parameters, rel=tolerance)
    assert config.num_features == 64


def test_defaults_are_the_27m_preset():
    """But for what its recipe trains with, and what is no part of the network."""
    preset = SpaceExploreConfig.from_json_file(ROOT / "recipes" / "27m" / "config.json").to_dict()
    training = {name: preset[name] for name in ("input_noise", "mean_loss_weight")}
    assert preset == SpaceExploreConfig().to_dict() | training


def test_parallel_plans_name_what_is_there():
    """The patterns of tensor, expert and pipeline plans."""
    config = make_config()
    names = [name for name, _ in shared_model().model.named_parameters()]
    modules = [name for name, _ in shared_model().model.named_modules()]
    for plan in (config.base_model_tp_plan, config.base_model_ep_plan, config.base_model_pp_plan):
        for pattern in plan:
            regex = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"(\.weight)?")
            assert any(map(regex.fullmatch, names + modules)), pattern
    for plan in (SpaceExploreForRegression._tp_plan, SpaceExploreForRegression._pp_plan):
        assert all(hasattr(shared_model(), name) for name in plan)


# --- saving and loading ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[SpaceExploreForRegression, Path]:
    model = random_weights(make_model(rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return model, folder


def test_quantised_weights_forecast_too():
    """Half of a network's tensors are of other types then, or no tensors."""
    batch = {name: tensor for name, tensor in make_batch().items() if name != "labels"}
    quantised = torch.ao.quantization.quantize_dynamic(make_model().eval(), {torch.nn.Linear}, dtype=torch.qint8)
    assert_close(quantised(**batch).quantiles, make_model().eval()(**batch).quantiles, rtol=0.2, atol=2e-3)


def test_a_pipeline_that_is_not_there_is_not_promised(tmp_path):
    pipelines = {"a-task": {"impl": "pipeline_spaceexplore.SpaceExplorePipeline", "pt": ["AutoModel"]}}
    model = SpaceExploreForRegression(make_config(custom_pipelines=pipelines))
    model.save_pretrained(tmp_path / "without")
    (tmp_path / "with").mkdir()
    (tmp_path / "with" / "pipeline_spaceexplore.py").touch()
    model.save_pretrained(tmp_path / "with")
    without, with_ = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("without", "with"))
    assert "custom_pipelines" not in without
    assert with_["custom_pipelines"] == model.config.custom_pipelines == pipelines


def test_saved_and_loaded_is_the_same(saved):
    model, folder = saved
    loaded, info = SpaceExploreForRegression.from_pretrained(folder, output_loading_info=True)
    assert {problem: found for problem, found in info.items() if found} == {}
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    # Matrix products round by where in memory the weights lie.
    assert_same_forecast(loaded(**make_batch()), model(**make_batch()), rtol=1e-5, atol=1e-7)


def test_buffers_that_are_not_saved_are_computed_again(saved):
    """The library loads on no device at all and leaves them as whatever lay in memory."""
    model, folder = saved
    buffers = dict(SpaceExploreForRegression.from_pretrained(folder).named_buffers())
    expected = torch.tensor([500.0 ** -(i / LATENT["qk_rope_head_dim"]) for i in (0, 2)])
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert_close(buffers["model.rotary_emb.inv_freq"], expected)
    assert_close(buffers["model.rotary_emb.original_inv_freq"], expected)


def test_trunk_loads_from_a_checkpoint_with_heads(saved):
    model, folder = saved
    trunk, info = SpaceExploreModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert all("head" in key for key in info["unexpected_keys"])
    values = make_batch()["past_values"]
    assert_close(trunk(values).last_hidden_state, model.model(values).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_checkpoint_holds_its_code(saved):
    _, folder = saved
    files = {path.name for path in folder.iterdir()}
    assert {"configuration_spaceexplore.py", "modeling_spaceexplore.py", "model.safetensors"} <= files
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["SpaceExploreForRegression"]


# --- bad input ---


def test_loads_onto_a_device_map(saved):
    _, folder = saved
    loaded = SpaceExploreForRegression.from_pretrained(folder, device_map={"": "cpu"}, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded(**make_batch()).mean.isfinite().all()


@pytest.mark.parametrize(
    ("auto", "head"),
    [
        (AutoModel, SpaceExploreModel),
        (AutoModelForCausalLM, SpaceExploreForCausalLM),
        (AutoModelForPreTraining, SpaceExploreForTimeToText),
        (AutoModelForSequenceClassification, SpaceExploreForClassification),
        (AutoModelForTimeSeriesPrediction, SpaceExploreForRegression),
    ],
)
def test_auto_classes_know_every_head(auto, head, saved):
    _, folder = saved
    sizes = {"vocab_size": 30, "t2t_num_hidden_layers": 1, "t2t_hidden_size": 16, "t2t_num_attention_heads": 2}
    assert type(auto.from_config(make_config(**sizes))) is head
    assert type(auto.from_pretrained(folder, config=make_config(**sizes))) is head


@pytest.mark.parametrize("shape", [(BATCH, STEPS, FEATURES + 1), (STEPS, FEATURES), (1, 0, FEATURES)], ids=str)
def test_refuses_a_shape(shape):
    with pytest.raises(ValueError, match=rf"past_values must be .*{FEATURES} features.*got {re.escape(str(shape))}"):
        shared_model()(torch.zeros(shape))


def test_refuses_a_context_that_is_too_long():
    assert shared_model()(torch.zeros(1, 64, FEATURES)).mean.shape == (1, 64, len(HORIZONS))
    with pytest.raises(ValueError, match="context of 65 steps is longer than max_position_embeddings=64"):
        shared_model()(torch.zeros(1, 65, FEATURES))


def test_refuses_labels_without_scale():
    batch = make_batch()
    with pytest.raises(ValueError, match=r"labels need scale.*got scale=None"):
        shared_model()(batch["past_values"], labels=batch["labels"])


@pytest.mark.parametrize("horizons", [1, 4])
def test_refuses_labels_of_other_horizons(horizons):
    batch = make_batch()
    batch["labels"] = torch.zeros(BATCH, STEPS, horizons)
    with pytest.raises(ValueError, match=rf"3 horizons \[1, 2, 5\].*got \({BATCH}, {STEPS}, {horizons}\)"):
        shared_model()(**batch)


def test_refuses_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=rf"as past_values, \({BATCH}, {STEPS}\), got \({BATCH}, {STEPS + 1}\)"):
        shared_model()(make_batch()["past_values"], attention_mask=torch.ones(BATCH, STEPS + 1))


def test_refuses_a_row_without_a_step():
    batch = make_batch()
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="row 1 of the batch is masked as a whole"):
        shared_model()(**batch)


def test_refuses_to_read_nothing():
    with pytest.raises(ValueError, match="needs past_values, or input_ids or inputs_embeds; got none of them"):
        shared_model().model()


def test_refuses_a_cached_context_that_is_too_long():
    cache = shared_model()(torch.zeros(1, 60, FEATURES), use_cache=True).cache
    with pytest.raises(ValueError, match="context of 65 steps is longer than max_position_embeddings=64"):
        shared_model()(torch.zeros(1, 65, FEATURES), cache=cache)
