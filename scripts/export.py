"""Exports a checkpoint as a graph that runs without this package: with onnxruntime alone, or with torch alone.

    python scripts/export.py --model DIR --output-dir EXPORT [--format onnx torch] [--int8]

Writes model.onnx, with --int8 model_int8.onnx, and with --format torch model.pt2 (torch.export), for any batch and any
length up to the longest context; preprocessor_config.json; and export.json, which says what goes in and comes out.
Each graph is run on windows of the embedded sample beside the network: if one differs by more than 1e-4 of the largest
output, nothing is written; but for int8, whose difference is shown. See docs/export.md.
"""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from spaceexploreai.data.collators import collate_windows
from spaceexploreai.data.files import check_new_folder, whole_folder
from spaceexploreai.data.prices import read_sample
from spaceexploreai.data.windows import IGNORE_INDEX, DateRange, supervised_windows
from spaceexploreai.evaluation.classes import classes, log_losses
from spaceexploreai.evaluation.metrics import crps
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForClassification, SpaceExploreForRegression
from spaceexploreai.scripts.forecasters import load_forecaster
from spaceexploreai.train.arguments import bare_parser, command
from spaceexploreai.train.sampling import ModelPaths

# What goes into a head and what comes out of it, and the loss that its forecasts are judged by.
INPUTS = {
    SpaceExploreForRegression: ("past_values", "attention_mask", "scale"),
    SpaceExploreForClassification: ("past_values", "attention_mask"),
}
OUTPUTS = {SpaceExploreForRegression: ("mean", "quantiles"), SpaceExploreForClassification: ("logits",)}
LOSSES = {SpaceExploreForRegression: "crps", SpaceExploreForClassification: "log_loss"}

ONNX, INT8, TORCH = "model.onnx", "model_int8.onnx", "model.pt2"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of the largest output
BLOCK_SIZE = 32  # numbers of a row of int8 that share a scale
INT8_PRODUCTS = 4  # the accuracy_level of onnxruntime that multiplies int8 by int8, where the CPU can
BATCH_SIZE = 32

Network = SpaceExploreForRegression | SpaceExploreForClassification
Run = Callable[[dict[str, torch.Tensor]], dict[str, np.ndarray]]  # a graph: its inputs to its outputs, by name

# Shapes: B batch, T time steps, N unpadded steps of all windows, H horizons, Q quantiles


# --- torch.export ----------------------------------------------------------------------------------------------------


class Graph(nn.Module):
    """What a network forecasts at every step, and nothing of its training."""

    def __init__(self, model: Network):
        super().__init__()
        self.model = model

    def forward(self, past_values, attention_mask, scale=None) -> dict[str, torch.Tensor]:
        outputs = self.model(past_values=past_values, attention_mask=attention_mask, scale=scale, use_cache=False)
        return {name: outputs[name] for name in OUTPUTS[type(self.model)]}


@contextmanager
def traceable(model: Network, checks: bool) -> Iterator[None]:
    """Runs the experts in a loop: exact, without transformers' own operators, and each for its own steps alone."""
    usual = model.config._experts_implementation
    model.set_experts_implementation("eager")
    try:
        with patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK=str(int(not checks))):
            yield
    finally:
        model.set_experts_implementation(usual)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters say of themselves and of each operator."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def trace(model: Network) -> ExportedProgram:
    """The graph for any batch and any length up to the longest context."""
    shape = (2, 3)  # a size of one would be taken for a constant
    example = {
        "past_values": torch.zeros(*shape, model.config.num_features),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "scale": torch.ones(shape),
    }
    example = {name: example[name] for name in INPUTS[type(model)]}
    sizes = {0: Dim("batch", min=1), 1: Dim("time", min=1, max=model.config.max_position_embeddings)}
    with torch.no_grad():
        return torch.export.export(Graph(model), (), kwargs=example, dynamic_shapes=dict.fromkeys(example, sizes))


def write_torch(model: Network, path: Path) -> None:
    """A zip file of JSON and raw tensors. Example inputs would be a pickle in it: there are none."""
    with traceable(model, checks=True):
        program = trace(model)
        program.example_inputs = None
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # has paths of this machine
        torch.export.save(program, path)


