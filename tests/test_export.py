"""Exported graphs: equal to the network at every step and size, causal, and without torch or pickles."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import log_loss, mean_pinball_loss

from spaceexploreai.benchmarks import export as benchmark
from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.prices import read_sample
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForClassification, SpaceExploreForRegression
from spaceexploreai.scripts import export

FEATURES = ["gap", "scaled_return_5", "scaled_return_60", "rsi_14", "relative_volume_20"]
LIMIT, HORIZONS, LEVELS = 40, [1, 3], [0.1, 0.3, 0.5, 0.9]
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_attention_heads": 3,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 3,
    "moe_intermediate_size": 64,
    "mscnn_num_blocks": 1,
    "mscnn_num_branches": 2,
    "wavelet_levels": 2,
    "t2t_num_hidden_layers": 0,
    "max_position_embeddings": LIMIT,
    "initializer_range": 0.3,
    "horizons": HORIZONS,
    "quantile_levels": LEVELS,
}
# Another attention, no experts.
GROUPED = {"attention_type": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2, "first_k_dense_replace": 1}
ALL = ("model.onnx", "model_int8.onnx", "model.pt2")


def make_checkpoint(folder: Path, head: type, **overrides) -> Path:
    torch.manual_seed(1)
    model = head(SpaceExploreConfig(num_features=len(FEATURES), **{**SIZES, **overrides}))
    extractor = SpaceExploreFeatureExtractor(feature_names=FEATURES, context_length=16)
    extractor.fit(extractor.compute_features(read_sample())).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "regression": make_checkpoint(folder / "regression", SpaceExploreForRegression),
        "classification": make_checkpoint(folder / "classification", SpaceExploreForClassification, **GROUPED),
    }


@pytest.fixture(scope="module")
def exports(checkpoints, tmp_path_factory) -> dict[str, Path]:
    """Written by the command, into a folder that is there already and into one that is not."""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "regression").mkdir()
    options = ["--format", "onnx", "torch", "--int8"]
    for head, more in {"regression": options, "classification": []}.items():
        export.main(["--model", str(checkpoints[head]), "--output-dir", str(folder / head), *more])
    return {head: folder / head for head in checkpoints}


@pytest.fixture(scope="module")
def networks(checkpoints) -> dict[str, torch.nn.Module]:
    """As they are loaded by anyone, with the library's own experts."""
    return {
        "regression": SpaceExploreForRegression.from_pretrained(checkpoints["regression"]).eval(),
        "classification": SpaceExploreForClassification.from_pretrained(checkpoints["classification"]).eval(),
    }


@pytest.fixture(scope="module")
def runs(exports) -> dict[str, dict[str, export.Run]]:
    found = {}
    for head, folder in exports.items():
        found[head] = {path.name: export.run_onnx(path, threads=1) for path in folder.glob("*.onnx")}
        if (archive := folder / ALL[2]).exists():
            found[head][archive.name] = export.run_module(torch.export.load(archive).module())
    return found


def make_batch(head: str, rows: int, steps: int, padding: list[int], missing: float, seed: int) -> dict:
    """Rows padded on the left, of values of which a share is missing, and with halts, but for the newest step."""
    generator = torch.Generator().manual_seed(seed)
    values = 2 * torch.randn(rows, steps, len(FEATURES), generator=generator)
    values[torch.rand(values.shape, generator=generator) < missing] = torch.nan
    mask = torch.arange(steps) >= torch.tensor(padding)[:, None]
    mask[:, :-1] &= torch.rand(rows, steps - 1, generator=generator) < 0.9
    batch = {"past_values": values, "attention_mask": mask.long()}
    if head == "regression":
        batch["scale"] = 0.01 + 0.02 * torch.rand(rows, steps, generator=generator)
    return batch


@st.composite
def batches(draw, head: str, steps: int | None = None) -> dict:
    rows = draw(st.integers(1, 5))
    steps = draw(st.integers(1, LIMIT)) if steps is None else steps
    padding = draw(st.lists(st.integers(0, steps - 1), min_size=rows, max_size=rows))
    return make_batch(head, rows, steps, padding, draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.integers(0, 99)))


def eager(network, batch: dict) -> dict[str, np.ndarray]:
    with torch.no_grad():
        outputs = network(**batch)
    names = ("mean", "quantiles") if "scale" in batch else ("logits",)
    return {name: outputs[name].numpy() for name in names}


