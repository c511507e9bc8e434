"""Checkpoints of the original SpaceExploreAI: converted, they compute what the original did, and all of it or nothing.

The reference is the original's forward pass written down once more, in float64, one step, head and token at a time.
"""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_hub_loading import run_elsewhere

from spaceexploreai.legacy_spaceexplore import (
    FEATURES,
    LEAKED_FEATURES,
    LegacySpaceExploreConfig,
    LegacySpaceExploreModel,
)
from spaceexploreai.scripts.convert_original import build_model, convert, infer_config, main, source_name

# Sizes that all differ, so that none can stand in for another.
SIZES = {"features": 5, "hidden": 14, "layers": 2, "outputs": 1, "limit": 20, "theta": 10000.0, "mixed": False}
SIZES |= {"heads": 3, "nope": 8, "rope": 4, "value": 6, "rank": 7, "query_rank": 0, "experts": 4, "width": 9}


# --- the original, once more ---


def random_checkpoint(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes) -> dict[str, torch.Tensor]:
    """A state dict under the original's names."""
    s = SIZES | sizes
    random = np.random.default_rng(seed)
    weights = {}

    def linear(name, rows, columns, bias=False):
        weights[f"{name}.weight"] = random.normal(0, 0.7 * columns**-0.5, (rows, columns))
        if bias:
            weights[f"{name}.bias"] = random.normal(0, 0.3, rows)

    def norm(name, size, bias=False):
        weights[f"{name}.weight"] = random.normal(1, 0.3, size)
        if bias:
            weights[f"{name}.bias"] = random.normal(0, 0.3, size)

    linear("input_projection", s["hidden"], s["features"], bias=True)
    for layer in range(s["layers"]):
        block = f"layers.{layer}"
        attention = f"{block}.attention" + (".attention" if s["mixed"] else "")
        norm(f"{block}.pre_attn_norm", s["hidden"])
        if s["query_rank"]:
            linear(f"{attention}.q_proj_a", s["query_rank"], s["hidden"])
            norm(f"{attention}.q_norm", s["query_rank"], bias=True)
        query = f"{attention}.q_proj" + ("_b" if s["query_rank"] else "")
        linear(query, s["heads"] * (s["nope"] + s["rope"]), s["query_rank"] or s["hidden"])
        linear(f"{attention}.kv_proj_a", s["rank"] + s["rope"], s["hidden"])
        norm(f"{attention}.kv_norm", s["rank"], bias=True)
        linear(f"{attention}.kv_proj_b", s["heads"] * (s["nope"] + s["value"]), s["rank"])
        linear(f"{attention}.out_proj", s["hidden"], s["heads"] * s["value"])
        norm(f"{block}.pre_moe_norm", s["hidden"])
        linear(f"{block}.moe.router.router", s["experts"], s["hidden"])
        experts = {f"experts.{expert}.mlp": s["width"] for expert in range(s["experts"])}
        for expert, width in (experts | {"shared_expert": 4 * s["width"]}).items():
            linear(f"{block}.moe.{expert}.w1", width, s["hidden"])
            linear(f"{block}.moe.{expert}.w2", s["hidden"], width)
            linear(f"{block}.moe.{expert}.w3", width, s["hidden"])
    norm("final_norm", s["hidden"])
    linear("head", s["outputs"], s["hidden"], bias=True)
    tensors = {name: torch.tensor(array).to(dtype) for name, array in weights.items()}
    rotations = np.exp(1j * np.outer(np.arange(s["limit"]), s["theta"] ** (-np.arange(0, s["rope"], 2) / s["rope"])))
    tensors["rotary_emb.freqs_buffer"] = torch.tensor(rotations).to(torch.complex64)
    if s["mixed"]:
        for layer in range(s["layers"]):
            tensors[f"layers.{layer}.attention.kv_cache"] = torch.randn(2, s["limit"], s["rank"]).half()
            tensors[f"layers.{layer}.attention.pe_cache"] = torch.randn(2, s["limit"], s["rope"]).half()
    return tensors


