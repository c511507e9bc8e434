"""transformers' own tests of a model and a configuration, out of its source distribution, on every head of ours."""

import copy
import importlib
import sys
import types
import unittest
from unittest import mock

import pytest
import torch
from fetch_transformers_tests import UPSTREAM
from transformers import MODEL_MAPPING
from transformers.models.auto import modeling_auto

from spaceexploreai import modeling_spaceexplore
from spaceexploreai.configuration_spaceexplore import ATTENTION_TYPES, SpaceExploreConfig
from spaceexploreai.modeling_spaceexplore import (
    SpaceExploreForCausalLM,
    SpaceExploreForClassification,
    SpaceExploreForRegression,
    SpaceExploreForTimeToText,
    SpaceExploreModel,
    SpaceExploreTimeToTextOutput,
)

if not UPSTREAM.is_dir():
    pytest.skip(f"no {UPSTREAM}; fetch_transformers_tests.py fetches it", allow_module_level=True)


# --- their files ---

PACKAGE = "transformers_tests"
# What they import and the source distribution leaves out. In the last, theirs also has names for a single class.
LEFT_OUT = {
    "exporters.test_export": {"ExportTesterMixin": object},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["SpaceExploreModel"],
            "problem_type": "regression",
        }
    },
}


def import_upstream(name: str) -> types.ModuleType:
    """A file of theirs. They import each other relative to their folder, which so becomes a package."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(UPSTREAM)]
    sys.modules.setdefault(PACKAGE, package)
    for module, contents in LEFT_OUT.items():
        stand_in = types.ModuleType(f"{PACKAGE}.{module}")
        vars(stand_in).update(contents)
        sys.modules.setdefault(stand_in.__name__, stand_in)
    return importlib.import_module(f"{PACKAGE}.{name}")


common = import_upstream("test_modeling_common")
configuration = import_upstream("test_configuration_common")

# They look up what a head is for by its name.
HEADS = {
    "MODEL_MAPPING_NAMES": SpaceExploreModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": SpaceExploreForCausalLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": SpaceExploreForClassification,
}


@pytest.fixture(autouse=True, scope="module")
def known_to_the_library():
    """As if in its tree, and only here: other tests load the heads by the code in a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        for mapping, head in HEADS.items():
            patch.setitem(getattr(modeling_auto, mapping), SpaceExploreConfig.model_type, head.__name__)
        patch.setitem(MODEL_MAPPING._extra_content, SpaceExploreConfig, SpaceExploreModel)
        yield


# --- what they ask of a tester ---

