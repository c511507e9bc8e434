"""Draws the network, with the sizes of a recipe, and counts what the recipes' networks hold.

    python scripts/draw_architecture.py [--model-config FILE] [--output docs/images/architecture.png]
    python scripts/draw_architecture.py --table

With --table it prints the presets of recipes/ as a Markdown table and draws nothing.
"""

import json
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.files import write_atomically
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.t2t_spaceexplore import WORDS
from spaceexploreai.train.arguments import bare_parser, command
from spaceexploreai.train.report import count, count_active

RECIPES = Path(__file__).parents[1] / "recipes"
COLUMNS = (
    "recipe",
    "hidden size",
    "layers",
    "parameters",
    "of which T2T",
    "active per token",
    "cached floats per token and layer",
)


def read_config(path: Path) -> SpaceExploreConfig:
    return SpaceExploreConfig(**json.loads(path.read_text(encoding="utf-8")))


# --- the table of presets ---


def cached_floats(config: SpaceExploreConfig) -> int:
    if config.attention_type == "mla":
        return config.kv_lora_rank + config.qk_rope_head_dim
    return 2 * config.num_key_value_heads * config.head_dim


def preset_row(path: Path) -> tuple[str, ...]:
    config = read_config(path)
    with torch.device("meta"):
        model = SpaceExploreForRegression(config)
    numbers = (
        config.hidden_size,
        config.num_hidden_layers,
        count(model),
        count(model.model.t2t),
        count_active(model),
        cached_floats(config),
    )
    return (path.parent.name, *(f"{number:,}" for number in numbers))


def presets_table() -> str:
    """All recipes, the smallest first, as Markdown."""
    rows = [preset_row(path) for path in RECIPES.glob("*/config.json")]
    rows.sort(key=lambda row: int(row[3].replace(",", "")))
    ruler = ("---", *["---:"] * (len(COLUMNS) - 1))
    return "\n".join(f"| {' | '.join(row)} |" for row in (COLUMNS, ruler, *rows))


# --- the picture, in inches from its lower left corner ---

WIDTH, HEIGHT, DPI = 16, 13.4, 100
INK, FAINT = "#1f2933", "#7b8794"
MODEL, TEACHER, PLAIN, PANEL = "#d9e6f5", "#fbe6cf", "white", "#f4f5f7"
BODY, DETAIL = 14.5, 13.0
FLOW, SIDE = 5.65, 1.8  # middles of the two columns on the left
LEFT, RIGHT = 8.0, 15.8  # edges of the opened blocks
TIMES = "\N{MULTIPLICATION SIGN}"


def note(axes: Axes, x: float, y: float, text: str, ha="center", size=DETAIL, color=INK, **style):
    axes.text(x, y, text, ha=ha, va="center", fontsize=size, color=color, linespacing=1.25, **style)


def box(axes: Axes, x: float, y: float, text: str, width=3.1, height=0.8, fill=MODEL):
    """A labelled box around its middle."""
    corner, shape = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.07"
    patch = FancyBboxPatch(corner, width, height, boxstyle=shape, facecolor=fill, edgecolor=INK, linewidth=1.2)
    axes.add_patch(patch)
    note(axes, x, y, text)


def stack(axes: Axes, x: float, boxes: list[tuple], width: float):
    """Boxes of (middle, text, fill) from the top down, an arrow from each to the next."""
    for (above, *_), (below, *_) in pairwise(boxes):
        arrow(axes, (x, above - 0.4), (x, below + 0.4))
    for y, text, fill in boxes:
        box(axes, x, y, text, width, fill=fill)


def arrow(axes: Axes, *points: tuple[float, float], style="-"):
    """A line through `points` with a head at the last."""
    *_, tail, head = points
    line = {"color": INK, "linewidth": 1.3, "linestyle": style}
    if len(points) > 2:
        axes.plot(*zip(*points[:-1], strict=True), solid_capstyle="butt", **line)
    axes.annotate("", head, tail, arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, **line})


