"""What the key-value cache costs with each kind of attention, and how fast one path is decoded from it.

    python benchmarks/kv_cache.py [--model-config FILE]

Bytes are counted in the tensors that a forward pass of the causal language model left in its cache. The latent cache
is decoded with the up-projection absorbed and expanded, and after a long context and a short one, by turns. Random
weights: no figure depends on them. Exit code 1 when multi-head latent attention takes more than a sixth of multi-head
attention, or a token after 1,024 steps more than 1.5 times as long as one after 64.
"""

import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from transformers import Cache

from spaceexploreai.configuration_spaceexplore import ATTENTION_TYPES, SpaceExploreConfig
from spaceexploreai.modeling_spaceexplore import SpaceExploreForCausalLM, SpaceExploreLatentAttention
from spaceexploreai.train.arguments import bare_parser, command

RECIPE = Path(__file__).parents[1] / "recipes" / "27m" / "config.json"
VOCAB_SIZE = 261  # 256 bins and 5 special tokens, as a new tokenizer has
CONTEXT, NEW_TOKENS, REPEATS = 256, 32, 21
SHORT, LONG = 64, 1024
LEAST_SAVING, MOST_TIME = 6, 1.5


def make_model(recipe: dict, attention_type: str) -> SpaceExploreForCausalLM:
    torch.manual_seed(0)
    config = SpaceExploreConfig(**{**recipe, "vocab_size": VOCAB_SIZE, "attention_type": attention_type})
    return SpaceExploreForCausalLM(config).eval()


@torch.inference_mode()
def fill_cache(model: SpaceExploreForCausalLM, context: int) -> Cache:
    """The cache of one prompt of `context` tokens: a `<ts>` for each time step and `<bos>`."""
    input_ids = torch.full((1, context), model.config.ts_token_id)
    input_ids[:, -1] = model.config.bos_token_id
    past_values = torch.randn(1, context - 1, model.config.num_features)
    return model(input_ids, past_values=past_values, use_cache=True).cache


def bytes_per_token(cache: Cache) -> float:
    """Memory behind the cached tensors of all layers, which may be more than what they show of it."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors) / cache.get_seq_length()


def compare_sizes(recipe: dict) -> dict[str, float]:
    return {kind: bytes_per_token(fill_cache(make_model(recipe, kind), CONTEXT)) for kind in ATTENTION_TYPES}


def format_sizes(sizes: dict[str, float]) -> str:
    lines = ["| attention | bytes a token, all layers | share of mha | mha over it |", "|---|---:|---:|---:|"]
    for kind, size in sizes.items():
        lines.append(f"| {kind} | {size:,.0f} | {size / sizes['mha']:.1%} | {sizes['mha'] / size:.2f} |")
    return "\n".join(lines)


@torch.inference_mode()
def tokens_per_second(model: SpaceExploreForCausalLM, cache: Cache, absorbed: bool) -> float:
    """Speed of greedy decoding, one path and one token at a time, after the prompt in `cache`."""
    cache, token = copy.deepcopy(cache), torch.tensor([[model.config.bos_token_id]])
    with patch.object(SpaceExploreLatentAttention, "can_absorb", lambda self: absorbed):
        start = time.perf_counter()
        for _ in range(NEW_TOKENS):
            token = model(token, cache=cache).logits[:, -1:].argmax(-1)
        return NEW_TOKENS / (time.perf_counter() - start)


def compare_speeds(recipe: dict) -> list[tuple[float, float]]:
    """Pairs of the absorbed and the expanded form's speed."""
    model = make_model(recipe, "mla")
    cache = fill_cache(model, CONTEXT)
    return take_turns(*(partial(tokens_per_second, model, cache, absorbed) for absorbed in (True, False)))


def compare_contexts(recipe: dict) -> list[tuple[float, float]]:
    """Pairs of the speed after a short context and after a long one."""
    model = make_model({**recipe, "max_position_embeddings": 2 * LONG}, "mla")
    return take_turns(*(partial(tokens_per_second, model, fill_cache(model, steps), True) for steps in (SHORT, LONG)))


def take_turns(first: Callable[[], float], second: Callable[[], float]) -> list[tuple[float, float]]:
    """Speeds of both, run side by side so that a busy machine slows down both."""
    pairs = []
    for repeat in range(REPEATS + 1):
        order = (first, second) if repeat % 2 else (second, first)
        speeds = {run: run() for run in order}
        pairs.append((speeds[first], speeds[second]))
    return pairs[1:]  # the first warms up


def format_speeds(what: str, names: tuple[str, str], pairs: list[tuple[float, float]]) -> str:
    first, second = (median(speeds) for speeds in zip(*pairs, strict=True))
    ratios = sorted(fast / slow for fast, slow in pairs)
    return (
        f"{what}, median of {len(pairs)} pairs: {first:.1f} tokens/s {names[0]}, {second:.1f} {names[1]}; "
        f"ratio {median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--model-config", type=Path, default=RECIPE, help="config.json; default: recipes/27m")
    recipe = json.loads(parser.parse_args(argv).model_config.read_text(encoding="utf-8"))
    torch.set_num_threads(1)  # a second would measure whatever else the machine is doing
    sizes, speeds, contexts = compare_sizes(recipe), compare_speeds(recipe), compare_contexts(recipe)
    print(format_sizes(sizes))
    print(f"\n{format_speeds(f'one path from a context of {CONTEXT}', ('absorbed', 'expanded'), speeds)}")
    print(format_speeds("one path absorbed", (f"after {SHORT:,} steps", f"after {LONG:,}"), contexts), flush=True)
    if median(short / long for short, long in contexts) > MOST_TIME:
        raise SystemExit(f"a token after {LONG:,} steps takes more than {MOST_TIME} times as long as after {SHORT}")
    if sizes["mla"] * LEAST_SAVING > sizes["mha"]:
        raise SystemExit(f"mla takes more than 1/{LEAST_SAVING} of mha")  # on standard error, with exit code 1


if __name__ == "__main__":
    main()
