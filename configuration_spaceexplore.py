# Copyright 2026 The SpaceExploreAI contributors and The HuggingFace Inc. team. All rights reserved.
#
# Adapted from the DeepSeek-V3 implementation of transformers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""SpaceExploreAI model configuration: every number the network needs, with its checks."""

from itertools import pairwise

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils import auto_docstring
from transformers.utils.versions import require_version

# 5.24 renamed the cache that every layer is given: say so first, and not in the middle of a forward pass.
require_version("transformers>=5.24")

# Complete before the first save: registration alone writes only the class that is saved.
AUTO_MAP = {
    "AutoConfig": "configuration_spaceexplore.SpaceExploreConfig",
    "AutoFeatureExtractor": "feature_extraction_spaceexplore.SpaceExploreFeatureExtractor",
    "AutoModel": "modeling_spaceexplore.SpaceExploreModel",
    "AutoModelForCausalLM": "modeling_spaceexplore.SpaceExploreForCausalLM",
    "AutoModelForPreTraining": "modeling_spaceexplore.SpaceExploreForTimeToText",
    "AutoModelForSequenceClassification": "modeling_spaceexplore.SpaceExploreForClassification",
    "AutoModelForTimeSeriesPrediction": "modeling_spaceexplore.SpaceExploreForRegression",
}
DIRECTIONS = {0: "down", 1: "flat", 2: "up"}

ATTENTION_TYPES = ("mla", "gqa", "mha")
INPUT_NORMS = ("dyt", "batch", "rms")
QUANTILE_FORMS = ("scale", "free")
WAVELETS = ("haar", "db2", "db4", "sym4")
_KINDS = {
    "attention_type": ATTENTION_TYPES,
    "input_norm": INPUT_NORMS,
    "quantile_form": QUANTILE_FORMS,
    "wavelet": WAVELETS,
}

_SIZES = (
    "num_features",
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
    "moe_intermediate_size",
    "max_position_embeddings",
    "mscnn_hidden_size",
    "mscnn_num_branches",
    "mscnn_kernel_size",
    "t2t_patch_length",
    "t2t_hidden_size",
    "t2t_num_attention_heads",
    "t2t_num_decoder_layers",
    "t2t_intermediate_size",
    "head_dim",
)
_COUNTS = ("first_k_dense_replace", "mscnn_num_blocks", "wavelet_levels", "t2t_num_hidden_layers")
_WEIGHTS = (
    "input_noise",
    "mean_loss_weight",
    "quantile_loss_weight",
    "router_aux_loss_coef",
    "t2t_loss_weight",
    "flat_band",
)