def assert_same(found: dict, expected: dict, batch: dict):
    real = batch["attention_mask"].bool().numpy()
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].shape == values.shape
        largest = np.abs(values[real]).max()
        np.testing.assert_allclose(found[name][real], values[real], rtol=0, atol=1e-4 * largest)


# --- parity ---


@settings(max_examples=25, deadline=None)
@given(data=st.data(), head=st.sampled_from(["regression", "classification"]))
def test_graphs_say_what_the_network_says(networks, runs, data, head):
    """Whatever the batch, the length, the padding and what is missing."""
    batch = data.draw(batches(head))
    expected = eager(networks[head], batch)
    for name, run in runs[head].items():
        if name != "model_int8.onnx":
            assert_same(run(batch), expected, batch)


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "pandas", "spaceexploreai"):
    sys.modules[name] = None
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
names = [output.name for output in session.get_outputs()]
outputs = session.run(names, dict(np.load(sys.argv[2])))
np.savez(sys.argv[3], **dict(zip(names, outputs)))
"""


@pytest.mark.parametrize(
    ("head", "file"), [("regression", ALL[0]), ("regression", ALL[1]), ("classification", ALL[0])]
)
def test_onnxruntime_needs_no_torch(networks, runs, exports, tmp_path, head, file):
    batch = make_batch(head, rows=3, steps=29, padding=[0, 5, 28], missing=0.2, seed=3)
    given_, found = tmp_path / "inputs.npz", tmp_path / "outputs.npz"
    np.savez(given_, **{name: values.numpy() for name, values in batch.items()})
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, exports[head] / file, given_, found], check=True, cwd=tmp_path
    )
    with np.load(found) as outputs:  # how near int8 is to the network is below
        expected = eager(networks[head], batch) if file == ALL[0] else runs[head][file](batch)
        assert_same(dict(outputs), expected, batch)


WITHOUT_TRANSFORMERS = """
import sys
for name in ("transformers", "spaceexploreai"):
    sys.modules[name] = None
import torch

run = torch.export.load(sys.argv[1]).module()
for steps, real in ((40, 1), (41, 1), (3, 0)):
    mask = torch.full((2, steps), real)
    try:
        outputs = run(past_values=torch.zeros(2, steps, 5), attention_mask=mask, scale=torch.ones(2, steps))
        print(*outputs["mean"].shape)
    except RuntimeError as error:
        print(error)