def run_module(graph: nn.Module) -> Run:
    def run(batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {name: values.numpy() for name, values in graph(**batch).items()}

    return run


# --- ONNX ------------------------------------------------------------------------------------------------------------


def translations() -> dict:
    """Operators that torch translates to ONNX so that int8 would not reach them."""
    from onnxscript import opset18 as op

    def linear(values, weight, bias=None):
        """A MatMul always; torch makes a Gemm where there are two axes, as for the experts."""
        product = op.MatMul(values, op.Transpose(weight, perm=[1, 0]))
        return product if bias is None else op.Add(product, bias)

    return {torch.ops.aten.linear.default: linear}


def write_onnx(model: Network, path: Path) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript.optimizer import optimize

    names, any_size = OUTPUTS[type(model)], 2**62
    with traceable(model, checks=False):  # ONNX has no operator that refuses
        exported = torch.onnx.export(
            trace(model),
            output_names=names,
            custom_translation_table=translations(),
            optimize=False,
            verbose=False,
        )
    # Parts the packed weights of the experts into a constant for each.
    optimize(exported.model, input_size_limit=any_size, output_size_limit=any_size)
    for node in exported.model.graph:
        for value in node.outputs:
            if value.name in names and not value.is_graph_output():
                value.name += "_inner"  # torch calls it after its operator, as "mean"
    ClearMetadataAndDocStringPass()(exported.model)  # paths of this machine
    exported.save(path)


def write_int8(source: Path, path: Path) -> None:
    """Weights as int8, a scale for each block of a row; so are the rows that are multiplied with them, as they come.

    Not `quantize_dynamic`, whose scale is one for all steps and tickers of a batch: with it later steps and other
    tickers change a forecast.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(source), bits=8, block_size=BLOCK_SIZE, is_symmetric=True, accuracy_level=INT8_PRODUCTS
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))


def run_onnx(path: Path, threads: int = 0) -> Run:
    """Runs a file with `threads` threads, by default one for each core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {name: one.numpy() for name, one in batch.items()}), strict=True))

    return run


# --- parity ----------------------------------------------------------------------------------------------------------


def sample_batches(model: Network, extractor: SpaceExploreFeatureExtractor) -> list[dict[str, torch.Tensor]]:
    """Windows of the embedded sample, which do not overlap, with labels; those at a ticker's start are padded."""
    prices, config, length = read_sample(), model.config, extractor.context_length
    within = DateRange(prices["date"].min(), prices["date"].max())
    windows = supervised_windows(
        extractor.encode(prices), config.horizons, within, length, stride=length, target=config.target
    )
    starts = range(0, len(windows), BATCH_SIZE)
    places = [range(start, min(start + BATCH_SIZE, len(windows))) for start in starts]
    return [collate_windows([windows[place] for place in batch]) for batch in places]