def softmax(scores):
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def rms_norm(x, w, name):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]


def layer_norm(x, w, name):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def feed_forward(x, w, name):
    gate = w[f"{name}.w1.weight"] @ x
    return w[f"{name}.w2.weight"] @ (gate / (1 + np.exp(-gate)) * (w[f"{name}.w3.weight"] @ x))


def rotated(x, rotations):
    """Neighbouring numbers of (T, d) are the real and the imaginary part of one that is turned by its step's angle."""
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * rotations[: len(x)]
    return np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape)


def attention_of(z, w, name, s, factor):
    steps, heads, nope, rope, value = len(z), s["heads"], s["nope"], s["rope"], s["value"]
    rotations = w["rotary_emb.freqs_buffer"]
    if s["query_rank"]:
        queries = layer_norm(z @ w[f"{name}.q_proj_a.weight"].T, w, f"{name}.q_norm") @ w[f"{name}.q_proj_b.weight"].T
    else:
        queries = z @ w[f"{name}.q_proj.weight"].T
    queries = queries.reshape(steps, heads, nope + rope)
    compressed = z @ w[f"{name}.kv_proj_a.weight"].T
    latents = layer_norm(compressed[:, : s["rank"]], w, f"{name}.kv_norm")
    shared_key = rotated(compressed[:, s["rank"] :], rotations)
    up = w[f"{name}.kv_proj_b.weight"].reshape(heads, nope + value, s["rank"])

    scores = np.zeros((steps, steps, heads))
    for head in range(heads):
        turned = rotated(queries[:, head, nope:], rotations)
        for t, u in product(range(steps), range(steps)):
            key = up[head, :nope] @ latents[u]
            scores[t, u, head] = queries[t, head, :nope] @ key + turned[t] @ shared_key[u]
    scores *= (nope + rope) ** -0.5 * factor
    weights = np.zeros_like(scores)
    for t in range(steps):
        if s["mixed"]:
            for head in range(heads):
                weights[t, :, head] = softmax(scores[t, :, head])
        else:
            for u in range(steps):
                weights[t, u] = softmax(scores[t, u])
    outputs = np.zeros((steps, heads * value))
    for t, head in product(range(steps), range(heads)):
        mixture = sum(weights[t, u, head] * latents[u] for u in range(steps))
        outputs[t, head * value : (head + 1) * value] = up[head, nope:] @ mixture
    return outputs @ w[f"{name}.out_proj.weight"].T


def experts_of(z, w, name, top_k):
    outputs = np.zeros_like(z)
    for t, token in enumerate(z):
        logits = w[f"{name}.router.router.weight"] @ token
        outputs[t] = feed_forward(token, w, f"{name}.shared_expert")
        for expert in np.argsort(-softmax(logits))[:top_k]:
            outputs[t] += logits[expert] * feed_forward(token, w, f"{name}.experts.{expert}.mlp")
    return outputs


def original_forward(tensors, past_values, top_k=2, factor=1.0, **sizes):
    """The original's prediction for (B, T, F) values: (B,) numbers or (B, 3) probabilities."""
    s = SIZES | sizes
    w = {name: tensor.numpy().astype(complex if tensor.is_complex() else float) for name, tensor in tensors.items()}
    predictions = []
    for values in past_values.double().numpy():
        hidden = values @ w["input_projection.weight"].T + w["input_projection.bias"]
        for layer in range(s["layers"]):
            block = f"layers.{layer}"
            attention = f"{block}.attention" + (".attention" if s["mixed"] else "")
            hidden = hidden + attention_of(rms_norm(hidden, w, f"{block}.pre_attn_norm"), w, attention, s, factor)
            hidden = hidden + experts_of(rms_norm(hidden, w, f"{block}.pre_moe_norm"), w, f"{block}.moe", top_k)
        logits = w["head.weight"] @ rms_norm(hidden, w, "final_norm")[-1] + w["head.bias"]
        predictions.append(logits[0] if s["outputs"] == 1 else softmax(logits))
    return torch.tensor(np.array(predictions))