def plus(axes: Axes, x: float, y: float):
    circle = {"boxstyle": "circle,pad=0.12", "facecolor": PLAIN, "edgecolor": INK, "linewidth": 1.2}
    note(axes, x, y, "+", size=BODY, bbox=circle)


def panel(axes: Axes, bottom: float, top: float, title: str):
    corner, size = (LEFT, bottom), (RIGHT - LEFT, top - bottom)
    shape = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=shape, facecolor=PANEL, edgecolor=FAINT, linewidth=1.0))
    note(axes, LEFT + 0.25, top - 0.3, title, ha="left", size=BODY, weight="bold")


def draw_flow(axes: Axes, config: SpaceExploreConfig):
    """The column from features to hidden states."""
    size, features = config.hidden_size, config.num_features
    experts = max(config.num_hidden_layers - config.first_k_dense_replace, 0)
    depth = f"{config.num_hidden_layers} {TIMES} decoder layer"
    stops = [
        (12.75, f"past_values\n(B, T, {features}), NaN = missing", PLAIN),
        (11.65, f"input norm: {config.input_norm}", MODEL),
        (10.55, f"value embedding {features} → {size}\n+ missing indicator", MODEL),
        (9.45, f"{config.mscnn_num_blocks} {TIMES} MSCNN block\n(B, T, {size})", MODEL),
        (7.25, f"<ts> ← steps: (B, S, {size})\nwithout tokens S = T", MODEL),
        (6.0, f"{depth}\n{experts} with experts", MODEL),
        (4.9, "RMSNorm", MODEL),
    ]
    stack(axes, FLOW, stops, width=3.1)


def draw_tokens(axes: Axes, config: SpaceExploreConfig):
    box(axes, SIDE, 7.25, f"token embedding\nV → {config.hidden_size}", 2.9)
    box(axes, SIDE, 6.0, "input_ids (B, S)\n<ts> … <bos> <r131> …", 2.9, fill=PLAIN)
    arrow(axes, (SIDE, 6.4), (SIDE, 6.85))
    arrow(axes, (SIDE + 1.45, 7.25), (FLOW - 1.55, 7.25))


def draw_extractor(axes: Axes, config: SpaceExploreConfig):
    """The time-to-text extractor and the loss by which it teaches."""
    length, overlap = config.t2t_patch_length, config.t2t_patch_overlap
    stops = [
        (11.65, f"T2T patches of {length} days,\noverlap {overlap}", TEACHER),
        (10.55, f"{config.t2t_num_hidden_layers} encoder layers\nof {config.t2t_hidden_size}", TEACHER),
        (9.45, f"one of {len(WORDS)} words\nfor each patch", TEACHER),
    ]
    stack(axes, SIDE, stops, width=2.9)
    box(axes, SIDE, 8.35, "feature loss\n(training only)", 2.9, fill=TEACHER)
    arrow(axes, (FLOW - 1.55, 12.75), (SIDE, 12.75), (SIDE, 12.05))
    arrow(axes, (SIDE - 1.45, 10.55), (0.15, 10.55), (0.15, 8.35), (SIDE - 1.45, 8.35), style="--")
    arrow(axes, (FLOW, 8.35), (SIDE + 1.45, 8.35), style="--")


def draw_heads(axes: Axes, config: SpaceExploreConfig):
    horizons, levels = len(config.horizons), len(config.quantile_levels)
    heads = [
        (f"mean\n(B, T, {horizons})", "squared error"),
        (f"quantiles\n(B, T, {horizons}, {levels})", "pinball loss"),
        (f"direction\n(B, T, {horizons}, {config.num_labels})", "cross-entropy"),
        ("next token\n(B, S, V)", "cross-entropy"),
    ]
    for x, (text, loss) in zip((1.2, 3.0, 4.8, 6.6), heads, strict=True):
        arrow(axes, (FLOW, 4.5), (FLOW, 3.85), (x, 3.85), (x, 3.3))
        box(axes, x, 2.85, text, 1.65, 0.9)
        note(axes, x, 2.15, loss, color=FAINT)
    for start, end, name in ((0.4, 3.8, "ForRegression"), (4.0, 5.6, "ForClassification"), (5.8, 7.4, "ForCausalLM")):
        axes.plot([start, end], [1.85, 1.85], color=FAINT, linewidth=1.0)
        note(axes, (start + end) / 2, 1.6, name)


