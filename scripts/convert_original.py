"""Converts a checkpoint of the original SpaceExploreAI, a network of its own, into a folder that `AutoModel` loads.

    python scripts/convert_original.py --checkpoint FILE --output-dir DIR [--experts-per-token K] [--rope-theta BASE]
        [--attention-scale-factor FACTOR]

FILE is the `.pt` that its training wrote, the bare weights in a `.bin`, or the `.safetensors` made of either. Only
tensors are read: a file that holds anything to execute is refused. DIR must be new or empty. docs/conversion.md says
what the weights are good for: to compare with, and not to forecast.
"""

import hashlib
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from spaceexploreai.data.files import check_new_folder, whole_folder
from spaceexploreai.legacy_spaceexplore import (
    FEATURES,
    LEAK,
    LEAKED_FEATURES,
    PREDICTIONS,
    LegacySpaceExploreConfig,
    LegacySpaceExploreModel,
    rotary_angles,
)
from spaceexploreai.train.arguments import bare_parser, command

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
Tensors = dict[str, torch.Tensor]

# --- reading ---------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> Tensors:
    """Reads the weights of a file, under the names they have there."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix not in (*TORCH_SUFFIXES, ".safetensors"):
        raise ValueError(f"{path} is neither a {', '.join(TORCH_SUFFIXES)} nor a .safetensors file")
    stored = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    # What training wrote has the weights beside the state of the optimizer.
    tensors = stored.get("model_state_dict", stored) if isinstance(stored, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} holds no weights by their names")
    return tensors


def _read_safetensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def _read_torch(path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint raise whatever they lead to
        # The library's own message tells the user to load the file with all that it executes.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(
                f"{path} holds {code[1]}, which is not weights and may execute anything: it is not loaded"
            ) from error
        raise ValueError(f"{path} is damaged or no file of torch.save") from error


# --- what network it is ----------------------------------------------------------------------------------------------

ROTARY = "rotary_emb.freqs_buffer"
# Buffers of the attention that was called mixed: what it saw last.
CACHES = re.compile(r"layers\.\d+\.attention\.(kv|pe)_cache")


def source_name(name: str, softmax_over: str) -> str:
    """The original's name of a tensor of ours."""
    name = name.replace(".moe.router.", ".moe.router.router.")
    name = re.sub(r"\.experts\.(\d+)\.", r".experts.\1.mlp.", name)
    return name.replace(".attention.", ".attention.attention.") if softmax_over == "keys" else name


def shape_of(tensors: Tensors, name: str, dimensions: int) -> torch.Size:
    if name not in tensors:
        raise ValueError(f"this is no checkpoint of the original SpaceExploreAI: it has no {name}")
    if tensors[name].ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, got shape {tuple(tensors[name].shape)}")
    return tensors[name].shape


def infer_config(
    tensors: Tensors, num_experts_per_tok: int, rope_theta: float, attention_scale_factor: float
) -> LegacySpaceExploreConfig:
    """Reads from names and shapes all but the arguments, which leave no trace in them."""
    hidden_size, num_features = shape_of(tensors, "input_projection.weight", 2)
    outputs = shape_of(tensors, "head.weight", 2)[0]
    kinds = [kind for kind, size in PREDICTIONS.items() if size == outputs]
    if not kinds:
        raise ValueError(f"head.weight must have 1 or 3 rows, got {outputs}")
    layers = {match[1] for match in map(re.compile(r"layers\.(\d+)\.").match, tensors) if match}
    features = {"feature_names": list(FEATURES)} if num_features == len(FEATURES) else {}
    return LegacySpaceExploreConfig(
        num_features=num_features,
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        n_routed_experts=shape_of(tensors, "layers.0.moe.router.router.weight", 2)[0],
        moe_intermediate_size=shape_of(tensors, "layers.0.moe.experts.0.mlp.w1.weight", 2)[0],
        max_position_embeddings=shape_of(tensors, ROTARY, 2)[0],
        num_experts_per_tok=num_experts_per_tok,
        rope_theta=rope_theta,
        attention_scale_factor=attention_scale_factor,
        prediction_type=kinds[0],
        **infer_attention(tensors),
        **features,
    )


