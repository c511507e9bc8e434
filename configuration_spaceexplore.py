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

# Complete before the first save: registration alone writes only the class that is saved.
AUTO_MAP = {
    "AutoConfig": "configuration_spaceexplore.SpaceExploreConfig",
    "AutoFeatureExtractor": "feature_extraction_spaceexplore.SpaceExploreFeatureExtractor",
    "AutoModel": "modeling_spaceexplore.SpaceExploreModel",
    "AutoModelForTimeSeriesPrediction": "modeling_spaceexplore.SpaceExploreForRegression",
}

_SIZES = (
    "num_features",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_shared_experts",
    "moe_intermediate_size",
    "max_position_embeddings",
)


@auto_docstring(
    checkpoint="NEOAI/SpaceExploreAI-Small-Base-Regression-27M",
    custom_intro="""
    Configuration of the SpaceExploreAI models: a causal decoder over daily market features with multi-head latent
    attention and a mixture of experts, predicting the distribution of the coming days' log-returns.
    """,
)
@strict
class SpaceExploreConfig(PreTrainedConfig):
    r"""
    num_features (`int`, *optional*, defaults to 64):
        Number F of input features per time step.
    horizons (`list[int]`, *optional*, defaults to `(1, 2, 5, 10)`):
        Trading days ahead to predict, increasing.
    quantile_levels (`list[float]`, *optional*, defaults to 0.05, 0.10, … 0.95):
        Levels of the predicted quantiles, increasing, within (0, 1).
    mean_loss_weight (`float`, *optional*, defaults to 1.0):
        Weight of the mean squared error of the scaled mean.
    quantile_loss_weight (`float`, *optional*, defaults to 1.0):
        Weight of the pinball loss of the scaled quantiles.
    router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
        Weight of the load-balancing loss.
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
    keys_to_ignore_at_inference = ["past_key_values", "hidden_states", "attentions", "router_logits", "aux_loss"]
    # What the library's functions for experts and rotary embeddings ask for.
    attribute_map = {"num_local_experts": "n_routed_experts", "head_dim": "qk_rope_head_dim"}

    num_features: int = 64
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    q_lora_rank: int | None = None
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    n_shared_experts: int = 1
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 1024
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router_aux_loss_coef: float = 0.01
    output_router_logits: bool = False
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
    quantile_levels: list[float] | tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(1, 20))
    mean_loss_weight: float | int = 1.0
    quantile_loss_weight: float | int = 1.0
    train_cutoff: str | None = None
    selection_cutoff: str | None = None

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation; runs at construction and before saving."""
        for name in _SIZES:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        rope_types = ["default", *ROPE_INIT_FUNCTIONS]
        if self.rope_parameters["rope_type"] not in rope_types:
            raise ValueError(f"rope_type must be one of {', '.join(rope_types)}, got {self.rope_parameters}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok must be within 1 and n_routed_experts={self.n_routed_experts}, "
                f"got {self.num_experts_per_tok}"
            )
        for name in ("hidden_size", "moe_intermediate_size"):
            # The grouped matrix product wants rows of whole 16 bytes, in bfloat16 eight numbers.
            if getattr(self, name) % 8:
                raise ValueError(f"{name} must be a multiple of 8, got {getattr(self, name)}")

    def validate_targets(self):
        """Part of `@strict`-powered validation: what is predicted."""
        if not self.horizons or self.horizons[0] < 1 or not _is_increasing(self.horizons):
            raise ValueError(f"horizons must be increasing trading days from 1, got {list(self.horizons)}")
        levels = self.quantile_levels
        if not levels or not 0 < levels[0] <= levels[-1] < 1 or not _is_increasing(levels):
            raise ValueError(f"quantile_levels must be increasing within (0, 1), got {list(levels)}")


def _is_increasing(numbers) -> bool:
    return all(left < right for left, right in pairwise(numbers))


__all__ = ["SpaceExploreConfig"]
SpaceExploreConfig.register_for_auto_class()