def draw_legend(axes: Axes):
    note(axes, 0.4, 0.85, "B series, T time steps, S tokens, V vocabulary", ha="left", color=FAINT)
    colours = "orange: teaches and describes, no forecast reads it; dashed: in training"
    note(axes, 0.4, 0.5, colours, ha="left", color=FAINT)


def draw_mscnn(axes: Axes, config: SpaceExploreConfig):
    """An opened block: branches, wavelet split, two sums."""
    width, branches = config.mscnn_hidden_size or config.hidden_size, config.mscnn_num_branches
    if branches > 4:
        raise ValueError(f"the picture has room for 4 branches, got mscnn_num_branches={branches}")
    middle, right, top = 11.9, 15.35, 12.45
    panel(axes, 7.0, 13.15, "MSCNN block")
    arrow(axes, (middle, 12.6), (middle, 12.2))
    box(axes, middle, 11.9, f"RMSNorm, Linear {config.hidden_size} → {width}", 5.65, 0.62)
    columns = [9.75 + 4.3 * branch / max(branches - 1, 1) for branch in range(branches)]
    for x in columns:
        draw_branch(axes, config, x, width // branches)
    for x, following in pairwise(columns):
        arrow(axes, (x + 0.65, 10.85), (following - 0.65, 10.85))
        arrow(axes, (following - 0.33, 8.95), (x - 0.19, 8.95))
        arrow(axes, (x + 0.33, 8.4), (following + 0.19, 8.4))
    for x in columns:
        plus(axes, x - 0.33, 8.95)
        plus(axes, x + 0.33, 8.4)
    note(axes, 8.2, 8.95, "long terms", ha="left")
    note(axes, 8.2, 8.4, "short terms", ha="left")
    box(axes, middle, 7.5, f"add, Linear {width} → {config.hidden_size}", 5.65, 0.62)
    arrow(axes, (middle + 2.825, 7.5), (right - 0.17, 7.5))
    arrow(axes, (middle, top), (right, top), (right, 7.67))
    plus(axes, right, 7.5)


def draw_branch(axes: Axes, config: SpaceExploreConfig, x: float, channels: int):
    arrow(axes, (x, 11.59), (x, 11.2))
    box(axes, x, 10.85, f"{channels} channels\nconv {config.mscnn_kernel_size}, {config.hidden_act}", 1.3, 0.7)
    arrow(axes, (x, 10.5), (x, 10.15))
    box(axes, x, 9.8, f"{config.wavelet}, {config.wavelet_levels} levels\nlong | short", 1.3, 0.7)
    arrow(axes, (x - 0.33, 9.45), (x - 0.33, 7.81))
    arrow(axes, (x + 0.33, 9.45), (x + 0.33, 7.81))


def draw_decoder(axes: Axes, config: SpaceExploreConfig):
    """An opened layer: attention on the left, experts on the right."""
    attention, experts, top, bottom = 9.95, 13.75, 6.05, 1.3
    panel(axes, 0.3, 6.75, "Decoder layer")
    for x, far in ((attention, 8.2), (experts, 15.6)):
        arrow(axes, (x, top), (x, 5.72))
        box(axes, x, 5.45, "RMSNorm", height=0.54)
        side = 0.17 if far > x else -0.17
        arrow(axes, (x, top), (far, top), (far, bottom), (x + side, bottom))
    draw_attention(axes, config, attention)
    draw_experts(axes, config, experts)
    arrow(axes, (attention + 0.17, bottom), (11.85, bottom), (11.85, top + 0.2), (experts, top + 0.2), (experts, top))
    arrow(axes, (experts, bottom), (experts, 0.75))
    for x in (attention, experts):
        arrow(axes, (x, 1.95), (x, bottom + 0.17))
        plus(axes, x, bottom)
    which = f"first {config.first_k_dense_replace} of {config.num_hidden_layers} layers"
    dense = f"{which}: one SwiGLU of width {config.intermediate_size:,}, no experts"
    note(axes, LEFT + 0.25, 0.6, dense, ha="left", color=FAINT)


def draw_attention(axes: Axes, config: SpaceExploreConfig, x: float):
    heads, size, rotated = config.num_attention_heads, config.head_dim, ""
    query, cached = f"{heads} {TIMES} {size}", f"keys, values\n2 {TIMES} {config.num_key_value_heads} {TIMES} {size}"
    if config.attention_type == "mla":
        query, rotated = f"{heads} {TIMES} ({config.qk_nope_head_dim} + {size})", f" on the last {size}"
        cached = f"latent + key\n{config.kv_lora_rank} + {size}"
        size = config.v_head_dim
    box(axes, x - 0.78, 4.6, f"query\n{query}", 1.46, 0.72)
    box(axes, x + 0.78, 4.6, cached, 1.46, 0.72)
    for shift in (-0.78, 0.78):
        arrow(axes, (x + shift, 5.18), (x + shift, 4.96))
        arrow(axes, (x + shift, 4.24), (x + shift, 4.01))
    box(axes, x, 3.74, f"RoPE{rotated}", height=0.54)
    arrow(axes, (x + 0.45, 3.47), (x + 0.45, 3.27))
    box(axes, x + 0.45, 3.0, f"cache, then {heads} heads", 2.2, 0.54)
    arrow(axes, (x - 1.1, 3.47), (x - 1.1, 2.57))
    arrow(axes, (x + 0.45, 2.73), (x + 0.45, 2.57))
    attention = f"{config.attention_type} attention, causal\nLinear {heads} {TIMES} {size} → {config.hidden_size}"
    box(axes, x, 2.26, attention, height=0.62)


def draw_experts(axes: Axes, config: SpaceExploreConfig, x: float):
    chosen, routed = config.num_experts_per_tok, config.n_routed_experts
    arrow(axes, (x, 5.18), (x, 4.96))
    box(axes, x, 4.6, f"router: sigmoid,\ntop {chosen} of {routed}", 1.9, 0.72)
    arrow(axes, (x, 5.07), (x - 1.3, 5.07), (x - 1.3, 3.93))
    arrow(axes, (x + 0.45, 4.24), (x + 0.45, 3.93))
    box(axes, x - 1.3, 3.66, f"{config.n_shared_experts} shared", 0.95, 0.54)
    numbers = [str(number + 1) for number in range(routed)] if routed <= 8 else ["1", "2", "3", "…", str(routed)]
    step = 2.4 / len(numbers)
    for place, number in enumerate(numbers):
        fill = MODEL if place < chosen else PLAIN
        box(axes, x - 0.75 + step * (place + 0.5), 3.66, number, 0.88 * step, 0.54, fill)
    note(axes, x - 0.43, 2.98, f"SwiGLU of\nwidth {config.moe_intermediate_size:,}", color=FAINT)
    for tail in (x - 1.3, x + 0.45):
        arrow(axes, (tail, 3.39), (tail, 2.57))
    box(axes, x, 2.26, "shared + weighted sum", height=0.62)


def draw(config: SpaceExploreConfig) -> Figure:
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    draw_flow(axes, config)
    draw_tokens(axes, config)
    if config.t2t_num_hidden_layers:
        draw_extractor(axes, config)
    draw_heads(axes, config)
    draw_legend(axes)
    draw_mscnn(axes, config)
    draw_decoder(axes, config)
    return figure


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--model-config", type=Path, default=RECIPES / "27m" / "config.json", help="default: the 27m")
    parser.add_argument("--output", type=Path, default=Path("docs/images/architecture.png"))
    parser.add_argument("--table", action="store_true", help="print the presets instead")
    args = parser.parse_args(argv)
    if args.table:
        print(presets_table())
        return
    write_atomically(args.output, draw(read_config(args.model_config)).savefig)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