def unpadded(run: Run, batches: list[dict[str, torch.Tensor]], inputs: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Outputs (N, …) at all unpadded steps; those at padded ones mean nothing."""
    found = []
    for batch in batches:
        real = batch["attention_mask"].bool().numpy()
        outputs = run({name: batch[name] for name in inputs})
        found.append({name: values[real] for name, values in outputs.items()})
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def differences(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest and mean difference of two sets of outputs, over the largest output."""
    largest = max(np.abs(values).max() for values in expected.values())
    apart = np.concatenate([np.abs(found[name] - values).ravel() for name, values in expected.items()]) / largest
    return {"largest_difference": float(apart.max()), "mean_difference": float(apart.mean())}


def loss(model: Network, outputs: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> float:
    """CRPS of the quantiles or log-loss of the classes, over all steps and horizons with a label."""
    config, known = model.config, truth["labels"] != IGNORE_INDEX
    y = truth["labels"][known]
    if isinstance(model, SpaceExploreForRegression):
        return crps(y, outputs["quantiles"][known], np.array(config.quantile_levels))
    band = config.flat_band * truth["scale"][:, None] * np.sqrt(config.horizons)  # (N, H)
    probabilities = torch.from_numpy(outputs["logits"][known]).double().softmax(dim=-1).numpy()
    return float(log_losses(classes(y, band[known]), probabilities).mean())


def measure(model: Network, extractor: SpaceExploreFeatureExtractor, paths: list[Path]) -> dict[str, dict]:
    """By file, and "eager" for the network itself: bytes, differences from the network, and loss."""
    batches, inputs, name = sample_batches(model, extractor), INPUTS[type(model)], LOSSES[type(model)]
    truth = unpadded(lambda batch: {one: batch[one].numpy() for one in batch}, batches, ("labels", "scale"))
    expected = unpadded(run_module(Graph(model)), batches, inputs)
    figures = {"eager": {"bytes": model.get_memory_footprint(), name: loss(model, expected, truth)}}
    for path in paths:
        run = run_onnx(path) if path.suffix == ".onnx" else run_module(torch.export.load(path).module())
        found = unpadded(run, batches, inputs)
        figures[path.name] = {
            "bytes": path.stat().st_size,
            **differences(expected, found),
            name: loss(model, found, truth),
        }
    return figures


def refuse_differences(figures: dict[str, dict]) -> None:
    for name, figure in figures.items():
        difference = figure.get("largest_difference", 0.0)
        if name != INT8 and not difference <= TOLERANCE:
            raise ValueError(
                f"{name} differs from the network by {difference:.2g} of its largest output, more than {TOLERANCE:g}"
            )


def format_figures(figures: dict[str, dict], name: str) -> str:
    """A table, for a terminal; differences as shares of the largest output."""
    lines = [f"| graph | MB | largest difference | mean difference | {name} |", "|---|---:|---:|---:|---:|"]
    for graph, figure in figures.items():
        apart = [f"{figure[one]:.1e}" if one in figure else "" for one in ("largest_difference", "mean_difference")]
        lines.append(f"| {graph} | {figure['bytes'] / 1e6:.2f} | {' | '.join(apart)} | {figure[name]:.6f} |")
    return "\n".join(lines)


# --- writing ---------------------------------------------------------------------------------------------------------


def describe(model: Network, extractor: SpaceExploreFeatureExtractor, figures: dict[str, dict]) -> dict:
    """What a program without this package has to know; `train_cutoff` and later are what the training saw."""
    config = model.config
    fields = ("horizons", "target", "train_cutoff", "selection_cutoff")
    more = ("quantile_levels",) if isinstance(model, SpaceExploreForRegression) else ("id2label", "flat_band")
    packages = ("torch", "transformers", *ONNX_PACKAGES) if ONNX in figures else ("torch", "transformers")
    return {
        "head": type(model).__name__,
        "inputs": list(INPUTS[type(model)]),
        "outputs": list(OUTPUTS[type(model)]),
        "feature_names": extractor.feature_names,
        "context_length": extractor.context_length,
        "longest_context": config.max_position_embeddings,
        **{name: getattr(config, name) for name in (*fields, *more)},
        "tolerance": TOLERANCE,
        "graphs": figures,
        "versions": {name: version(name) for name in packages},
    }


def load_network(folder: str) -> tuple[Network, SpaceExploreFeatureExtractor]:
    model, extractor = load_forecaster(folder, device="cpu")
    if isinstance(model, ModelPaths):
        raise ValueError(
            f"{folder} holds a causal language model, which samples path after path with a cache; one graph does not: "
            "export a regression or a classification"
        )
    return model.float(), extractor


def export(
    model: Network, extractor: SpaceExploreFeatureExtractor, folder: Path, formats: list[str], int8: bool = False
) -> dict[str, dict]:
    """Writes the graphs and what goes with them, all of it or nothing, and returns what `measure` found."""
    check_new_folder(folder)
    with whole_folder(folder) as whole, quiet():
        if "onnx" in formats:
            write_onnx(model, whole / ONNX)
        if int8:
            write_int8(whole / ONNX, whole / INT8)
        if "torch" in formats:
            write_torch(model, whole / TORCH)
        figures = measure(model, extractor, sorted(whole.iterdir()))
        refuse_differences(figures)
        extractor.save_pretrained(whole)
        description = json.dumps(describe(model, extractor, figures), indent=2)
        (whole / "export.json").write_text(f"{description}\n", encoding="utf-8")
    return figures


def check_formats(formats: list[str], int8: bool) -> None:
    if int8 and "onnx" not in formats:
        raise ValueError(f"--int8 needs --format onnx, got {' '.join(formats)}")
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if "onnx" in formats and missing:
        raise ValueError(f"ONNX needs {missing[0]}, which is not installed: pip install 'spaceexploreai[export]'")


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub repository")
    parser.add_argument("--output-dir", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--format", nargs="+", choices=("onnx", "torch"), default=["onnx"], help="default: onnx")
    parser.add_argument("--int8", action="store_true", help="write model_int8.onnx too")
    args = parser.parse_args(argv)
    check_formats(args.format, args.int8)
    check_new_folder(args.output_dir)
    model, extractor = load_network(args.model)
    figures = export(model, extractor, args.output_dir, args.format, args.int8)
    print(f"{format_figures(figures, LOSSES[type(model)])}\n\nwrote {args.output_dir}")


if __name__ == "__main__":
    main()
