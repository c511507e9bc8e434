"""The causal language model: placeholders that read as the numbers they stand for, generation, loss, contracts."""

import copy
import functools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import add_fused_lm_head

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.modeling_spaceexplore import (
    SpaceExploreForCausalLM,
    SpaceExploreForRegression,
    SpaceExploreLatentAttention,
    SpaceExploreModel,
)
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer

# Ragged, so that rows are padded on the left.
ROWS, DAYS = (9, 11, 6), 5
BATCH, FEATURES, VOCABULARY, LAYERS, EXPERTS = len(ROWS), 5, 23, 3, 7
PAD, BOS, EOS, UNK, TS = SPECIAL = range(5)
GARBAGE = 1e4
# No two alike, sums included: with equal sizes a wrong scale or axis goes unseen.
SIZES = {
    "num_features": FEATURES,
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 16,
    "intermediate_size": 72,
    "moe_intermediate_size": 40,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
    "mscnn_num_blocks": 1,
    "mscnn_hidden_size": 12,
    "mscnn_num_branches": 3,
    "wavelet": "db2",
    "wavelet_levels": 2,
    "t2t_num_hidden_layers": 0,
    "max_position_embeddings": 64,
}
TIME_TO_TEXT = {
    "t2t_num_hidden_layers": 1,
    "t2t_hidden_size": 20,
    "t2t_num_attention_heads": 2,
    "t2t_intermediate_size": 28,
    "t2t_patch_length": 6,
    "t2t_patch_overlap": 2,
    "t2t_loss_weight": 0.3,
}
ATTENTION_TYPES = {
    "mla": {},
    "gqa": {"attention_type": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10},
    "mha": {"attention_type": "mha", "num_attention_heads": 4, "head_dim": 6},
}
EVERY_TYPE = pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
STRATEGIES = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "several": {"do_sample": True, "temperature": 1.3, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
}
few = settings(max_examples=15, deadline=None)


def make_config(attention_type: str = "mla", **overrides) -> SpaceExploreConfig:
    # At the usual 0.02 so small a network hardly routes or attends, and a mistake there goes unseen.
    return SpaceExploreConfig(**{**SIZES, **ATTENTION_TYPES[attention_type], "initializer_range": 0.1, **overrides})


def make_model(attention_type: str = "mla", seed: int = 0, **overrides) -> SpaceExploreForCausalLM:
    torch.manual_seed(seed)
    return SpaceExploreForCausalLM(make_config(attention_type, **overrides)).eval()


@functools.cache
def shared_model(attention_type: str = "mla", attention: str = "sdpa") -> SpaceExploreForCausalLM:
    """For tests that only read it."""
    return make_model(attention_type, attn_implementation=attention).requires_grad_(False)


def left_padded(rows: list[torch.Tensor], length: int, filler: float) -> torch.Tensor:
    widths = [(*[0, 0] * (row.ndim - 1), length - len(row), 0) for row in rows]
    return torch.stack([F.pad(row, width, value=filler) for row, width in zip(rows, widths, strict=True)])


