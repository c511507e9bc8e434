"""The configuration: what it refuses and in which words, and that it survives its JSON."""

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

import spaceexploreai
from spaceexploreai.configuration_spaceexplore import AUTO_MAP, SpaceExploreConfig
from spaceexploreai.modeling_spaceexplore import SpaceExploreModel

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "num_features": 5,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 16,
    "moe_intermediate_size": 40,
}


def refusal(**kwargs) -> str:
    """The sentence with which the configuration refuses these values, without the strict dataclass around it."""
    with pytest.raises(StrictDataclassError) as refused:
        SpaceExploreConfig(**kwargs)
    return str(refused.value.__cause__)


# --- construction ---


def test_needs_no_argument():
    config = SpaceExploreConfig()
    assert list(config.horizons) == [1, 2, 5, 10]
    assert list(config.quantile_levels) == pytest.approx([i / 20 for i in range(1, 20)])
    assert config.head_dim == config.qk_rope_head_dim


def test_knows_the_name_that_the_library_has_for_the_experts():
    config = SpaceExploreConfig(num_local_experts=4)
    assert config.n_routed_experts == config.num_local_experts == 4
    config.num_local_experts = 6
    assert config.n_routed_experts == 6
    assert "num_local_experts" not in config.to_dict()


def test_what_the_trainer_must_not_gather():
    assert {"cache", "aux_loss", "router_logits"} <= set(SpaceExploreConfig.keys_to_ignore_at_inference)


# --- refusals ---


@pytest.mark.parametrize("horizons", [[], [0, 1], [-5, 1], [5, 1], [1, 1]], ids=str)
def test_refuses_horizons(horizons):
    assert refusal(horizons=horizons) == f"horizons must be increasing trading days from 1, got {horizons}"


@pytest.mark.parametrize("levels", [[], [0.0, 0.5], [0.5, 1.0], [0.9, 0.1], [0.5, 0.5], [float("nan")]], ids=str)
def test_refuses_quantile_levels(levels):
    assert refusal(quantile_levels=levels) == f"quantile_levels must be increasing within (0, 1), got {levels}"


@pytest.mark.parametrize(("chosen", "experts"), [(9, 8), (0, 8), (-1, 8), (2, 1)])
def test_refuses_experts_per_token(chosen, experts):
    message = refusal(num_experts_per_tok=chosen, n_routed_experts=experts)
    assert message.startswith("num_experts_per_tok ")
    assert f"n_routed_experts={experts}" in message
    assert message.endswith(f"got {chosen}")


@pytest.mark.parametrize("name", ["hidden_size", "moe_intermediate_size"])
@pytest.mark.parametrize("value", [4, 36, 100])
def test_refuses_sizes_that_the_grouped_product_cannot_take(name, value):
    assert refusal(**{name: value}) == f"{name} must be a multiple of 8, got {value}"


@pytest.mark.parametrize("value", [1, 3, 33])
def test_refuses_an_odd_number_of_rotary_dimensions(value):
    assert refusal(qk_rope_head_dim=value) == f"qk_rope_head_dim must be even, got {value}"
    assert refusal(attention_type="mha", head_dim=value) == f"head_dim must be even, got {value}"


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("attention_type", "mlha", "mla, gqa, mha"),
        ("input_norm", "layer", "dyt, batch, rms"),
        ("quantile_form", "loose", "scale, free"),
        ("wavelet", "db97", "haar, db2, db4, sym4"),
    ],
)
def test_refuses_an_unknown_kind(name, value, known):
    assert refusal(**{name: value}) == f"{name} must be one of {known}, got {value!r}"


def test_quantiles_of_log_returns_alone_keep_their_shape():
    assert SpaceExploreConfig().quantile_form == "scale"
    assert SpaceExploreConfig(target="volatility").quantile_form == "free"
    assert SpaceExploreConfig(quantile_levels=[0.5]).quantile_form == "free"
    assert SpaceExploreConfig(quantile_levels=[0.05]).quantile_form == "scale"
    assert SpaceExploreConfig(quantile_form="free").quantile_form == "free"
    assert refusal(quantile_form="scale", quantile_levels=[0.5]) == (
        "quantile_form 'scale' leaves nothing to forecast of quantile_levels [0.5]"
    )


