"""A training step and a forward pass beside transformers' own DeepSeek-V3 and Mixtral of the same size and shape.

    python benchmarks/peers.py [--model-config FILE] [--tokens 2048] [--context 64] [--rounds 9] [--threads 1]

All have our heads, our losses and our optimiser; what differs is the decoder, which gets the features from one linear
layer. DeepSeek-V3 has every size of the configuration and computes what our decoder does. Mixtral knows no shared
expert, no dense first layer and no latents: its experts are as wide as gives it the same active parameters a token.
Ours is there with its front end, the wavelet CNN that the others lack, and as a decoder like them. transformers takes
grouped matrix products for experts by default, and so do all here; its plain loop over them is beside it, and batched
products, which copy an expert for every token, are left out.

All take turns, times are as in train_step.py, and the medians of the rounds' ratios are shown. Exit code 1 where a
decoder of theirs was faster than ours of the same shape in nine of ten rounds.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3Model, MixtralConfig, MixtralModel, PreTrainedModel

from spaceexploreai.benchmarks.train_step import Training, count_flops, parse_options, read_config, seconds
from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression, SpaceExploreModel, SpaceExploreModelOutput
from spaceexploreai.train.arguments import command
from spaceexploreai.train.memory import keep_freed_memory

# What our configuration calls as DeepSeek-V3's does.
COMMON = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_shared_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "norm_topk_prob",
    "routed_scaling_factor",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
    "attention_dropout",
)
NO_TOKENS = {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def make_deepseek(config: SpaceExploreConfig) -> DeepseekV3Model:
    """With one group of experts, as ours."""
    sizes = {name: getattr(config, name) for name in COMMON}
    return DeepseekV3Model(DeepseekV3Config(**sizes, **NO_TOKENS, n_group=1, topk_group=1))


def make_mixtral(config: SpaceExploreConfig) -> MixtralModel:
    with torch.device("meta"):
        wanted = active_parameters(make_deepseek(config))
        narrow = active_parameters(mixtral_of_width(config, 8))
    columns = 3 * config.hidden_size * config.num_experts_per_tok * config.num_hidden_layers  # met for each more
    # Grouped products want rows of whole 16 bytes: of eight numbers, in bfloat16.
    return mixtral_of_width(config, 8 + 8 * round((wanted - narrow) / columns / 8))


def mixtral_of_width(config: SpaceExploreConfig, width: int) -> MixtralModel:
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok")
    sizes = {name: getattr(config, name) for name in (*same, "max_position_embeddings", "rms_norm_eps")}
    heads = {"num_key_value_heads": config.num_attention_heads, "head_dim": config.v_head_dim}
    experts = {"num_local_experts": config.n_routed_experts, "intermediate_size": width}
    return MixtralModel(MixtralConfig(**sizes, **heads, **experts, **NO_TOKENS))


def make_ours(config: SpaceExploreConfig) -> SpaceExploreModel:
    """Ours without what reads the features."""
    nothing = {"mscnn_num_blocks": 0, "t2t_num_hidden_layers": 0, "t2t_loss_weight": 0.0}
    decoder = SpaceExploreModel(SpaceExploreConfig(**config.to_dict() | nothing))
    decoder.value_embedding = None
    return decoder


class Backbone(nn.Module):
    """Any decoder in the place of our backbone; one linear layer reads the features."""

    def __init__(self, decoder: PreTrainedModel, num_features: int):
        super().__init__()
        self.value_proj = nn.Linear(num_features, decoder.config.hidden_size)
        self.decoder = decoder
        decoder.set_input_embeddings(None)  # no tokens

    def forward(
        self, past_values: torch.Tensor, attention_mask: torch.Tensor, output_router_logits: bool, **unused
    ) -> SpaceExploreModelOutput:
        outputs = self.decoder(
            inputs_embeds=self.value_proj(past_values),
            attention_mask=attention_mask,
            use_cache=False,  # nor has ours one where Trainer trains it
            output_router_logits=output_router_logits,
        )
        return SpaceExploreModelOutput(outputs.last_hidden_state, router_logits=outputs.router_logits)


def with_decoder(
    make: Callable[[SpaceExploreConfig], PreTrainedModel], config: SpaceExploreConfig, experts: str = "grouped_mm"
) -> SpaceExploreForRegression:
    """Our heads and losses on a decoder."""
    model = SpaceExploreForRegression(config)
    model.model = Backbone(make(config), config.num_features)
    model.model.decoder.set_experts_implementation(experts)
    return model


LEAST_WINS = 0.9  # share of the rounds
OURS, EQUAL = "ours", "ours without its front end"
NETWORKS = {
    OURS: SpaceExploreForRegression,
    EQUAL: partial(with_decoder, make_ours),
    "DeepSeek-V3": partial(with_decoder, make_deepseek),
    "DeepSeek-V3, loop over experts": partial(with_decoder, make_deepseek, experts="eager"),
    "Mixtral": partial(with_decoder, make_mixtral),
    "Mixtral, loop over experts": partial(with_decoder, make_mixtral, experts="eager"),
}


def active_parameters(model: nn.Module) -> int:
    """Trained parameters that a token meets: of the routed experts as many as it is sent to."""
    config = next(module.config for module in model.modules() if hasattr(module, "config"))
    trained = [(name, weight.numel()) for name, weight in model.named_parameters() if weight.requires_grad]
    routed = sum(size for name, size in trained if ".experts." in name)
    return sum(size for _, size in trained) - routed + routed * config.num_experts_per_tok // config.num_local_experts


class Round(NamedTuple):
    """Seconds."""

    step: float
    forward: float


class Size(NamedTuple):
    parameters: int
    active: int
    flops: Round  # floating-point operations of the products, in place of seconds


@torch.inference_mode()
def forward(training: Training) -> None:
    inputs = {name: tensor for name, tensor in training.batch.items() if name != "labels"}
    training.model.eval()
    training.model(**inputs)
    training.model.train()


def size_of(training: Training) -> Size:
    parameters = sum(weight.numel() for weight in training.model.parameters() if weight.requires_grad)
    flops = Round(training.count_flops(), count_flops(partial(forward, training)))
    return Size(parameters, active_parameters(training.model), flops)


def measure(trainings: dict[str, Training], rounds: int) -> dict[str, list[Round]]:
    """Each goes first in every other round, so that none has the cooler machine."""
    measured = {name: [] for name in trainings}
    for turn in range(rounds + 1):
        for name in list(trainings)[:: 1 if turn % 2 else -1]:
            training = trainings[name]
            measured[name].append(Round(seconds(training.step), seconds(partial(forward, training))))
    return {name: found[1:] for name, found in measured.items()}  # the first warms up


def ratios(measured: dict[str, list[Round]], name: str, over: str, part: str) -> list[float]:
    """Time of one over that of another, round by round."""
    pairs = zip(measured[name], measured[over], strict=True)
    return [getattr(one, part) / getattr(other, part) for one, other in pairs]


def format_part(part: str, tokens: int, sizes: dict[str, Size], measured: dict[str, list[Round]]) -> str:
    lines = [f"| {part} of {tokens:,} tokens | parameters, M | active, M | GFLOP | s | tokens/s | GFLOP/s "]
    lines[0] += "| time over ours | a FLOP | over ours without front end |"
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, size in sizes.items():
        spent, flops = median(getattr(one, part) for one in measured[name]), getattr(size.flops, part)
        ours, equal = (median(ratios(measured, name, over, part)) for over in (OURS, EQUAL))
        per_flop = ours * getattr(sizes[OURS].flops, part) / flops
        lines.append(
            f"| {name} | {size.parameters / 1e6:.2f} | {size.active / 1e6:.2f} | {flops / 1e9:.1f} | {spent:.3f} "
            f"| {tokens / spent:,.0f} | {flops / spent / 1e9:.1f} | {ours:.3f} | {per_flop:.3f} | {equal:.3f} |"
        )
    return "\n".join(lines)


def faster_peers(measured: dict[str, list[Round]]) -> list[str]:
    """Those that beat ours of the same shape round after round; half of all equals have a median below one."""
    found = []
    for part in Round._fields:
        for name in measured:
            against = ratios(measured, name, EQUAL, part)
            if sum(ratio < 1 for ratio in against) >= LEAST_WINS * len(against):
                found.append(f"{part} of {name}")
    return found


@command
def main(argv: list[str] | None = None) -> None:
    args = parse_options(__doc__, argv, rounds=9, threads=1)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    config = read_config(args.model_config)
    trainings = {name: Training(config, args.tokens, args.context, make) for name, make in NETWORKS.items()}
    sizes = {name: size_of(training) for name, training in trainings.items()}
    measured = measure(trainings, args.rounds)
    print("\n\n".join(format_part(part, args.tokens, sizes, measured) for part in Round._fields), flush=True)
    if faster := faster_peers(measured):
        raise SystemExit(f"faster than ours of the same shape: {', '.join(faster)}")  # exit code 1


if __name__ == "__main__":
    main()