"""


def test_torch_needs_no_transformers_and_refuses_what_the_network_does(exports, tmp_path):
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS, exports["regression"] / ALL[2]]
    longest, longer, padded = subprocess.check_output(command, cwd=tmp_path, text=True).splitlines()
    assert longest == "2 40 2"
    assert "to be <= 40, but got 41" in longer
    assert "assertion failed" in padded  # no row has a step to read


# --- nothing knows the future ---


@settings(max_examples=15, deadline=None)
@given(data=st.data(), file=st.sampled_from(ALL), steps=st.integers(2, LIMIT))
def test_later_steps_and_other_rows_change_nothing(runs, data, file, steps):
    """Of int8 too, whose rounding may not depend on what else is there."""
    run, batch = runs["regression"][file], data.draw(batches("regression", steps))
    step = data.draw(st.integers(1, steps - 1))
    before = run(batch)
    changed = {name: values.clone() for name, values in batch.items()}
    changed["past_values"][:, step:] = 5.0
    changed["past_values"][1:] = -5.0
    after = run(changed)
    real = batch["attention_mask"][0, :step].bool().numpy()
    for name, values in before.items():
        tolerance = 1e-5 * np.abs(values).max()
        np.testing.assert_allclose(after[name][0, :step][real], values[0, :step][real], rtol=0, atol=tolerance)


def test_int8_reaches_every_matrix(networks, exports):
    """Two for each expert and one for the router, which are no linear layers, and not one float32 left beside them."""
    linear = sum(isinstance(module, torch.nn.Linear) for module in networks["regression"].modules())
    graph = onnx.load(exports["regression"] / ALL[1]).graph
    constants = {tensor.name for tensor in graph.initializer}
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == linear + 2 * SIZES["n_routed_experts"] + 1
    assert not [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and constants & set(node.input)]


def test_int8_is_near(networks, runs):
    batch = make_batch("regression", rows=8, steps=LIMIT, padding=[0] * 8, missing=0.1, seed=5)
    expected, found = eager(networks["regression"], batch), runs["regression"][ALL[1]](batch)
    for name, values in expected.items():
        difference = np.abs(found[name] - values) / np.abs(values).max()
        assert 0 < difference.mean() < 0.005  # a step of int8 is 1/127 of a block's largest number
    assert (np.diff(found["quantiles"], axis=-1) >= 0).all()


# --- what is written ---


def test_a_folder_has_all_that_is_needed_and_no_path_of_this_machine(exports, checkpoints):
    assert set(ALL) | {"export.json", "preprocessor_config.json"} <= {
        one.name for one in exports["regression"].iterdir()
    }
    assert not (exports["classification"] / ALL[1]).exists()
    for head, folder in exports.items():
        again = SpaceExploreFeatureExtractor.from_pretrained(folder)
        assert again.to_dict() == SpaceExploreFeatureExtractor.from_pretrained(checkpoints[head]).to_dict()
        for path in folder.iterdir():
            assert str(Path(export.__file__).parents[1]).encode() not in path.read_bytes()


def test_the_torch_archive_holds_no_pickle(exports):
    """Tensors are raw bytes and the rest is text; of pickled tensors the archive would say so."""
    with zipfile.ZipFile(exports["regression"] / ALL[2]) as archive:
        entries = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    indices = [json.loads(entries[f"data/{kind}/model_{kind}_config.json"]) for kind in ("weights", "constants")]
    tensors = [
        (kind, one)
        for kind, index in zip(("weights", "constants"), indices, strict=True)
        for one in index["config"].values()
    ]
    assert not any(one["use_pickle"] for _, one in tensors)
    raw = {f"data/{kind}/{one['path_name']}" for kind, one in tensors}
    for name in set(entries) - raw:
        entries[name].decode("ascii")  # a pickle begins with \x80
    assert entries["data/sample_inputs/model.pt"] == b""


def test_export_json_says_what_goes_in_and_comes_out(exports):
    regression, classification = (json.loads((folder / "export.json").read_text()) for folder in exports.values())
    assert regression["inputs"] == ["past_values", "attention_mask", "scale"]
    assert regression["outputs"] == ["mean", "quantiles"]
    assert (regression["horizons"], regression["quantile_levels"]) == (HORIZONS, LEVELS)
    assert (regression["longest_context"], regression["context_length"]) == (LIMIT, 16)
    assert regression["feature_names"] == FEATURES
    assert list(regression["graphs"]) == ["eager", "model.onnx", "model.pt2", "model_int8.onnx"]
    assert classification["inputs"] == ["past_values", "attention_mask"]
    assert classification["id2label"] == {"0": "down", "1": "flat", "2": "up"}
    for graphs in (regression["graphs"], classification["graphs"]):
        assert graphs["model.onnx"]["largest_difference"] < 1e-5
    int8 = regression["graphs"]["model_int8.onnx"]
    assert 1e-5 < int8["mean_difference"] < 0.005 < int8["largest_difference"]  # where the router chose another expert


@pytest.mark.parametrize("head", ["regression", "classification"])
def test_losses_are_those_of_scikit_learn(networks, exports, head):
    """Over every step and horizon of the sample's windows whose outcome is known."""
    network, extractor = networks[head], SpaceExploreFeatureExtractor.from_pretrained(exports[head])
    y, outputs, bands = [], [], []
    for batch in export.sample_batches(network, extractor):
        labels = batch.pop("labels")
        known = (labels != -100).numpy()
        with torch.no_grad():
            said = network(**batch)
        outputs.append(said["quantiles" if head == "regression" else "logits"].numpy()[known])
        y.append(labels.numpy()[known])
        bands.append((0.25 * batch["scale"][..., None] * torch.tensor(HORIZONS).sqrt()).numpy()[known])
    y, outputs, bands = map(np.concatenate, (y, outputs, bands))
    if head == "regression":
        name = "crps"
        expected = 2 * np.mean(
            [mean_pinball_loss(y, outputs[:, place], alpha=level) for place, level in enumerate(LEVELS)]
        )
    else:
        name = "log_loss"
        expected = log_loss(np.select([y < -bands, y > bands], [0, 2], 1), softmax(outputs.astype(float), axis=-1))
    graphs = json.loads((exports[head] / "export.json").read_text())["graphs"]
    assert len(y) > 10_000
    for graph in ("eager", "model.onnx"):
        assert graphs[graph][name] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("head", ["regression", "classification"])