def test_heads_of_each_attention_type():
    latent, grouped, each = (SpaceExploreConfig(attention_type=kind) for kind in ("mla", "gqa", "mha"))
    assert (latent.kv_lora_rank, latent.head_dim, latent.num_key_value_heads) == (64, 16, 4)
    assert (grouped.kv_lora_rank, grouped.head_dim, grouped.num_key_value_heads) == (None, 64, 2)
    assert (each.kv_lora_rank, each.head_dim, each.num_key_value_heads) == (None, 64, 4)
    assert SpaceExploreConfig(attention_type="gqa", num_attention_heads=1).num_key_value_heads == 1


def test_refuses_heads_that_do_not_fit():
    assert refusal(attention_type="gqa", num_key_value_heads=3) == (
        "num_attention_heads=4 must be a multiple of num_key_value_heads, got 3"
    )
    assert refusal(attention_type="mha", num_key_value_heads=2) == (
        "attention_type 'mha' has num_key_value_heads = num_attention_heads = 4, got 2"
    )
    assert refusal(kv_lora_rank=None) == "attention_type 'mla' needs a kv_lora_rank, got None"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mscnn_num_branches": 3}, "mscnn_num_branches=3 must divide the channels of the CNN, got 256"),
        ({"mscnn_hidden_size": 10}, "mscnn_num_branches=4 must divide the channels of the CNN, got 10"),
        ({"t2t_patch_overlap": 24}, "t2t_patch_overlap must be within 0 and t2t_patch_length=24, got 24"),
        ({"t2t_mask_ratio": 1.0}, "t2t_mask_ratio must be within (0, 1), got 1.0"),
        ({"t2t_hidden_size": 100}, "t2t_hidden_size must be a multiple of twice t2t_num_attention_heads=4, got 100"),
        (
            {"t2t_loss_weight": 0.01, "t2t_num_hidden_layers": 0},
            "t2t_loss_weight=0.01 compares the features of the extractor and of the CNN; "
            "got t2t_num_hidden_layers=0, mscnn_num_blocks=2",
        ),
        ({"vocab_size": 4}, "vocab_size must be larger than ts_token_id=4, got 4"),
        ({"num_labels": 2}, "a direction is one of ['down', 'flat', 'up'], got id2label"),
        ({"hidden_dropout": 1.5}, "hidden_dropout must be within [0, 1], got 1.5"),
        ({"flat_band": -0.1}, "flat_band must be at least 0, got -0.1"),
        ({"wavelet_levels": -1}, "wavelet_levels must be at least 0, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_what_does_not_fit(values, message):
    assert refusal(**values).startswith(message)


@pytest.mark.parametrize("value", [0, -8])
@pytest.mark.parametrize(
    "name",
    [
        "num_features",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "v_head_dim",
        "moe_intermediate_size",
        "max_position_embeddings",
    ],
)
def test_refuses_a_size_below_one(name, value):
    message = refusal(**{name: value})
    assert message.startswith(f"{name} ")
    assert message.endswith(f"got {value}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_features", "64"),
        ("hidden_size", 256.0),
        ("num_hidden_layers", None),
        ("num_features", True),
        ("horizons", 5),
        ("horizons", [1.5]),
        ("quantile_levels", "median"),
        ("router_aux_loss_coef", "small"),
        ("norm_topk_prob", 1),
        ("train_cutoff", 20200101),
    ],
)
def test_refuses_a_wrong_type(name, value):
    message = refusal(**{name: value})
    assert f"'{name}'" in message
    assert repr(value) in message