# They allow two layers, and fill a batch of fewer than seven rows up with random ones, which have no placeholders.
BATCH, STEPS, TOKENS, FEATURES, VOCABULARY = 7, 12, 5, 6, 99
SIZES = {
    "num_features": FEATURES,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "moe_intermediate_size": 40,
    "n_routed_experts": 5,
    "num_experts_per_tok": 3,
    "mscnn_num_blocks": 1,
    "mscnn_num_branches": 2,
    "wavelet_levels": 2,
    "t2t_num_hidden_layers": 1,
    "t2t_hidden_size": 16,
    "t2t_intermediate_size": 20,
    "t2t_num_attention_heads": 2,
    "t2t_patch_length": 5,
    "t2t_patch_overlap": 2,
    "horizons": [1, 2, 5],
    "quantile_levels": [0.1, 0.3, 0.5, 0.9],
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
ATTENTION_SIZES = {
    "mla": {"kv_lora_rank": 24, "q_lora_rank": 18, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10},
    "gqa": {"num_key_value_heads": 2, "head_dim": 10},
    "mha": {"head_dim": 10},
}


def make_sizes(attention_type: str) -> dict:
    return {"attention_type": attention_type, **SIZES, **ATTENTION_SIZES[attention_type]}


class NumericTester:
    """Gives them the sizes, a configuration and a batch: of time steps, with gaps and a padded row."""

    is_training = True
    batch_size, seq_length = BATCH, STEPS
    hidden_size, num_hidden_layers = SIZES["hidden_size"], SIZES["num_hidden_layers"]
    num_attention_heads = SIZES["num_attention_heads"]

    def __init__(self, attention_type: str):
        self.sizes = make_sizes(attention_type)

    def get_config(self) -> SpaceExploreConfig:
        return SpaceExploreConfig(**self.sizes, input_norm="batch", t2t_loss_weight=0.01)

    def prepare_config_and_inputs_for_common(self) -> tuple[SpaceExploreConfig, dict[str, torch.Tensor]]:
        past_values = torch.randn(BATCH, STEPS, FEATURES)
        past_values[torch.rand(past_values.shape) < 0.2] = torch.nan
        attention_mask = torch.ones(BATCH, STEPS, dtype=torch.long)
        attention_mask[0, :3] = 0
        return self.get_config(), {"past_values": past_values, "attention_mask": attention_mask}


class TokenTester(NumericTester):
    """Of tokens, behind the placeholders of time steps."""

    steps = STEPS
    seq_length = STEPS + TOKENS

    def get_config(self) -> SpaceExploreConfig:
        return SpaceExploreConfig(**self.sizes, input_norm="rms", vocab_size=VOCABULARY)

    def prepare_config_and_inputs_for_common(self) -> tuple[SpaceExploreConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        input_ids = torch.randint(config.ts_token_id + 1, VOCABULARY, (BATCH, self.seq_length))
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if self.steps:
            input_ids[:, : self.steps] = config.ts_token_id
            inputs["past_values"] = torch.randn(BATCH, self.steps, FEATURES)
        return config, inputs


class TimeToTextTester(NumericTester):
    def get_config(self) -> SpaceExploreConfig:
        return SpaceExploreConfig(**self.sizes, input_norm="dyt")


# --- their tests of a model ---

NO_TOKENS = "it reads time steps: there is no embedding of tokens"
TRUNK_IDLES = "its forward runs the extractor, not the layers of the trunk"
THREE_DIRECTIONS = "it loads a checkpoint with num_labels=42; a direction is down, flat or up"
ROTARY = {
    "test_model_rope_scaling_from_config_1_dynamic": "dynamic scaling is not causal, and refused",
    "test_model_rope_scaling_frequencies": "it begins with dynamic scaling, which is refused",
}
INAPPLICABLE = {
    "NumericHeads": {
        **ROTARY,
        "test_inputs_embeds": NO_TOKENS,
        "test_inputs_embeds_matches_input_ids": NO_TOKENS,
        "test_model_get_set_embeddings": NO_TOKENS,
        "test_resize_tokens_embeddings": NO_TOKENS,
        "test_load_with_mismatched_shapes": THREE_DIRECTIONS,
        "test_can_load_ignoring_mismatched_shapes": THREE_DIRECTIONS,
        "test_problem_types": "the labels are returns, which the head turns into directions",
    },
    "LanguageModel": {
        **ROTARY,
        "test_generation_tester_mixin_inheritance": "the source distribution has no tests/generation",
    },
    "TimeToText": {
        **ROTARY,
        "test_model_get_set_embeddings": NO_TOKENS,
        "test_resize_tokens_embeddings": NO_TOKENS,
        "test_hidden_states_output": TRUNK_IDLES,
        "test_retain_grad_hidden_states_attentions": TRUNK_IDLES,
        "test_eager_matches_batched_and_grouped_inference_0_fp16": TRUNK_IDLES,
        "test_eager_matches_batched_and_grouped_inference_1_fp32": TRUNK_IDLES,
        "test_eager_matches_batched_and_grouped_inference_2_bf16": TRUNK_IDLES,
    },
}


def output_tensors(outputs) -> list[torch.Tensor]:
    """What backends of the experts must agree on; theirs knows no forecast."""
    names = ("last_hidden_state", "logits", "mean", "quantiles")
    return [outputs[name] for name in names if name in outputs]


class CommonTests(common.ModelTesterMixin):
    make_tester = NumericTester

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = self.make_tester(self.attention_type)
        self.enterContext(mock.patch.object(common, "_get_output_tensors", output_tensors))
        # The tests of rotary scaling give the base model random tokens, more than it was made for.
        self.enterContext(mock.patch.object(common, "ids_tensor", lambda shape, _: torch.randn(*shape, FEATURES)))
        self.enterContext(mock.patch.object(SpaceExploreModel, "check_length"))

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        generator = torch.Generator().manual_seed(1)
        if model_class in (SpaceExploreForRegression, SpaceExploreForClassification):
            inputs["scale"] = 0.01 + 0.02 * torch.rand(BATCH, STEPS, generator=generator)
            if return_labels:
                inputs["labels"] = 0.02 * torch.randn(BATCH, STEPS, len(SIZES["horizons"]), generator=generator)
        elif return_labels and model_class is SpaceExploreForCausalLM:
            inputs["labels"] = inputs["input_ids"]
        elif return_labels and model_class is SpaceExploreForTimeToText:
            inputs["returns"] = torch.randn(BATCH, STEPS, generator=generator)
        return inputs


class NumericHeads(CommonTests):
    all_model_classes = (SpaceExploreModel, SpaceExploreForRegression, SpaceExploreForClassification)


class LanguageModel(CommonTests):
    all_model_classes = (SpaceExploreModel, SpaceExploreForCausalLM)
    make_tester = TokenTester
    additional_model_inputs = ("input_ids", "past_values")

    def test_inputs_embeds(self):
        self.model_tester.steps = 0  # an embedding is no placeholder
        super().test_inputs_embeds()

    def test_inputs_embeds_matches_input_ids(self):
        self.model_tester.steps = 0
        super().test_inputs_embeds_matches_input_ids()


class TimeToText(CommonTests):
    all_model_classes = (SpaceExploreForTimeToText,)
    make_tester = TimeToTextTester
    has_attentions = False

    def test_model_outputs_equivalence(self):
        """They subtract outputs, which booleans do not allow."""

        def as_numbers(visible, **outputs):
            return SpaceExploreTimeToTextOutput(visible=visible.long(), **outputs)

        with mock.patch.object(modeling_spaceexplore, "SpaceExploreTimeToTextOutput", as_numbers):
            super().test_model_outputs_equivalence()


def make_test_case(tests: type, attention_type: str) -> type:
    reasons = INAPPLICABLE[tests.__name__]
    skips = {name: unittest.skip(reason)(getattr(tests, name)) for name, reason in reasons.items()}
    name = f"{tests.__name__}{attention_type.upper()}"
    return type(name, (tests, unittest.TestCase), {"attention_type": attention_type, **skips})


# The extractor has attention of its own, of one type.
CASES = [(tests, kind) for tests in (NumericHeads, LanguageModel) for kind in ATTENTION_TYPES] + [(TimeToText, "mla")]
globals().update({case.__name__: case for case in map(make_test_case, *zip(*CASES, strict=True))})


# --- their tests of a configuration ---

CONFIG_CHECKS = [name for name in dir(configuration.ConfigTester) if name.startswith(("create_and_test_", "check_"))]
INAPPLICABLE_CHECKS = {
    "create_and_test_config_with_num_labels": "it asks for five labels; a direction is down, flat or up"
}


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("check", CONFIG_CHECKS)
def test_configuration(check, attention_type):
    if check in INAPPLICABLE_CHECKS:
        pytest.skip(INAPPLICABLE_CHECKS[check])
    case = unittest.TestCase()
    case.model_tester = NumericTester(attention_type)
    tester = configuration.ConfigTester(case, config_class=SpaceExploreConfig, **make_sizes(attention_type))
    getattr(tester, check)()