def make_batch(
    steps: tuple[int, ...] = ROWS, answers: int = 0, token_padding: int = 0, value_padding: int = 0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """For each row so many `<ts>`, `<bos>` and random answers; its values have gaps, and garbage where padded."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(count, FEATURES, generator=generator) for count in steps]
    values = [row.masked_fill(torch.rand(row.shape, generator=generator) < 0.2, torch.nan) for row in values]
    returns = torch.randint(len(SPECIAL), VOCABULARY, (len(steps), answers), generator=generator)
    tokens = [torch.tensor([*[TS] * count, BOS, *row]) for count, row in zip(steps, returns, strict=True)]
    length, most = max(map(len, tokens)) + token_padding, max(steps) + value_padding
    return {
        "input_ids": left_padded(tokens, length, PAD),
        "attention_mask": left_padded([torch.ones_like(row) for row in tokens], length, 0),
        "past_values": left_padded(values, most, GARBAGE),
        "past_values_mask": left_padded([torch.ones(count, dtype=torch.long) for count in steps], most, 0),
    }


def make_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The answers, of which a fifth is unknown."""
    labels = batch["input_ids"].masked_fill(batch["input_ids"] < len(SPECIAL), -100)
    return labels.masked_fill(torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.2, -100)


def one_row(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """Of a batch without its padding and, having none, without its masks."""
    real, steps = batch["attention_mask"][row].bool(), batch["past_values_mask"][row].bool()
    return {"input_ids": batch["input_ids"][row, real][None], "past_values": batch["past_values"][row, steps][None]}


def extended(batch: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    ids, mask = torch.cat((batch["input_ids"], tokens), 1), batch["attention_mask"]
    return {**batch, "input_ids": ids, "attention_mask": F.pad(mask, (0, tokens.shape[1]), value=1)}


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of all that is not frozen."""
    names, parameters = zip(*[item for item in model.named_parameters() if item[1].requires_grad], strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: torch.zeros(()) if grad is None else grad for name, grad in zip(names, found, strict=True)}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_where_real(actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor):
    assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


# --- placeholders ---


def test_a_batch_is_what_the_tokenizer_makes_of_prompts():
    tokenizer = SpaceExploreTokenizer(num_bins=VOCABULARY - len(SPECIAL))
    texts = [tokenizer.prompt(steps) for steps in ROWS]
    batch, encoded = make_batch(), tokenizer(texts, padding=True, return_tensors="pt")
    assert {name: tensor.tolist() for name, tensor in encoded.items()} == {
        name: batch[name].tolist() for name in ("input_ids", "attention_mask")
    }
    assert tokenizer.suppress_tokens == list(SPECIAL)


@EVERY_TYPE
@pytest.mark.parametrize(("token_padding", "value_padding"), [(0, 0), (3, 0), (0, 2), (4, 1)])
def test_placeholders_read_as_the_numeric_backbone(attention_type, token_padding, value_padding):
    """Whose every row is alone and not padded, and which has no vocabulary."""
    model = shared_model(attention_type)
    backbone = SpaceExploreModel(make_config(attention_type, vocab_size=None)).eval()
    weights = model.model.state_dict()
    del weights["embed_tokens.weight"]
    backbone.load_state_dict(weights)
    batch = make_batch(answers=2, token_padding=token_padding, value_padding=value_padding)
    hidden_states = model.model(**batch).last_hidden_state
    for row, steps in enumerate(ROWS):
        expected = backbone(one_row(batch, row)["past_values"]).last_hidden_state[0]
        actual = hidden_states[row, batch["input_ids"][row] == TS]
        assert len(actual) == steps
        assert_close(actual, expected, rtol=0, atol=1e-5)


def filled_one_by_one(
    input_ids: torch.Tensor, embedded: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    filled = embedded.clone()
    for row in range(len(input_ids)):
        waiting = [values[row, step] for step in range(values.shape[1]) if mask[row, step]]
        for position, token in enumerate(input_ids[row].tolist()):
            if token == TS:
                filled[row, position] = waiting.pop(0)
        assert not waiting
    return filled


def scattered(rows: int, length: int, counts: list[int], generator: torch.Generator) -> torch.Tensor:
    """(rows, length), True at so many random places of each row."""
    order = torch.rand(rows, length, generator=generator).argsort(-1).argsort(-1)
    return order < torch.tensor(counts)[:, None]


@few
@given(seed=st.integers(0, 2**16), counts=st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_placeholders_are_filled_in_order(seed, counts):
    """Wherever they are, wherever the padded steps are."""
    generator, backbone, rows = torch.Generator().manual_seed(seed), shared_model().model, len(counts)
    length, most = max(counts) + 1 + seed % 3, max(counts) + 1 + seed % 2
    input_ids = torch.tensor([PAD, BOS, EOS, 7, 8])[torch.randint(0, 5, (rows, length), generator=generator)]
    input_ids[scattered(rows, length, counts, generator)] = TS
    values = torch.randn(rows, most, SIZES["hidden_size"], generator=generator)
    mask = scattered(rows, most, counts, generator)
    expected = filled_one_by_one(input_ids, backbone.embed_tokens(input_ids), values, mask)
    for kind in (torch.bool, torch.long, torch.float):
        assert torch.equal(backbone.fill_placeholders(input_ids, None, values, mask.to(kind)), expected)


def test_without_a_mask_every_step_has_its_placeholder():
    alone, backbone = one_row(make_batch(), 1), shared_model().model
    ones = torch.ones(1, ROWS[1], dtype=torch.long)
    assert_close(backbone(**alone).last_hidden_state, backbone(**alone, past_values_mask=ones).last_hidden_state)


@EVERY_TYPE
@few
@given(step=st.integers(0, ROWS[2] - 1), token=st.integers(1, DAYS))
def test_future_never_reaches_a_token(attention_type, step, token):
    """A changed day changes the logits from its placeholder on, a changed token those from itself on."""
    model, batch = shared_model(attention_type), make_batch(answers=DAYS)
    expected, prompt = model(**batch).logits, batch["input_ids"].shape[1] - DAYS
    values, ids = batch["past_values"].clone(), batch["input_ids"].clone()
    values[:, step - ROWS[2]] = 3.0
    ids[:, token - 1 - DAYS] = 27 - ids[:, token - 1 - DAYS]  # of 5 to 22 another one
    for change, first in (
        ({"past_values": values}, prompt - 1 + step - ROWS[2]),
        ({"input_ids": ids}, prompt + token - 1),
    ):
        logits = model(**{**batch, **change}).logits
        assert_close(logits[:, :first], expected[:, :first], rtol=0, atol=1e-5)
        assert ((logits - expected)[:, first:].abs().amax(-1) > 1e-5).all()


@EVERY_TYPE
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_changes_nothing(attention_type, attention):
    model = shared_model(attention_type, attention)
    batch = make_batch(answers=DAYS, token_padding=2, value_padding=3)
    logits = model(**batch).logits
    for row in range(BATCH):
        expected = model(**one_row(batch, row)).logits[0]
        assert_close(logits[row, -len(expected) :], expected, rtol=0, atol=1e-5)


def test_tokens_may_come_embedded():
    model, ids = shared_model(), make_batch(answers=DAYS)["input_ids"][:, -DAYS:]
    embedded = F.embedding(ids, model.model.embed_tokens.weight)
    assert_close(model(inputs_embeds=embedded).logits, model(input_ids=ids).logits)


def test_token_embedding_can_be_exchanged():
    model, ids, other = make_model(), torch.tensor([[BOS, 7, 8]]), nn.Embedding(VOCABULARY, SIZES["hidden_size"])
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    assert_close(model(input_ids=ids).logits, model(inputs_embeds=other(ids)).logits)


# --- generation ---


def generate(model: SpaceExploreForCausalLM, batch: dict[str, torch.Tensor], days: int = DAYS, **options):
    """So many days, none of them a special token, and the logits they were chosen by; by default the likeliest."""
    torch.manual_seed(0)
    options = {"do_sample": False} | options
    length = {"min_new_tokens": days, "max_new_tokens": days, "suppress_tokens": list(SPECIAL)}
    return model.generate(**batch, **length, **options, return_dict_in_generate=True, output_logits=True)


def assert_same_generation(actual, expected):
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=1e-5)


def batch_without_padding() -> dict[str, torch.Tensor]:
    batch = make_batch((8, 8))
    return {"input_ids": batch["input_ids"], "past_values": batch["past_values"]}


BATCHES = {"ragged": make_batch, "wider": lambda: make_batch(token_padding=3), "not padded": batch_without_padding}


@EVERY_TYPE
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", BATCHES)
def test_cached_generation_is_uncached_generation(attention_type, strategy, kind):
    model, batch, options = shared_model(attention_type), BATCHES[kind](), STRATEGIES[strategy]
    cached = generate(model, batch, **options)
    assert_same_generation(cached, generate(model, batch, **options, use_cache=False))
    days = cached.sequences[:, -DAYS:]
    assert len(days) == len(batch["input_ids"]) * options.get("num_return_sequences", 1)
    assert len(days.unique()) > 3
    assert (days >= len(SPECIAL)).all()


@EVERY_TYPE
def test_greedy_tokens_are_the_teacher_forced_choice(attention_type):
    model, batch = shared_model(attention_type), make_batch()
    outputs = generate(model, batch)
    days = outputs.sequences[:, -DAYS:]
    logits = model(**extended(batch, days), use_cache=False).logits[:, -DAYS - 1 : -1]
    assert_close(logits, torch.stack(outputs.logits, dim=1), rtol=0, atol=1e-5)
    assert torch.equal(logits[..., len(SPECIAL) :].argmax(-1) + len(SPECIAL), days)


@EVERY_TYPE
def test_a_row_generates_what_it_generates_alone(attention_type):
    model, batch = shared_model(attention_type), make_batch()
    together = generate(model, batch, num_beams=3).sequences[:, -DAYS:].tolist()
    alone = [generate(model, one_row(batch, row), num_beams=3).sequences[0, -DAYS:].tolist() for row in range(BATCH)]
    assert together == alone


@EVERY_TYPE
@pytest.mark.parametrize("strategy", ["greedy", "several", "beams"])
def test_static_cache_generates_the_same(attention_type, strategy):
    model, options = shared_model(attention_type), STRATEGIES[strategy]
    static = generate(model, make_batch(), **options, cache_implementation="static")
    assert_same_generation(static, generate(model, make_batch(), **options))
    assert isinstance(static.cache, StaticCache)


@pytest.fixture
def cropped(monkeypatch) -> list[int]:
    """How many tokens were taken out of a layer of a cache, each time."""
    calls, library = [], DynamicLayer.crop
    monkeypatch.setattr(DynamicLayer, "crop", lambda self, count: calls.append(-count) or library(self, count))
    return calls


# Guesses that are right, wrong, and looked up among the tokens before.
GUESSES = {
    "itself": lambda kind: {"assistant_model": make_model(kind)},
    "another": lambda kind: {"assistant_model": make_model(kind, seed=1)},
    "prompt lookup": lambda kind: {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
}


@EVERY_TYPE
@pytest.mark.parametrize("guess", GUESSES)
def test_assisted_generation_generates_the_same(attention_type, guess, cropped):
    model, batch = shared_model(attention_type), one_row(make_batch(), 1)
    expected = generate(model, batch, days=3 * DAYS)
    assert cropped == []
    assert_same_generation(generate(model, batch, days=3 * DAYS, **GUESSES[guess](attention_type)), expected)
    assert cropped


def test_generation_goes_on_from_a_cache():
    model, batch = shared_model(), make_batch()
    first = generate(model, batch, cache=DynamicCache(config=model.config))
    longer = extended(batch, first.sequences[:, -DAYS:])
    tokens = {name: longer[name] for name in ("input_ids", "attention_mask")}
    expected = generate(model, batch, days=2 * DAYS).sequences.tolist()
    for inputs in (tokens, longer):
        assert generate(model, inputs, cache=copy.deepcopy(first.cache)).sequences.tolist() == expected


def test_generates_from_embedded_tokens():
    model, ids = shared_model(), make_batch(answers=DAYS)["input_ids"][:, -DAYS:]
    embedded = {"inputs_embeds": model.model.embed_tokens(ids)}
    expected = generate(model, {"input_ids": ids}).sequences[:, -DAYS:]
    assert torch.equal(generate(model, embedded).sequences, expected)


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_generates_with_router_logits(cache_implementation):
    """They are those of the new steps, fewer than the mask has."""
    model = make_model(output_router_logits=True)
    outputs = generate(model, make_batch(), cache_implementation=cache_implementation)
    assert_same_generation(outputs, generate(shared_model(), make_batch()))


# --- the cache ---


@EVERY_TYPE
@pytest.mark.parametrize("chunks", [(1,) * DAYS, (2, 1, 2), (DAYS,)], ids=str)
def test_step_by_step_is_all_at_once(attention_type, chunks):
    model, batch = shared_model(attention_type), make_batch(answers=DAYS)
    expected, cache = model(**batch, use_cache=False).logits, DynamicCache(config=model.config)
    end = batch["input_ids"].shape[1] - DAYS
    prompt = {**batch, "input_ids": batch["input_ids"][:, :end], "attention_mask": batch["attention_mask"][:, :end]}
    logits = [model(**prompt, cache=cache).logits]
    for chunk in chunks:
        start, end = end, end + chunk
        ids, mask = batch["input_ids"][:, start:end], batch["attention_mask"][:, :end]
        logits.append(model(input_ids=ids, attention_mask=mask, cache=cache).logits)
    assert_same_where_real(torch.cat(logits, dim=1), expected, batch["attention_mask"])


SHAPES = {"mla": [(1, 24), (1, 4)], "gqa": [(2, 10), (2, 10)], "mha": [(4, 6), (4, 6)]}


@EVERY_TYPE
@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_cache_holds_latents_or_the_keys_and_values_of_few_heads(attention_type, cache_implementation):
    outputs = generate(shared_model(attention_type), make_batch(), cache_implementation=cache_implementation)
    length = max(ROWS) + DAYS  # the last token is never fed
    expected = [(BATCH, heads, length, size) for heads, size in SHAPES[attention_type]]
    assert [[tuple(layer.keys.shape), tuple(layer.values.shape)] for layer in outputs.cache.layers] == [
        expected
    ] * LAYERS


@EVERY_TYPE
def test_cache_can_be_cropped(attention_type):
    model, batch = shared_model(attention_type), make_batch(answers=4)
    cache = model(**batch, use_cache=True).cache
    cache.crop(-3)
    kept = {name: batch[name][:, :-3] for name in ("input_ids", "attention_mask")}
    other = extended({**batch, **kept}, torch.tensor([[5, 9], [6, 8], [7, 7]]))
    continued = {"input_ids": other["input_ids"][:, -2:], "attention_mask": other["attention_mask"]}
    expected = model(**other, use_cache=False).logits[:, -2:]
    assert_close(model(**continued, cache=cache).logits, expected, rtol=0, atol=1e-5)


@EVERY_TYPE
def test_cache_can_be_reordered(attention_type):
    """As beam search does; here the rows are also padded differently."""
    model, batch, order = shared_model(attention_type), make_batch(answers=1), torch.tensor([2, 0, 0])
    cache = model(**batch, use_cache=True).cache
    cache.reorder_cache(order)
    reordered = extended({name: tensor[order] for name, tensor in batch.items()}, torch.tensor([[5], [6], [7]]))
    continued = {"input_ids": reordered["input_ids"][:, -1:], "attention_mask": reordered["attention_mask"]}
    expected = model(**reordered, use_cache=False).logits[:, -1:]
    assert_close(model(**continued, cache=cache).logits, expected, rtol=0, atol=1e-5)


def make_forecaster(attention_type: str) -> SpaceExploreForRegression:
    torch.manual_seed(0)
    return SpaceExploreForRegression(make_config(attention_type, vocab_size=None)).eval().requires_grad_(False)


@EVERY_TYPE
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunks", [(6, *[1] * 5), (7, 3, 1), (11,)], ids=str)
def test_cached_forecasts_are_uncached_forecasts(attention_type, padded, chunks):
    """A history that grows, given as a whole every time."""
    model, batch = make_forecaster(attention_type), make_batch()
    values, mask = batch["past_values"], batch["past_values_mask"]
    mask = mask if padded else torch.ones_like(mask)
    expected = model(values, attention_mask=mask, use_cache=False)
    cache, end = DynamicCache(config=model.config), 0
    for chunk in chunks:
        start, end = end, end + chunk
        part = model(values[:, :end], attention_mask=mask[:, :end] if padded else None, cache=cache)
        assert part.mean.shape[1] == chunk
        assert_same_where_real(part.mean, expected.mean[:, start:end], mask[:, start:end])
        assert_same_where_real(part.quantiles, expected.quantiles[:, start:end], mask[:, start:end])


@EVERY_TYPE
@pytest.mark.parametrize("steps", [1, 6, 7])
def test_refuses_new_steps_without_their_history(attention_type, steps):
    model, values = make_forecaster(attention_type), make_batch()["past_values"]
    cache = model(values[:, :7], use_cache=True).cache
    with pytest.raises(ValueError, match=rf"the whole history, the 7 steps in the cache.*got {steps} steps"):
        model(values[:, -steps:], cache=cache)


# --- absorbed decoding ---


@pytest.fixture
def absorbed(monkeypatch) -> list[int]:
    """The layers that attended to latents, in turn."""
    calls, attend = [], SpaceExploreLatentAttention.attend_to_latents
    monkeypatch.setattr(
        SpaceExploreLatentAttention,
        "attend_to_latents",
        lambda self, *args: calls.append(self.layer_idx) or attend(self, *args),
    )
    return calls


@pytest.fixture
def expanded(monkeypatch):
    """A function after whose call nothing is absorbed."""
    return lambda: monkeypatch.setattr(SpaceExploreLatentAttention, "can_absorb", lambda self: False)


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_decoding_is_absorbed(absorbed, cache_implementation):
    """In each step after the prompt, and nowhere else."""
    generate(shared_model(), make_batch(), cache_implementation=cache_implementation)
    assert absorbed == list(range(LAYERS)) * (DAYS - 1)


def test_only_decoding_is_absorbed(absorbed):
    model, batch = shared_model(), make_batch(answers=DAYS)
    generate(model, make_batch(), use_cache=False)
    model(**batch, use_cache=True)
    model(input_ids=torch.full((BATCH, 1), BOS), use_cache=False)
    assert absorbed == []


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("q_lora_rank", [None, 20])
@pytest.mark.parametrize("strategy", ["greedy", "sampled", "beams"])
def test_absorbed_is_expanded(absorbed, expanded, attention, q_lora_rank, strategy):
    yarn = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 0.7}
    sizes = {"q_lora_rank": q_lora_rank, "attn_implementation": attention, "rope_parameters": yarn}
    model, options = make_model(**sizes), STRATEGIES[strategy]
    actual = generate(model, make_batch(), **options)
    calls = len(absorbed)
    expanded()
    assert_same_generation(actual, generate(model, make_batch(), **options))
    assert calls == len(absorbed) == LAYERS * (DAYS - 1)


def test_absorbed_attention_weights_are_the_expanded(expanded):
    model, options = shared_model(attention="eager"), {"output_attentions": True}
    actual = generate(model, make_batch(), **options).attentions
    expanded()
    for step, expected in zip(actual[1:], generate(model, make_batch(), **options).attentions[1:], strict=True):
        assert step[0].shape[1:3] == (SIZES["num_attention_heads"], 1)
        assert_close(step, expected, rtol=0, atol=1e-6)


class Adapter(nn.Module):
    """As PEFT's layers: they show the weight that they adapt as theirs."""

    def __init__(self, base: nn.Linear, change: torch.Tensor):
        super().__init__()
        self.base_layer, self.change = base, change

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.base_layer(hidden_states) + hidden_states @ self.change.T


class AdaptedLinear(nn.Linear):
    """A linear layer that does more."""

    def __init__(self, base: nn.Linear, change: torch.Tensor):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight, self.change = base.weight, change

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + hidden_states @ self.change.T


@pytest.mark.parametrize("adapter", [Adapter, AdaptedLinear])
def test_adapters_are_not_absorbed(absorbed, adapter):
    """Nor forgotten: the same as a model that they were merged into, which is absorbed."""
    model, merged = make_model(), make_model()
    for adapted, plain in zip(model.model.layers, merged.model.layers, strict=True):
        change = 0.2 * torch.randn(plain.self_attn.kv_b_proj.weight.shape)
        adapted.self_attn.kv_b_proj = adapter(adapted.self_attn.kv_b_proj, change)
        plain.self_attn.kv_b_proj.weight.data += change
    actual = generate(model, make_batch())
    assert absorbed == []
    assert_same_generation(actual, generate(merged, make_batch()))
    unadapted = generate(shared_model(), make_batch())
    assert not torch.allclose(torch.stack(actual.logits), torch.stack(unadapted.logits), rtol=0, atol=1e-2)


def test_offloaded_weights_are_not_absorbed(absorbed):
    """They are on no device but in the forward pass of their own layer."""
    actual = generate(cpu_offload(make_model(), execution_device="cpu"), make_batch())
    assert absorbed == []
    assert_same_generation(actual, generate(shared_model(), make_batch()))


# --- the loss ---


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed over the known labels, each of which is the token after the logits."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


@EVERY_TYPE
def test_loss_is_the_shifted_cross_entropy(attention_type):
    model, batch = shared_model(attention_type), make_batch(answers=DAYS)
    labels = torch.randint(0, VOCABULARY, batch["input_ids"].shape, generator=torch.Generator().manual_seed(3))
    labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(4)) < 0.3] = -100
    labels[:, 0] = 7
    outputs = model(**batch, labels=labels)
    total, count = cross_entropy(outputs.logits, labels), (labels[:, 1:] != -100).sum().item()
    assert_close(outputs.loss, total / count)
    assert_close(model(**batch, labels=labels, num_items_in_batch=1000).loss, total / 1000)
    assert_close(model(**batch, labels=labels, num_items_in_batch=torch.tensor(7)).loss, total / 7)
    assert outputs.aux_loss is model(**batch).loss is None


def test_micro_batches_add_up_to_the_large_batch():
    model, batch = make_model(router_aux_loss_coef=0.0).train(), make_batch((9, 11, 6, 10), answers=DAYS)
    batch["labels"] = make_labels(batch)
    items = (batch["labels"] != -100).sum()
    whole = model(**batch, num_items_in_batch=items).loss
    parts = [
        model(**{name: tensor[rows] for name, tensor in batch.items()}, num_items_in_batch=items).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert_close(whole, model(**batch).loss)
    assert_close(sum(parts), whole)
    assert_same_gradients(gradients(model, sum(parts)), gradients(model, whole))


def feature_loss(model: SpaceExploreForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over patches of the rows, each of them alone and numeric."""
    losses = [model.model(one_row(batch, row)["past_values"]).feature_loss for row in range(BATCH)]
    # 6 steps long and 2 of them shared, of 9, 11 and 6 steps.
    patches = torch.tensor([2, 3, 1])
    return (torch.stack(losses) * patches).sum() / patches.sum()


def test_auxiliary_losses_are_part_of_the_training_loss_alone():
    """The load-balancing loss over the tokens, the feature loss over the time steps that are not padded."""
    model, batch = make_model(**TIME_TO_TEXT, router_aux_loss_coef=0.5), make_batch(answers=DAYS, token_padding=2)
    labels = make_labels(batch)
    evaluated, trained = model.eval()(**batch, labels=labels), model.train()(**batch, labels=labels)
    mean = cross_entropy(evaluated.logits, labels) / (labels != -100).sum()
    assert_close(evaluated.loss, mean)
    assert evaluated.aux_loss is None
    routers = model(**batch, output_router_logits=True).router_logits
    assert len(routers) == LAYERS - 1
    balances = [load_balancing_loss_func((layer,), EXPERTS, 2, batch["attention_mask"]) for layer in routers]
    balance = torch.stack(balances).mean()
    assert not torch.isclose(balances[0], load_balancing_loss_func(routers[:1], EXPERTS, 2))
    features = feature_loss(model, batch)
    assert features > 0.01
    assert_close(trained.aux_loss, balance)
    assert_close(trained.loss, mean + 0.5 * balance + TIME_TO_TEXT["t2t_loss_weight"] * features)


def test_micro_batches_weigh_the_auxiliary_losses_by_their_labels():
    """The same rows twice: had each micro-batch its whole auxiliary losses, two would count them twice."""
    model, batch = make_model(**TIME_TO_TEXT, router_aux_loss_coef=0.5).train(), make_batch(answers=DAYS)
    batch["labels"] = make_labels(batch)
    items = 2 * (batch["labels"] != -100).sum()
    assert_close(2 * model(**batch, num_items_in_batch=items).loss, model(**batch).loss)


@pytest.mark.parametrize("items", [None, 0, 50])
def test_nothing_to_learn_is_no_loss(items):
    model, batch = make_model(**TIME_TO_TEXT).train(), make_batch(answers=DAYS)
    loss = model(**batch, labels=torch.full_like(batch["input_ids"], -100), num_items_in_batch=items).loss
    assert loss.item() == 0
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 3, 16])], ids=str)
def test_keeps_only_the_logits_that_are_asked_for(keep):
    model, batch = shared_model(), make_batch(answers=DAYS)
    expected = model(**batch).logits
    expected = expected[:, keep] if isinstance(keep, torch.Tensor) else expected[:, -keep:]
    assert_close(model(**batch, logits_to_keep=keep).logits, expected)


# --- gradients ---


@EVERY_TYPE
@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_every_parameter_gets_a_gradient(attention_type, tie_word_embeddings):
    """The front end through the placeholders; only the teacher is frozen."""
    sizes = {**TIME_TO_TEXT, "tie_word_embeddings": tie_word_embeddings}
    model = make_model(attention_type, **sizes).train()
    # Answers enough for every expert to be chosen by one of them.
    batch = make_batch((12,) * 10, answers=40)
    found = gradients(model, model(**batch, labels=make_labels(batch)).loss)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"model.t2t.{name}" for name, _ in model.model.t2t.named_parameters()}
    assert [name for name, gradient in found.items() if not gradient.any() or not gradient.isfinite().all()] == []
    experts = [gradient for name, gradient in found.items() if ".experts." in name]
    assert len(experts) == 2 * (LAYERS - 1)
    assert all(gradient.flatten(1).any(dim=1).all() for gradient in experts)


def test_front_end_learns_from_the_tokens_themselves():
    """Without any auxiliary loss; of the token embeddings, those that were read."""
    model, batch = make_model(router_aux_loss_coef=0.0).train(), make_batch(answers=DAYS)
    found = gradients(model, model(**batch, labels=make_labels(batch)).loss)
    front_end = {name: gradient for name, gradient in found.items() if "value_embedding" in name or "mscnn" in name}
    assert len(front_end) == len([*model.model.value_embedding.parameters(), *model.model.mscnn.parameters()])
    assert min(gradient.abs().max() for gradient in front_end.values()) > 1e-6
    read = set(batch["input_ids"][:, :-1].unique().tolist()) - {PAD, TS}
    learned = found["model.embed_tokens.weight"].any(-1).nonzero().flatten()
    assert set(learned.tolist()) == read


def test_gradient_checkpointing_changes_no_gradient():
    model, batch = make_model(**TIME_TO_TEXT).train(), make_batch(answers=DAYS)
    batch["labels"] = make_labels(batch)
    expected = gradients(model, model(**batch).loss)
    model.activation_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    # Checkpointing runs the layers again only for a backward pass that accumulates.
    model(**batch).loss.backward()
    assert_same_gradients({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, expected)


def half_precision(model: SpaceExploreForCausalLM, autocast: bool):
    """The model in bfloat16, or a context that computes in it."""
    return (model, torch.autocast("cpu", torch.bfloat16)) if autocast else (model.bfloat16(), nullcontext())


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    batch = make_batch(answers=DAYS)
    batch["labels"] = make_labels(batch)
    expected = make_model().train()(**batch).loss.item()
    model, context = half_precision(make_model().train(), autocast)
    with context:
        outputs = model(**batch)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.logits.isfinite().all()
    assert outputs.loss.item() == pytest.approx(expected, rel=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients(model, outputs.loss).values())


@EVERY_TYPE
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("strategy", ["several", "beams"])
def test_bfloat16_generates(attention_type, strategy, autocast):
    model, context = half_precision(make_model(attention_type), autocast)
    with context:
        outputs = generate(model, make_batch(), **STRATEGIES[strategy])
    assert torch.stack(outputs.logits).isfinite().all()
    assert (outputs.sequences[:, -DAYS:] >= len(SPECIAL)).all()


# --- what libraries expect ---


@EVERY_TYPE
def test_backbone_is_all_that_trl_needs(attention_type):
    """TRL multiplies what the backbone answers with the weight of the head itself."""
    model, batch = shared_model(attention_type), make_batch(answers=DAYS)
    hidden_states, head = model.base_model(**batch).last_hidden_state, model.get_output_embeddings()
    assert hidden_states.shape == (*batch["input_ids"].shape, SIZES["hidden_size"])
    assert type(head) is nn.Linear
    assert_close(F.linear(hidden_states, head.weight, head.bias), model(**batch).logits)


def test_trl_scores_tokens_as_the_logits_do():
    model, batch = make_model(), make_batch(answers=DAYS)
    labels = make_labels(batch)
    log_probs = model(**batch).logits[:, :-1].log_softmax(-1)
    known = labels[:, 1:] != -100
    add_fused_lm_head(model)
    scored = model(**batch, labels=labels, fused_lm_head=True).log_probs
    assert_close(scored[known], log_probs.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)[known])


@pytest.mark.parametrize("attention_type", ["mla", "gqa"])
def test_compiles_without_graph_breaks(attention_type):
    model = make_model(attention_type, num_hidden_layers=2).requires_grad_(False)
    batch = make_batch(answers=DAYS, token_padding=1)
    batch["labels"] = make_labels(batch)
    torch.compiler.reset()
    outputs, expected = torch.compile(model, fullgraph=True, backend="eager")(**batch), model(**batch)
    assert_close(outputs.logits, expected.logits)
    assert_close(outputs.loss, expected.loss)


def test_decoding_compiles_without_graph_breaks():
    model, batch = make_model(num_hidden_layers=2).requires_grad_(False), make_batch()
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(**batch, cache=cache)
    longer = extended(batch, torch.tensor([[5], [6], [7]]))
    continued = {"input_ids": longer["input_ids"][:, -1:], "attention_mask": longer["attention_mask"]}
    torch.compiler.reset()
    outputs = torch.compile(model, fullgraph=True, backend="eager")(**continued, cache=cache)
    assert_close(outputs.logits, model(**longer, use_cache=False).logits[:, -1:], rtol=0, atol=1e-5)


# --- saving, loading and resizing ---


@EVERY_TYPE
@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_saved_and_loaded_is_the_same(tmp_path, attention_type, tie_word_embeddings):
    model = make_model(attention_type, **TIME_TO_TEXT, tie_word_embeddings=tie_word_embeddings)
    model.save_pretrained(tmp_path)
    loaded, info = SpaceExploreForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {problem: found for problem, found in info.items() if found} == {}
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    for either in (model, loaded):
        assert (either.lm_head.weight is either.model.embed_tokens.weight) == tie_word_embeddings
    # Matrix products round by where in memory the weights lie.
    assert_close(loaded(**make_batch()).logits, model(**make_batch()).logits, rtol=0, atol=1e-5)


def test_special_tokens_reach_generation(tmp_path):
    make_model(bos_token_id=6, eos_token_id=7, pad_token_id=8).save_pretrained(tmp_path)
    found = SpaceExploreForCausalLM.from_pretrained(tmp_path).generation_config
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (6, 7, 8)


@pytest.fixture(scope="module")
def regression(tmp_path_factory) -> tuple[SpaceExploreForRegression, Path]:
    model, folder = make_forecaster("mla"), tmp_path_factory.mktemp("regression")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_starts_from_a_regression_checkpoint(regression, tie_word_embeddings):
    forecaster, folder = regression
    sizes = {"vocab_size": VOCABULARY, "tie_word_embeddings": tie_word_embeddings}
    model, info = SpaceExploreForCausalLM.from_pretrained(folder, **sizes, output_loading_info=True)
    assert info["missing_keys"] == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all("head" in key for key in info["unexpected_keys"])
    weights = model.model.state_dict()
    embedding = weights.pop("embed_tokens.weight")
    assert weights.keys() == forecaster.model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in forecaster.model.state_dict().items())
    for new in (embedding, model.lm_head.weight):
        assert new.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie_word_embeddings


def test_refuses_a_checkpoint_without_a_vocabulary(regression):
    with pytest.raises(ValueError, match="needs a vocabulary, got vocab_size=None"):
        SpaceExploreForCausalLM.from_pretrained(regression[1])


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_vocabulary_can_grow(tmp_path, tie_word_embeddings):
    model, batch, larger = make_model(tie_word_embeddings=tie_word_embeddings), make_batch(answers=DAYS), 31
    expected = model(**batch).logits
    model.resize_token_embeddings(larger)
    assert (
        model.config.vocab_size == model.get_input_embeddings().num_embeddings == model.lm_head.out_features == larger
    )
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie_word_embeddings
    outputs = model(**batch, labels=make_labels(batch).masked_fill(batch["input_ids"] == 7, larger - 1))
    assert_close(outputs.logits[..., :VOCABULARY], expected)
    assert outputs.loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = SpaceExploreForCausalLM.from_pretrained(tmp_path)
    assert_close(loaded(**batch).logits, outputs.logits, rtol=0, atol=1e-5)


# --- bad input ---


def test_refuses_to_be_without_a_vocabulary():
    with pytest.raises(ValueError, match="needs a vocabulary, got vocab_size=None"):
        make_model(vocab_size=None)


def test_refuses_tokens_without_a_vocabulary():
    with pytest.raises(ValueError, match="input_ids need a token embedding, got vocab_size=None"):
        make_forecaster("mla").model(input_ids=torch.tensor([[BOS]]))


def test_refuses_placeholders_without_values():
    batch = make_batch()
    with pytest.raises(ValueError, match=f"{max(ROWS)} <ts> tokens stand for past_values, got past_values=None"):
        shared_model()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def test_refuses_another_number_of_placeholders_than_steps():
    """In one row, whose surplus the other row lacks, so that the totals agree."""
    batch = make_batch((9, 6))
    batch["past_values"], batch["past_values_mask"] = batch["past_values"].flip(0), batch["past_values_mask"].flip(0)
    for either in (shared_model(), shared_model().model):
        with pytest.raises(ValueError, match=r"<ts> token for each step, \[6, 9\] a row; got \[9, 6\]"):
            either(**batch)


@pytest.mark.parametrize("rows", [1, 2])
def test_refuses_another_number_of_rows_than_of_tokens(rows):
    """One row of values is not meant for all, nor are those beyond the last row of tokens for none."""
    batch, values = one_row(make_batch(), 1), torch.zeros(3 - rows, ROWS[1], FEATURES)
    with pytest.raises(ValueError, match=f"{rows}.*got {3 - rows}"):
        shared_model()(input_ids=batch["input_ids"].expand(rows, -1), past_values=values)


def test_refuses_values_beside_embedded_tokens():
    batch = make_batch()
    embedded = shared_model().model.embed_tokens(batch["input_ids"])
    with pytest.raises(ValueError, match="the <ts> tokens in input_ids, got inputs_embeds"):
        shared_model()(inputs_embeds=embedded, past_values=batch["past_values"])


def test_refuses_tokens_in_two_forms():
    ids = torch.tensor([[7, 8]])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds, got both"):
        shared_model().model(input_ids=ids, inputs_embeds=shared_model().model.embed_tokens(ids))


@pytest.mark.parametrize("width", [1, 3])
def test_refuses_a_mask_of_another_number_of_tokens(width):
    with pytest.raises(ValueError, match=f"attention_mask must cover 2 steps and tokens, got {width}"):
        shared_model()(torch.tensor([[7, 8]]), attention_mask=torch.ones(1, width))


def test_placeholders_are_never_generated(tmp_path, regression):
    """Not by default either, nor after saving, nor on a backbone that was trained without tokens."""
    shared_model().save_pretrained(tmp_path)
    loaded = SpaceExploreForCausalLM.from_pretrained(tmp_path)
    tuned = SpaceExploreForCausalLM.from_pretrained(regression[1], vocab_size=30)
    for model in (shared_model(), loaded, tuned):
        assert model.generation_config.suppress_tokens == [model.config.ts_token_id]


def test_samples_are_of_the_whole_distribution(tmp_path, regression):
    """All tokens but the placeholder, and as often as the logits say; after saving too."""
    shared_model().save_pretrained(tmp_path)
    loaded = SpaceExploreForCausalLM.from_pretrained(tmp_path)
    tuned = SpaceExploreForCausalLM.from_pretrained(regression[1], vocab_size=300)
    large = make_model(vocab_size=300)
    for model in (loaded, tuned):
        assert (model.generation_config.do_sample, model.generation_config.top_k) == (True, 0)
    torch.manual_seed(0)
    prompt = torch.full((4000, 1), 7)
    drawn = large.generate(prompt, min_new_tokens=1, max_new_tokens=1)[:, -1]
    assert len(drawn.unique()) > 250


def test_refuses_to_read_nothing():
    with pytest.raises(ValueError, match="got none of them"):
        shared_model()()


def test_refuses_a_row_that_is_masked_as_a_whole():
    batch = make_batch()
    batch["past_values_mask"][1] = 0
    with pytest.raises(ValueError, match="row 1 of the batch is masked as a whole"):
        shared_model()(**batch)


def test_refuses_a_row_of_tokens_that_is_masked_as_a_whole():
    with pytest.raises(ValueError, match="row 1 of the batch is masked as a whole"):
        shared_model()(torch.tensor([[7, 8], [7, 8]]), attention_mask=torch.tensor([[0, 1], [0, 0]]))


@pytest.mark.parametrize("shape", [(BATCH, max(ROWS), FEATURES + 1), (BATCH, FEATURES), (BATCH, 0, FEATURES)], ids=str)
def test_refuses_a_shape_of_values(shape):
    with pytest.raises(ValueError, match=rf"past_values must be .*{FEATURES} features.*got \({shape[0]}, {shape[1]}"):
        shared_model()(**{**make_batch(), "past_values": torch.zeros(shape)})


def test_refuses_a_mask_of_another_shape():
    batch = make_batch()
    shape = rf"\({BATCH}, {max(ROWS)}\), got \({BATCH}, {max(ROWS) - 1}\)"
    with pytest.raises(ValueError, match=f"the mask must be .* as past_values, {shape}"):
        shared_model()(**{**batch, "past_values_mask": batch["past_values_mask"][:, 1:]})


def test_refuses_a_prompt_that_is_too_long():
    limited = make_model(max_position_embeddings=max(ROWS) + 1)
    assert limited(**make_batch()).logits.shape[1] == max(ROWS) + 1
    with pytest.raises(ValueError, match="a context of 13 steps is longer than max_position_embeddings=12"):
        limited(**make_batch(answers=1))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_refuses_to_generate_beyond_the_last_position(options):
    limited = make_model(max_position_embeddings=max(ROWS) + DAYS)
    assert len(generate(limited, make_batch(), **options).logits) == DAYS  # the last token is never fed
    with pytest.raises(ValueError, match="a context of 17 steps is longer than max_position_embeddings=16"):
        generate(limited, make_batch(), days=DAYS + 1, **options)