def random_values(batch: int = 4, steps: int = 7, features: int = SIZES["features"], seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, steps, features, generator=torch.Generator().manual_seed(seed))


def predict(model, past_values) -> torch.Tensor:
    with torch.inference_mode():
        return model(past_values=past_values).prediction.double()


def assert_equal(predicted: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(predicted, expected, rtol=1e-6, atol=1e-6)


# --- the same numbers ---


def test_the_reference_tells_the_variants_apart():
    """Were they alike, nothing below could tell which was computed."""
    plain, mixed = random_checkpoint(), random_checkpoint(mixed=True)
    values = random_values()
    over_heads, over_keys = original_forward(plain, values), original_forward(mixed, values, mixed=True)
    assert (over_heads - over_keys).abs().min() > 1e-3
    assert over_heads.std() > 0.1
    assert (original_forward(plain, values, top_k=3) - over_heads).abs().min() > 1e-4
    assert (original_forward(plain, values, factor=1.1) - over_heads).abs().min() > 1e-4


@given(
    st.fixed_dictionaries(
        {"mixed": st.booleans(), "outputs": st.sampled_from([1, 3]), "query_rank": st.sampled_from([0, 5])}
        | {"heads": st.integers(1, 4), "nope": st.integers(1, 6), "rope": st.sampled_from([2, 4, 6])}
        | {"value": st.integers(1, 6), "rank": st.integers(2, 8), "layers": st.integers(1, 3)}
        | {"features": st.integers(1, 6), "experts": st.integers(2, 5), "width": st.integers(1, 7)}
    ),
    st.integers(1, 2),
    st.integers(1, 9),
    st.sampled_from([0.01, 1.0]),  # of small inputs, what keeps a norm from dividing by zero is a part
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_the_converted_network_computes_what_the_original_did(sizes, top_k, steps, scale, seed):
    """In float64, as norms of two numbers make much of a rounding; the angles alone are of float32."""
    tensors = random_checkpoint(seed, torch.float64, **sizes)
    tensors["input_projection.bias"] *= scale
    values = scale * random_values(2, steps, sizes["features"], seed).double()
    config = infer_config(tensors, top_k, 10000.0, 1.0)
    expected = original_forward(tensors, values, top_k, **sizes)
    assert_equal(predict(build_model(tensors, config), values), expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [{}, {"mixed": True}, {"query_rank": 5, "outputs": 3}])
def test_float32_is_as_exact(sizes, seed):
    tensors, values = random_checkpoint(seed, **sizes), random_values(seed=seed)
    assert_equal(predict(converted(tensors), values), original_forward(tensors, values, **sizes))


def test_arguments_that_leave_no_trace_in_the_weights_are_taken():
    tensors, values = random_checkpoint(theta=500.0), random_values()
    model = build_model(tensors, infer_config(tensors, 3, 500.0, 1.3))
    assert_equal(predict(model, values), original_forward(tensors, values, 3, 1.3))


def write_pt(tensors, path: Path):
    """As the original's training wrote it."""
    state = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 8e-5, "params": [0]}]}
    beside = {"optimizer_state_dict": state, "train_losses": [0.5], "vocab_size": 5, "prediction_type": "regression"}
    torch.save({"model_state_dict": tensors, **beside}, path)


def write_bare(tensors, path: Path):
    torch.save(tensors, path)


def write_safetensors(tensors, path: Path):
    """As the original's own script did, which keeps the real part of complex numbers alone."""
    real = {name: tensor.real.contiguous() if tensor.is_complex() else tensor for name, tensor in tensors.items()}
    save_file(real, path, metadata={"vocab_size": "5", "prediction_type": "regression"})