@auto_docstring(
    checkpoint="NEOAI/SpaceExploreAI-Small-Base-Regression-27M",
    custom_intro="""
    Configuration of the SpaceExploreAI models: a causal decoder over daily market features with a wavelet multi-scale
    CNN, multi-head latent (or grouped-query, or multi-head) attention and a mixture of experts, predicting the
    distribution of the coming days' log-returns.
    """,
)
@strict
class SpaceExploreConfig(PreTrainedConfig):
    r"""
    num_features (`int`, *optional*, defaults to 64):
        Number F of input features per time step.
    input_norm (`str`, *optional*, defaults to `"dyt"`):
        Normalisation of the features before they are embedded: `"dyt"` (Dynamic Tanh), `"batch"` (batch normalisation
        over unpadded steps) or `"rms"` (root mean square over the features of a step).
    input_noise (`float`, *optional*, defaults to 0.0):
        Standard deviation of the noise that training adds to the features, whose spread is about one (Bishop, 1995).
    attention_type (`str`, *optional*, defaults to `"mla"`):
        `"mla"` (multi-head latent attention), `"gqa"` (grouped-query) or `"mha"` (multi-head attention).
    num_key_value_heads (`int`, *optional*):
        Key and value heads of `"gqa"`, half of the heads by default; the other types have `num_attention_heads`.
    head_dim (`int`, *optional*):
        Size of a head of `"gqa"` and `"mha"`, `hidden_size // num_attention_heads` by default. With `"mla"` it is what
        the rotary functions rotate, `qk_rope_head_dim`.
    q_lora_rank (`int`, *optional*):
        Rank of the query's low-rank projection; none by default. Only of `"mla"`.
    kv_lora_rank (`int`, *optional*, defaults to 64):
        Size of the latent that `"mla"` caches; `None` with the other types, by which the library tells them apart.
    first_k_dense_replace (`int`, *optional*, defaults to 1):
        Number of first layers with a dense network of `intermediate_size` in place of the mixture of experts.
    mscnn_num_blocks (`int`, *optional*, defaults to 2):
        Blocks of the multi-scale CNN (LLM-PS, arXiv 2503.09656); 0 for none.
    mscnn_hidden_size (`int`, *optional*):
        Channels of its branches together; `hidden_size` by default.
    mscnn_num_branches (`int`, *optional*, defaults to 4):
        Branches, each with a longer receptive field than the one before.
    mscnn_kernel_size (`int`, *optional*, defaults to 3):
        Taps of a branch's convolution.
    wavelet (`str`, *optional*, defaults to `"db4"`):
        Wavelet that parts long-term from short-term: `"haar"`, `"db2"`, `"db4"` or `"sym4"`.
    wavelet_levels (`int`, *optional*, defaults to 3):
        Levels of the wavelet transform; with 0 nothing is parted and all is long-term.
    t2t_num_hidden_layers (`int`, *optional*, defaults to 4):
        Encoder layers of the time-to-text extractor; 0 for none.
    t2t_num_decoder_layers (`int`, *optional*, defaults to 1):
        Layers of the decoder that its own training needs.
    t2t_hidden_size (`int`, *optional*, defaults to 128):
        Size of a patch's features.
    t2t_intermediate_size (`int`, *optional*, defaults to 256):
        Width of the extractor's feed-forward networks.
    t2t_num_attention_heads (`int`, *optional*, defaults to 4):
        Its attention heads.
    t2t_patch_length (`int`, *optional*, defaults to 24):
        Time steps of a patch.
    t2t_patch_overlap (`int`, *optional*, defaults to 8):
        Time steps that a patch shares with the next.
    t2t_mask_ratio (`float`, *optional*, defaults to 0.75):
        Share of the patches that its own training hides.
    t2t_loss_weight (`float`, *optional*, defaults to 0.0):
        Weight of the distance between the features of the CNN and those of a trained extractor (LLM-PS uses 0.01).
    horizons (`list[int]`, *optional*, defaults to `(1, 2, 5, 10)`):
        Trading days ahead to predict, increasing.
    target (`str`, *optional*, defaults to `"log_return"`):
        What was predicted in training, of `data/windows.py`. Only log-returns can be decoded to prices.
    quantile_levels (`list[float]`, *optional*, defaults to 0.05, 0.10, … 0.95):
        Levels of the predicted quantiles, increasing, within (0, 1).
    quantile_form (`str`, *optional*):
        `"scale"`: the input stretches one learned shape for each horizon, the default for log-returns, whose direction
        is nearly all noise; `"free"`: it moves each quantile.
    mean_loss_weight (`float`, *optional*, defaults to 1.0):
        Weight of the mean squared error of the scaled mean.
    quantile_loss_weight (`float`, *optional*, defaults to 1.0):
        Weight of the pinball loss of the scaled quantiles.
    router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
        Weight of the load-balancing loss.
    flat_band (`float`, *optional*, defaults to 0.25):
        Half-width of the class "flat", in units of `scale * sqrt(horizon)`.
    vocab_size (`int`, *optional*):
        Number V of tokens; without it there is no token embedding and no causal language model.
    ts_token_id (`int`, *optional*, defaults to 4):
        Placeholder `<ts>` that the numeric context replaces.
    train_cutoff (`str`, *optional*):
        Last date, as YYYY-MM-DD, whose price the weights were fitted to.
    selection_cutoff (`str`, *optional*):
        Last date, as YYYY-MM-DD, whose price a choice between checkpoints was made on.

    Example:

    ```python
    >>> from spaceexploreai import SpaceExploreConfig, SpaceExploreForRegression

    >>> configuration = SpaceExploreConfig(num_features=41, hidden_size=64)
    >>> model = SpaceExploreForRegression(configuration)
    ```"""

    model_type = "spaceexplore"
    # Trainer gathers every output that is not listed here.
    keys_to_ignore_at_inference = ["cache", "hidden_states", "attentions", "router_logits", "aux_loss", "feature_loss"]
    # What the library's functions for experts ask for.
    attribute_map = {"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"}
    base_model_tp_plan = {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "value_embedding": (["past_values"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    num_features: int = 64
    input_norm: str = "dyt"
    input_noise: float | int = 0.0
    hidden_size: int = 256
    intermediate_size: int = 5120
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    attention_type: str = "mla"
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = 64
    qk_nope_head_dim: int = 48
    qk_rope_head_dim: int = 16
    v_head_dim: int = 64
    n_shared_experts: int = 1
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 1024
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router_aux_loss_coef: float | int = 0.01
    output_router_logits: bool = False
    mscnn_num_blocks: int = 2
    mscnn_hidden_size: int | None = None
    mscnn_num_branches: int = 4
    mscnn_kernel_size: int = 3
    wavelet: str = "db4"
    wavelet_levels: int = 3
    t2t_num_hidden_layers: int = 4
    t2t_num_decoder_layers: int = 1
    t2t_hidden_size: int = 128
    t2t_intermediate_size: int = 256
    t2t_num_attention_heads: int = 4
    t2t_patch_length: int = 24
    t2t_patch_overlap: int = 8
    t2t_mask_ratio: float = 0.75
    t2t_loss_weight: float | int = 0.0
    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    use_cache: bool = True
    horizons: list[int] | tuple[int, ...] = (1, 2, 5, 10)
    target: str = "log_return"
    quantile_levels: list[float] | tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(1, 20))
    quantile_form: str | None = None
    mean_loss_weight: float | int = 1.0
    quantile_loss_weight: float | int = 1.0
    flat_band: float | int = 0.25
    vocab_size: int | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    ts_token_id: int = 4
    tie_word_embeddings: bool = False
    train_cutoff: str | None = None
    selection_cutoff: str | None = None

    def __post_init__(self, **kwargs):
        if self.attention_type == "mla":
            self.num_key_value_heads = self.num_attention_heads
            self.head_dim = self.qk_rope_head_dim
        else:
            self.kv_lora_rank = self.q_lora_rank = None
            shared = 2 if self.attention_type == "gqa" and self.num_attention_heads > 1 else 1
            self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads // shared
            self.head_dim = self.head_dim or self.hidden_size // max(self.num_attention_heads, 1)
        self.quantile_form = self.quantile_form or _quantile_form(self.target, self.quantile_levels)
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        self.id2label = self.id2label or dict(DIRECTIONS)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation; runs at construction and before saving."""
        for names, least in ((_SIZES, 1), (_COUNTS, 0), (_WEIGHTS, 0)):
            for name in names:
                if getattr(self, name) is not None and not getattr(self, name) >= least:
                    raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be within [0, 1], got {getattr(self, name)}")
        for name, known in _KINDS.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        # Not those that turn early steps by how long the longest row of a batch is: by their future, and others'.
        rope_types = ["default", *(name for name in ROPE_INIT_FUNCTIONS if name not in ("dynamic", "longrope"))]
        if self.rope_parameters["rope_type"] not in rope_types:
            raise ValueError(f"rope_type must be one of {', '.join(rope_types)}, got {self.rope_parameters}")
        if self.rope_parameters.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"partial_rotary_factor must be 1, got {self.rope_parameters['partial_rotary_factor']}")

    def validate_attention(self):
        """Part of `@strict`-powered validation: sizes of the heads that must fit each other."""
        rotary = "qk_rope_head_dim" if self.attention_type == "mla" else "head_dim"
        if getattr(self, rotary) % 2:
            raise ValueError(f"{rotary} must be even, got {getattr(self, rotary)}")
        if self.attention_type == "mla" and self.kv_lora_rank is None:
            raise ValueError("attention_type 'mla' needs a kv_lora_rank, got None")
        if self.attention_type == "mla" and self.head_dim != self.qk_rope_head_dim:
            raise ValueError(
                f"head_dim, what rotary functions rotate, must be qk_rope_head_dim={self.qk_rope_head_dim} with "
                f"attention_type 'mla', got {self.head_dim}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of num_key_value_heads, "
                f"got {self.num_key_value_heads}"
            )
        if self.attention_type == "mha" and self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"attention_type 'mha' has num_key_value_heads = num_attention_heads = {self.num_attention_heads}, "
                f"got {self.num_key_value_heads}"
            )

    def validate_experts(self):
        """Part of `@strict`-powered validation: the mixture of experts."""
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok must be within 1 and n_routed_experts={self.n_routed_experts}, "
                f"got {self.num_experts_per_tok}"
            )
        for name in ("hidden_size", "moe_intermediate_size"):
            # The grouped matrix product wants rows of whole 16 bytes, in bfloat16 eight numbers.
            if getattr(self, name) % 8:
                raise ValueError(f"{name} must be a multiple of 8, got {getattr(self, name)}")

    def validate_front_end(self):
        """Part of `@strict`-powered validation: the multi-scale CNN and the time-to-text extractor."""
        width = self.mscnn_hidden_size or self.hidden_size
        if self.mscnn_num_blocks and width % self.mscnn_num_branches:
            raise ValueError(
                f"mscnn_num_branches={self.mscnn_num_branches} must divide the channels of the CNN, got {width}"
            )
        if not 0 <= self.t2t_patch_overlap < self.t2t_patch_length:
            raise ValueError(
                f"t2t_patch_overlap must be within 0 and t2t_patch_length={self.t2t_patch_length}, "
                f"got {self.t2t_patch_overlap}"
            )
        if not 0 < self.t2t_mask_ratio < 1:
            raise ValueError(f"t2t_mask_ratio must be within (0, 1), got {self.t2t_mask_ratio}")
        if self.t2t_hidden_size % (2 * self.t2t_num_attention_heads):
            raise ValueError(
                f"t2t_hidden_size must be a multiple of twice t2t_num_attention_heads={self.t2t_num_attention_heads}, "
                f"got {self.t2t_hidden_size}"
            )
        if self.t2t_loss_weight and not (self.t2t_num_hidden_layers and self.mscnn_num_blocks):
            raise ValueError(
                f"t2t_loss_weight={self.t2t_loss_weight} compares the features of the extractor and of the CNN; "
                f"got t2t_num_hidden_layers={self.t2t_num_hidden_layers}, mscnn_num_blocks={self.mscnn_num_blocks}"
            )

    def validate_targets(self):
        """Part of `@strict`-powered validation: what is predicted."""
        if not self.horizons or self.horizons[0] < 1 or not _is_increasing(self.horizons):
            raise ValueError(f"horizons must be increasing trading days from 1, got {list(self.horizons)}")
        _check_quantiles(self.quantile_form, list(self.quantile_levels))
        if len(self.id2label) != len(DIRECTIONS):
            raise ValueError(f"a direction is one of {list(DIRECTIONS.values())}, got id2label {self.id2label}")
        if self.vocab_size is not None and not 0 <= self.ts_token_id < self.vocab_size:
            raise ValueError(f"vocab_size must be larger than ts_token_id={self.ts_token_id}, got {self.vocab_size}")


def _quantile_form(target: str, levels) -> str:
    """The default; of a lone median there is nothing to stretch."""
    return "scale" if target == "log_return" and list(levels) != [0.5] else "free"


def _check_quantiles(form: str, levels: list[float]):
    if not levels or not 0 < levels[0] <= levels[-1] < 1 or not _is_increasing(levels):
        raise ValueError(f"quantile_levels must be increasing within (0, 1), got {levels}")
    if form == "scale" and levels == [0.5]:
        raise ValueError("quantile_form 'scale' leaves nothing to forecast of quantile_levels [0.5]")


def _is_increasing(numbers) -> bool:
    return all(left < right for left, right in pairwise(numbers))


__all__ = ["SpaceExploreConfig"]
SpaceExploreConfig.register_for_auto_class()