def test_a_step_without_an_outcome_costs_nothing(networks, head):
    generator = np.random.default_rng(0)
    outputs = {"quantiles": generator.normal(size=(20, 2, 4)), "logits": generator.normal(size=(20, 2, 3))}
    truth = {"labels": generator.normal(size=(20, 2)), "scale": np.ones(20)}
    whole = export.loss(networks[head], outputs, truth)
    more = {name: np.concatenate([values, values[:5]]) for name, values in (outputs | truth).items()}
    more["labels"][20:] = -100.0
    assert export.loss(networks[head], more, more) == pytest.approx(whole)


# --- refused ---


def test_a_graph_that_differs_is_not_written(refused, exports, monkeypatch, tmp_path):
    """Planted: the graph of another checkpoint."""
    other = make_checkpoint(tmp_path.with_name("other"), SpaceExploreForRegression, initializer_range=0.31)
    monkeypatch.setattr(export, "write_onnx", lambda model, path: shutil.copy(exports["regression"] / ALL[0], path))
    complaint = refused(export.main, ["--model", str(other), "--output-dir", str(tmp_path / "new")])
    assert "model.onnx differs from the network by 0.0" in complaint
    assert complaint.endswith("of its largest output, more than 0.0001")


def test_a_graph_without_numbers_is_refused():
    with pytest.raises(ValueError, match="differs from the network by nan"):
        export.refuse_differences({"model.onnx": {"largest_difference": float("nan")}})


def test_what_cannot_be_is_refused(refused, checkpoints, language_model, monkeypatch, tmp_path):
    model, output = ["--model", str(checkpoints["regression"])], ["--output-dir", str(tmp_path / "new")]
    assert "causal language model" in refused(export.main, ["--model", str(language_model), *output])
    assert "--int8 needs --format onnx, got torch" in refused(
        export.main, [*model, *output, "--format", "torch", "--int8"]
    )
    assert "'coreml'" in refused(export.main, [*model, *output, "--format", "coreml"])
    assert "not an empty folder" in refused(export.main, [*model, "--output-dir", str(checkpoints["regression"])])
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert "onnxscript, which is not installed: pip install" in refused(export.main, [*model, *output])


# --- benchmark ---


def test_benchmark_runs_all_in_turns(exports, monkeypatch, tmp_path, capsys):
    for file in ALL:  # a network of these sizes is exported already
        writer = {"model.onnx": "write_onnx", "model_int8.onnx": "write_int8", "model.pt2": "write_torch"}[file]
        monkeypatch.setattr(
            benchmark, writer, lambda _, path, file=file: shutil.copy(exports["regression"] / file, path)
        )
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"num_features": 5, **SIZES}))
    benchmark.main(["--model-config", str(path), "--context", "7", "--batches", "1", "3", "--rounds", "2"])
    sizes, _, *table = capsys.readouterr().out.splitlines()
    assert f"model_int8.onnx {(exports['regression'] / ALL[1]).stat().st_size / 1e6:.1f} MB" in sizes
    runtimes = ["PyTorch", "torch.export", "onnxruntime", "onnxruntime int8"]
    assert [line.split(" | ")[:2] for line in table[2:]] == [
        [f"| {rows}", name] for rows in (1, 3) for name in runtimes
    ]
    assert table[2].endswith(" | 1.00 |")


def test_benchmark_refuses_no_rounds(refused):
    assert "--rounds must be at least 1, got 0" in refused(benchmark.main, ["--rounds", "0"])


def test_benchmark_compares_within_a_round():
    rounds = [
        {"PyTorch": 1.0, "onnxruntime": 0.5},
        {"PyTorch": 4.0, "onnxruntime": 1.0},
        {"PyTorch": 2.0, "onnxruntime": 2.0},
    ]
    assert benchmark.format_rounds(8, rounds).splitlines() == [
        "| 8 | PyTorch | 2000.0 | 1.00 |",
        "| 8 | onnxruntime | 1000.0 | 0.50 |",
    ]