WRITERS = {"model.pt": write_pt, "pytorch_model.bin": write_bare, "model.safetensors": write_safetensors}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", list(WRITERS))
def test_every_kind_of_file_becomes_a_folder_that_loads(tmp_path, name, mixed):
    tensors, values = random_checkpoint(mixed=mixed), random_values()
    WRITERS[name](tensors, tmp_path / name)
    main(["--checkpoint", str(tmp_path / name), "--output-dir", str(tmp_path / "folder")])
    model = LegacySpaceExploreModel.from_pretrained(tmp_path / "folder")
    assert_equal(predict(model, values), original_forward(tensors, values, mixed=mixed))
    files = {path.name for path in (tmp_path / "folder").iterdir()}
    assert files == {"config.json", "model.safetensors", "legacy_spaceexplore.py", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == {name, "folder"}
    stored = load_file(tmp_path / "folder" / "model.safetensors")
    for ours, weight in stored.items():  # to the last bit
        assert torch.equal(weight, tensors[source_name(ours, "keys" if mixed else "heads")])


STRANGER = """
import sys
sys.modules["spaceexploreai"] = None  # any import of it raises ImportError
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

folder, values, output = sys.argv[1:]
model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "spaceexplore_legacy"
with torch.inference_mode():
    prediction = model(load_file(values)["values"]).prediction
save_file({"prediction": prediction}, output + ".safetensors")
model.save_pretrained(output)
"""


def test_a_stranger_gets_the_same_numbers_also_after_saving_them_again(tmp_path):
    tensors, values = random_checkpoint(mixed=True, query_rank=5), random_values()
    write_bare(tensors, tmp_path / "model.pt")
    save_file({"values": values}, tmp_path / "values.safetensors")
    convert(tmp_path / "model.pt", tmp_path / "folder")
    expected = original_forward(tensors, values, mixed=True, query_rank=5)
    for before, after in (("folder", "again"), ("again", "last")):
        run_elsewhere(tmp_path, STRANGER, tmp_path / before, tmp_path / "values.safetensors", tmp_path / after)
        assert_equal(load_file(tmp_path / f"{after}.safetensors")["prediction"].double(), expected)


@pytest.mark.parametrize(
    ("published", "parameters"),
    [
        ({}, 38_415_361),  # called 27M
        ({"num_features": 8, "hidden_size": 64, "moe_intermediate_size": 512}, 4_918_721),
        (
            {"num_features": 128, "hidden_size": 512, "kv_lora_rank": 64}
            | dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 64),
            77_551_617,
        ),
    ],
)
def test_published_configurations_have_the_parameters_of_the_original(published, parameters):
    with torch.device("meta"):
        model = LegacySpaceExploreModel(LegacySpaceExploreConfig(**published))
    assert model.num_parameters() == parameters
    assert len(model.state_dict()) == 149  # and the rotations


# --- all of a checkpoint or nothing ---


def converted(tensors: dict[str, torch.Tensor]) -> LegacySpaceExploreModel:
    return build_model(tensors, infer_config(tensors, 2, 10000.0, 1.0))


CHECKPOINTS = {
    "heads": random_checkpoint(),
    "keys": random_checkpoint(mixed=True, query_rank=5),
}
WEIGHTS = [(kind, name) for kind, tensors in CHECKPOINTS.items() for name in tensors if "_cache" not in name]


@pytest.mark.parametrize("kind", list(CHECKPOINTS))
def test_a_checkpoint_without_one_of_its_weights_is_refused_by_its_name(kind):
    for name in [name for which, name in WEIGHTS if which == kind]:
        # Without its first half a compressed query looks like one that is not.
        told = name.replace("layers.0.attention.attention.q_proj_a", "layers.0.attention.attention.q_proj")
        with pytest.raises(ValueError, match=rf"has no {re.escape(told)}$"):
            converted({other: tensor for other, tensor in CHECKPOINTS[kind].items() if other != name})