def infer_attention(tensors: Tensors) -> dict:
    """With N heads of sizes n (without position), r (rotary) and v the projections have N(n + r), N(n + v) and Nv
    rows or columns, and r is what the latents leave of theirs; so three sizes give N, n and v."""
    mixed = any(re.match(r"layers\.\d+\.attention\.attention\.", name) for name in tensors)
    prefix = "layers.0.attention.attention." if mixed else "layers.0.attention."
    compressed = f"{prefix}q_proj_a.weight" in tensors
    query = shape_of(tensors, f"{prefix}{'q_proj_b' if compressed else 'q_proj'}.weight", 2)[0]
    key_value = shape_of(tensors, f"{prefix}kv_proj_b.weight", 2)[0]
    value = shape_of(tensors, f"{prefix}out_proj.weight", 2)[1]
    rank = shape_of(tensors, f"{prefix}kv_norm.weight", 1)[0]
    rotary = shape_of(tensors, f"{prefix}kv_proj_a.weight", 2)[0] - rank
    heads = max((query + value - key_value) // max(rotary, 1), 1)
    sizes = {"qk_nope_head_dim": query // heads - rotary, "qk_rope_head_dim": rotary, "v_head_dim": value // heads}
    if min(sizes.values()) < 1 or rotary % 2:
        raise ValueError(
            f"the projections of {prefix.rstrip('.')} fit no number of heads: {query} rows for queries, {key_value} "
            f"for keys and values, {value} columns for outputs, {rotary} rotary dimensions"
        )
    return {
        **sizes,
        "num_attention_heads": heads,
        "softmax_over": "keys" if mixed else "heads",
        "q_lora_rank": shape_of(tensors, f"{prefix}q_proj_a.weight", 2)[0] if compressed else None,
        "kv_lora_rank": rank,
    }


# --- its weights -----------------------------------------------------------------------------------------------------


def build_model(tensors: Tensors, config: LegacySpaceExploreConfig) -> LegacySpaceExploreModel:
    """The network with the weights of a checkpoint, all of which it takes."""
    with torch.device("meta"):
        model = LegacySpaceExploreModel(config)
    sources = {name: source_name(name, config.softmax_over) for name in model.state_dict()}
    check_tensors(tensors, {sources[name]: tensor.shape for name, tensor in model.state_dict().items()}, config)
    check_rotary(tensors[ROTARY], config)
    # Copies: tensors of a torch file may be views of one another.
    weights = {name: tensors[source].clone(memory_format=torch.contiguous_format) for name, source in sources.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def check_tensors(tensors: Tensors, shapes: dict[str, torch.Size], config: LegacySpaceExploreConfig) -> None:
    """Raises a ValueError unless there are the weights of these shapes, and nothing else but what is recomputed."""
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise ValueError(f"the checkpoint has no {missing[0]}")
    for name, tensor in tensors.items():
        if name in shapes:
            check_weight(name, tensor, shapes[name], tensors["head.weight"].dtype)
        elif name != ROTARY and not (config.softmax_over == "keys" and CACHES.fullmatch(name)):
            raise ValueError(f"{name} is no tensor of the original SpaceExploreAI with RMS norms")


def check_weight(name: str, tensor: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype or not dtype.is_floating_point:
        raise ValueError(f"{name} must be floating-point and as head.weight, got {tensor.dtype} and {dtype}")


def check_rotary(stored: torch.Tensor, config: LegacySpaceExploreConfig) -> None:
    """Compares the rotations of the checkpoint with those of our network, which recomputes them. A safetensors file
    has their real part alone."""
    angles = rotary_angles(config, config.max_position_embeddings)
    rotations = torch.polar(torch.ones_like(angles), angles)
    if stored.shape != rotations.shape:
        raise ValueError(f"{ROTARY} must have shape {tuple(rotations.shape)}, got {tuple(stored.shape)}")
    difference = (stored - (rotations if stored.is_complex() else rotations.real)).abs().max()
    if not difference < 1e-4:  # float32 rounds the last of 128 angles by 1e-5
        raise ValueError(
            f"{ROTARY} is not that of --rope-theta {config.rope_theta:g}: they differ by {difference:.2g}"
        )


# --- writing ---------------------------------------------------------------------------------------------------------

CARD = """\
---
library_name: transformers
license: other
tags: [time-series, stocks, not-for-trading]
---

# A checkpoint of the original SpaceExploreAI

> **{leak}**

These are the weights of `{file}` (SHA-256 `{digest}`), unchanged, in the form that transformers loads.
{parameters:,} parameters, {kind}, attention weights normalised over {softmax_over}.

## What they are good for

To repeat what the original computes, and to compare with it. **Nothing else:** some of its inputs at a day, such as
{leaked}, are known only days later. At the newest day they do not exist; on any other
day the network may have read them off instead of forecasting.

## Inputs

```python
from transformers import AutoModel

model = AutoModel.from_pretrained(folder, trust_remote_code=True)
prediction = model(past_values).prediction  # past_values: (batch, up to {limit} days, {features} columns)
```

{columns}

Each column, with 0 for a missing value, was scaled by a RobustScaler of scikit-learn that was fitted to the first
81 % of the ticker's days; so was the target, by default the return of the next 2 days in percent. The checkpoint does
not hold these scalers.

## Licence

That of the original, which has named two, MIT and Apache-2.0: ask its authors before passing the weights on.
The code in this folder is under the MIT License.
"""


def list_columns(config: LegacySpaceExploreConfig) -> str:
    if config.feature_names is None:
        return "Their names are not known here. The original's code put future returns among any choice of columns."
    marked = [f"**{name}**" if name in LEAKED_FEATURES else name for name in config.feature_names]
    return f"The columns of the published recipe, in order, those in bold from the future: {', '.join(marked)}."


def write_card(config: LegacySpaceExploreConfig, parameters: int, checkpoint: Path) -> str:
    return CARD.format(
        leak=LEAK,
        file=checkpoint.name,
        digest=hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        parameters=parameters,
        kind=config.prediction_type,
        softmax_over=config.softmax_over,
        leaked=", ".join(f"`{name}`" for name in LEAKED_FEATURES),
        limit=config.max_position_embeddings,
        features=config.num_features,
        columns=list_columns(config),
    )


def convert(
    checkpoint: Path,
    folder: Path,
    num_experts_per_tok: int = 2,
    rope_theta: float = 10000.0,
    attention_scale_factor: float = 1.0,
) -> LegacySpaceExploreModel:
    """Writes weights, configuration, code and model card of a checkpoint: all of it or nothing."""
    check_new_folder(folder)
    tensors = read_checkpoint(checkpoint)
    model = build_model(tensors, infer_config(tensors, num_experts_per_tok, rope_theta, attention_scale_factor))
    with whole_folder(folder) as whole:
        model.save_pretrained(whole)
        card = write_card(model.config, model.num_parameters(), checkpoint)
        (whole / "README.md").write_text(card, encoding="utf-8")
    return model


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help=".pt, .bin or .safetensors file")
    parser.add_argument("--output-dir", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--experts-per-token", type=int, default=2, help="routed experts of a token (default: 2)")
    parser.add_argument("--rope-theta", type=float, default=10000.0, help="base of the rotary angles (default: 10000)")
    parser.add_argument("--attention-scale-factor", type=float, default=1.0, help="of its configuration (default: 1)")
    args = parser.parse_args(argv)
    model = convert(
        args.checkpoint, args.output_dir, args.experts_per_token, args.rope_theta, args.attention_scale_factor
    )
    config = model.config
    print(
        f"wrote {args.output_dir}: {model.num_parameters():,} parameters, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} heads, attention weights normalised over {config.softmax_over}"
    )
    print(LEAK)


if __name__ == "__main__":
    main()