def test_refuses_an_unknown_rotary_type():
    """Where it is noticed at the latest: a network cannot be built from it."""
    with pytest.raises((ValueError, StrictDataclassError), match="spiral"):
        SpaceExploreModel(SpaceExploreConfig(**TINY, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_refuses_a_rotation_that_knows_how_long_the_context_will_be(kind):
    assert "rope_type must be one of default, " in refusal(rope_parameters={"rope_type": kind, "rope_theta": 1e4})


def test_refuses_a_partial_rotation():
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}
    assert refusal(rope_parameters=rope) == "partial_rotary_factor must be 1, got 0.5"


def test_refuses_to_save_what_it_would_not_load(tmp_path):
    config = SpaceExploreConfig()
    config.hidden_size = 100
    with pytest.raises(StrictDataclassError, match="hidden_size must be a multiple of 8, got 100"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


# --- JSON ---


@pytest.fixture(params=["defaults", "everything"])
def config(request) -> SpaceExploreConfig:
    if request.param == "defaults":
        return SpaceExploreConfig()
    return SpaceExploreConfig(
        **TINY,
        q_lora_rank=16,
        input_norm="batch",
        wavelet="haar",
        mscnn_hidden_size=24,
        t2t_loss_weight=0.01,
        vocab_size=77,
        horizons=(1, 3),
        quantile_levels=(0.1, 0.5, 0.9),
        rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        train_cutoff="2019-05-31",
        selection_cutoff="2019-12-31",
    )


def test_json_round_trip(config, tmp_path):
    config.save_pretrained(tmp_path)
    reloaded = SpaceExploreConfig.from_pretrained(tmp_path)
    assert reloaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["horizons"] == list(config.horizons)


def test_dict_round_trip(config):
    assert SpaceExploreConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert SpaceExploreConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_lists_and_tuples_are_the_same_configuration():
    horizons, levels = [1, 3], [0.1, 0.5, 0.9]
    lists = SpaceExploreConfig(horizons=horizons, quantile_levels=levels)
    tuples = SpaceExploreConfig(horizons=tuple(horizons), quantile_levels=tuple(levels))
    assert lists.to_dict() == tuples.to_dict()
    assert lists.to_json_string() == tuples.to_json_string()


def test_refuses_to_save_rotary_dimensions_that_the_library_would_not_rotate(tmp_path):
    config = SpaceExploreConfig(**TINY)
    config.qk_rope_head_dim = 8
    with pytest.raises(StrictDataclassError, match="must be qk_rope_head_dim=8 with attention_type 'mla', got 4"):
        config.save_pretrained(tmp_path)


def test_rotary_dimensions_changed_in_the_json_change_what_the_library_rotates():
    stored = SpaceExploreConfig(**TINY).to_dict()
    assert SpaceExploreConfig(**{**stored, "qk_rope_head_dim": 8}).head_dim == 8


# --- auto classes ---


def test_auto_map_names_every_class_that_is_registered():
    public = [getattr(spaceexploreai, name) for name in spaceexploreai.__all__]
    registered = {cls._auto_class: cls for cls in public if getattr(cls, "_auto_class", None)}
    # In the map of its own `tokenizer_config.json`: most checkpoints have no tokenizer.
    registered.pop("AutoTokenizer")
    expected = {
        auto: f"{cls.__module__.removeprefix('spaceexploreai.')}.{cls.__name__}" for auto, cls in registered.items()
    }
    assert expected == AUTO_MAP


@pytest.mark.parametrize("target", AUTO_MAP.values())
def test_auto_map_names_files_of_the_repository_root(target):
    module, name = target.split(".")
    assert f"class {name}(" in (ROOT / f"{module}.py").read_text(encoding="utf-8")


def test_auto_map_is_saved_whole_and_not_shared(tmp_path):
    config = SpaceExploreConfig()
    config.auto_map["AutoModel"] = "elsewhere.Model"
    SpaceExploreConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert AUTO_MAP["AutoModel"] == "modeling_spaceexplore.SpaceExploreModel"