@pytest.mark.parametrize("kind", list(CHECKPOINTS))
def test_a_weight_of_another_shape_is_refused(kind):
    told = r"must have|fit no number of heads|has no|is no tensor of|is not that of"
    for name in [name for which, name in WEIGHTS if which == kind]:
        tensor = CHECKPOINTS[kind][name]
        changes = [torch.cat((tensor, tensor)), tensor[None], tensor.sum()]
        # Fewer rotations are those of a network for shorter windows.
        changes += [tensor[:-1]] if name != "rotary_emb.freqs_buffer" else [tensor[:, :-1]]
        for changed in changes:
            with pytest.raises(ValueError, match=told):
                converted(CHECKPOINTS[kind] | {name: changed})


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.pre_attn_norm.alpha",
        "layers.0.pre_attn_norm.running_mean",
        "layers.0.attention.q_proj.bias",
        "layers.0.moe.experts.4.mlp.w1.weight",
        "layers.0.attention.kv_cache",  # only of the mixed attention
        "layers.0.attention.k_cache",
        "mscnn.conv.weight",
        "layers.x",
    ],
)
def test_a_tensor_that_the_network_has_no_place_for_is_refused_by_its_name(name):
    with pytest.raises(ValueError, match=re.escape(f"{name} is no tensor of the original")):
        converted(CHECKPOINTS["heads"] | {name: torch.ones(3)})


def test_a_checkpoint_with_both_kinds_of_attention_is_refused():
    plain = {name: CHECKPOINTS["heads"][name] for name in CHECKPOINTS["heads"] if ".0.attention." in name}
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.\w+\.weight is no tensor"):
        converted(random_checkpoint(mixed=True) | plain)


def test_weights_that_are_not_of_one_floating_type_are_refused():
    name = "layers.1.moe.shared_expert.w2.weight"
    with pytest.raises(ValueError, match=rf"{re.escape(name)} must be floating-point .* torch.float16"):
        converted(CHECKPOINTS["heads"] | {name: CHECKPOINTS["heads"][name].half()})


@pytest.mark.parametrize("write", [write_pt, write_safetensors])
@pytest.mark.parametrize("theta", [9000.0, 10100.0])
def test_rotations_that_would_not_be_those_of_the_checkpoint_are_refused(tmp_path, write, theta):
    path = tmp_path / ("model.pt" if write is write_pt else "model.safetensors")
    write(random_checkpoint(theta=theta, limit=128), path)
    with pytest.raises(ValueError, match=r"freqs_buffer is not that of --rope-theta 10000"):
        convert(path, tmp_path / "folder")
    convert(path, tmp_path / "folder", rope_theta=theta)


def test_rotations_the_other_way_round_are_refused():
    turned = {"rotary_emb.freqs_buffer": CHECKPOINTS["heads"]["rotary_emb.freqs_buffer"].conj()}
    with pytest.raises(ValueError, match="freqs_buffer is not that of"):
        converted(CHECKPOINTS["heads"] | turned)


# --- what the user is told ---


def test_the_folder_says_that_its_weights_saw_the_future(tmp_path, capsys):
    write_pt(random_checkpoint(features=64), tmp_path / "model.pt")
    main(["--checkpoint", str(tmp_path / "model.pt"), "--output-dir", str(tmp_path / "folder")])
    card = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    for text in (capsys.readouterr().out, card):
        assert "trained on leaked inputs" in text
        assert "published figures are no evidence" in text
    assert re.findall(r"\*\*(\w+)\*\*", card) == list(LEAKED_FEATURES)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["feature_names"] == list(FEATURES)


def test_features_are_the_64_of_the_published_recipe():
    assert len(set(FEATURES)) == len(FEATURES) == 64
    assert FEATURES[:5] == ("close", "high", "low", "open", "volume")
    assert FEATURES[35:42] == (*LEAKED_FEATURES, *(f"past_return_{days}d" for days in (1, 2, 5, 10)))
    assert FEATURES[-1] == "volume_change_rate"


def test_names_of_other_features_are_not_made_up(tmp_path):
    write_bare(random_checkpoint(), tmp_path / "model.pt")
    assert convert(tmp_path / "model.pt", tmp_path / "folder").config.feature_names is None
    assert "not known" in (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")


class Malice:
    """A pickle of it creates a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def damaged(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / f"model.{'safetensors' if 'safetensors' in kind else 'pt'}"
    if kind.startswith("damaged"):
        (write_safetensors if path.suffix == ".safetensors" else write_pt)(random_checkpoint(), path)
        return damaged(path)
    contents = {
        "text": lambda: path.write_text("hello\n"),
        "empty": lambda: path.write_bytes(b""),
        "text safetensors": lambda: path.write_text("hello\n"),
        "code": lambda: torch.save({"model_state_dict": Malice(folder / "touched")}, path),
        "a list": lambda: torch.save([torch.ones(3)], path),
        "numbers": lambda: torch.save({"model_state_dict": {"head.weight": 3.0}}, path),
        "others": lambda: torch.save({"head.weight": torch.ones(1, 3)}, path),
        "none": lambda: None,
        "folder": path.mkdir,
    }
    contents[kind]()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "damaged or no file of torch.save"),
        ("empty", "damaged or no file of torch.save"),
        ("damaged", "damaged or no file of torch.save"),
        ("text safetensors", "damaged or no safetensors file"),
        ("damaged safetensors", "damaged or no safetensors file"),
        ("code", "holds .*, which is not weights and may execute anything"),
        ("a list", "no weights by their names"),
        ("numbers", "no weights by their names"),
        ("others", r"no checkpoint of the original SpaceExploreAI: it has no input_projection\.weight"),
        ("none", "no such file"),
        ("folder", "no such file"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_one_line_and_nothing_is_written(tmp_path, capsys, kind, message):
    path = bad_file(kind, tmp_path)
    refused(capsys, message, "--checkpoint", path, "--output-dir", tmp_path / "folder")
    assert {entry.name for entry in tmp_path.iterdir()} <= {path.name}


def refused(capsys, message: str, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)


def test_a_file_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "model.onnx").touch()
    arguments = ("--checkpoint", tmp_path / "model.onnx", "--output-dir", tmp_path / "folder")
    refused(capsys, r"neither a \.pt, .*safetensors", *arguments)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    write_bare(random_checkpoint(), tmp_path / "model.pt")
    refused(capsys, "is not an empty folder", "--checkpoint", tmp_path / "model.pt", "--output-dir", tmp_path)
    refused(
        capsys, "is not an empty folder", "--checkpoint", tmp_path / "model.pt", "--output-dir", tmp_path / "model.pt"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "model.pt", tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    write_bare(random_checkpoint(), tmp_path / "model.pt")
    arguments = ("--checkpoint", tmp_path / "model.pt", "--output-dir", tmp_path / "model.pt" / "folder")
    refused(capsys, r"model\.pt", *arguments)


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, capsys):
    def fail(self, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(LegacySpaceExploreModel, "save_pretrained", fail)
    write_bare(random_checkpoint(), tmp_path / "model.pt")
    refused(capsys, "No space left", "--checkpoint", tmp_path / "model.pt", "--output-dir", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


# --- the network by itself ---


@pytest.mark.parametrize("shape", [(2, 7, 4), (2, 21, 5), (2, 0, 5), (7, 5)])
def test_values_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"1 to 20 steps, 5 features), got {shape}")):
        converted(CHECKPOINTS["heads"])(torch.zeros(shape))


def test_a_mask_is_not_silently_left_out():
    with pytest.raises(TypeError, match="attention_mask"):
        converted(CHECKPOINTS["heads"])(random_values(), attention_mask=torch.ones(4, 7))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"softmax_over": "queries"}, "softmax_over must be one of heads, keys, got 'queries'"),
        ({"prediction_type": "ranking"}, "prediction_type must be one of regression, classification, got 'ranking'"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok must be within 1 and n_routed_experts=8, got 9"),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim must be even, got 5"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0, got 0"),
        ({"feature_names": ["close"]}, "feature_names must be 64 names, got 1"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match="validate_architecture") as error:
        LegacySpaceExploreConfig(**fields)
    assert message in str(error.value.__cause__)
