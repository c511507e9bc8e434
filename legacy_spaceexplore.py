# Copyright 2026 The SpaceExploreAI contributors. Licensed under the MIT License.
"""The first SpaceExploreAI, another network with its own weights: it computes what they were trained with.

Only for comparison. Its inputs held the returns of coming days, so nothing that it was measured at is evidence, and at
the newest day its inputs do not exist. `SpaceExploreModel` of modeling_spaceexplore.py is what to forecast with.
"""

# Shapes: B batch, T time steps, F features, D hidden, N heads, E experts, K experts per token

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "legacy_spaceexplore.LegacySpaceExploreConfig",
    "AutoModel": "legacy_spaceexplore.LegacySpaceExploreModel",
}
LEAK = (
    "The original SpaceExploreAI was trained on leaked inputs: returns of coming days were among its features. "
    "Its published figures are no evidence, and it cannot forecast."
)
PREDICTIONS = {"regression": 1, "classification": 3}  # outputs of the head

LEAKED_FEATURES = ("future_return_1d", "future_return_5d", "future_return_10d")
_WINDOWS = (5, 10, 21)
FEATURES = (
    *("close", "high", "low", "open", "volume"),
    *("day_of_week", "day_of_month", "week_of_year", "month", "quarter", "year"),
    *("is_month_start", "is_month_end", "is_week_start", "is_week_end"),
    *(f"{column}_lag_{lag}" for column in ("close", "high", "low", "volume") for lag in (1, 2, 3, 5, 10)),
    *LEAKED_FEATURES,
    *(f"past_return_{days}d" for days in (1, 2, 5, 10)),
    *("daily_range", "daily_range_abs", "gap", "close_to_open", "close_to_high", "close_to_low"),
    *(f"{name}_{days}d" for name in ("volatility", "atr", "momentum", "volume_change") for days in _WINDOWS),
    *(f"close_to_ma_{days}d" for days in _WINDOWS),
    "volume_change_rate",
)


@strict
class LegacySpaceExploreConfig(PreTrainedConfig):
    r"""
    softmax_over (`str`, *optional*, defaults to `"heads"`):
        What the attention weights sum to one over: `"heads"`, a mistake of the code that it was trained with, or
        `"keys"`, where the attention was of the type that this code calls mixed.
    q_lora_rank (`int`, *optional*):
        Rank of the query's low-rank projection; none by default.
    moe_intermediate_size (`int`, *optional*, defaults to 1024):
        Width of a routed expert. The shared expert is four times as wide.
    rope_theta (`float`, *optional*, defaults to 10000.0):
        Base of the rotary frequencies, that of any scaling included.
    attention_scale_factor (`float`, *optional*, defaults to 1.0):
        What the attention scores are multiplied by besides `(qk_nope_head_dim + qk_rope_head_dim) ** -0.5`.
    prediction_type (`str`, *optional*, defaults to `"regression"`):
        `"regression"` (one number) or `"classification"` (probabilities of three classes).
    feature_names (`list[str]`, *optional*):
        Columns of `past_values`, in order.
    """

    model_type = "spaceexplore_legacy"

    num_features: int = 64
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    softmax_over: str = "heads"
    q_lora_rank: int | None = None
    kv_lora_rank: int = 32
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 1024
    max_position_embeddings: int = 128
    rope_theta: float | int = 10000.0
    attention_scale_factor: float | int = 1.0
    prediction_type: str = "regression"
    feature_names: list[str] | tuple[str, ...] | None = None

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation; runs at construction and before saving."""
        for name in ("num_hidden_layers", "num_attention_heads", "qk_nope_head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, known in (("softmax_over", ("heads", "keys")), ("prediction_type", tuple(PREDICTIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.qk_rope_head_dim < 2 or self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok must be within 1 and n_routed_experts={self.n_routed_experts}, "
                f"got {self.num_experts_per_tok}"
            )
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be above 0, got {self.rope_theta}")
        if self.feature_names is not None and len(self.feature_names) != self.num_features:
            raise ValueError(f"feature_names must be {self.num_features} names, got {len(self.feature_names)}")


def rotary_angles(config: LegacySpaceExploreConfig, length: int, device: torch.device | None = None) -> torch.Tensor:
    """(T, qk_rope_head_dim / 2) angles of RoFormer (arXiv 2104.09864), in float32 as in training."""
    dim = config.qk_rope_head_dim
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim)
    return torch.outer(torch.arange(length, dtype=torch.float, device=device), inv_freq)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of neighbouring dimensions of (B, T, N, d) states; cos and sin are (T, 1, d / 2)."""
    even, odd = states[..., 0::2], states[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class LegacySpaceExploreRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return hidden_states / torch.sqrt(variance + self.variance_epsilon) * self.weight


class LegacySpaceExploreAttention(nn.Module):
    """Multi-head latent attention without a mask: every step sees every other."""

    def __init__(self, config: LegacySpaceExploreConfig):
        super().__init__()
        self.kv_split = [config.kv_lora_rank, config.qk_rope_head_dim]
        self.query_split = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        self.key_value_split = [config.qk_nope_head_dim, config.v_head_dim]
        self.num_heads = config.num_attention_heads
        self.scaling = sum(self.query_split) ** -0.5 * config.attention_scale_factor
        self.softmax_dim = {"heads": 3, "keys": 2}[config.softmax_over]  # of (B, T, T, N) scores

        query_width = self.num_heads * sum(self.query_split)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        else:
            self.q_proj_a = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
            self.q_norm = nn.LayerNorm(config.q_lora_rank)
            self.q_proj_b = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_proj_a = nn.Linear(config.hidden_size, sum(self.kv_split), bias=False)
        self.kv_norm = nn.LayerNorm(config.kv_lora_rank)
        self.kv_proj_b = nn.Linear(config.kv_lora_rank, self.num_heads * sum(self.key_value_split), bias=False)
        self.out_proj = nn.Linear(self.num_heads * config.v_head_dim, config.hidden_size, bias=False)

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "q_proj"):
            return self.q_proj(hidden_states)
        return self.q_proj_b(self.q_norm(self.q_proj_a(hidden_states)))

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        per_head = (*hidden_states.shape[:2], self.num_heads, -1)
        q_pass, q_rot = self.project_query(hidden_states).view(per_head).split(self.query_split, dim=-1)
        kv_latent, k_rot = self.kv_proj_a(hidden_states).split(self.kv_split, dim=-1)
        expanded = self.kv_proj_b(self.kv_norm(kv_latent)).view(per_head)
        k_pass, values = expanded.split(self.key_value_split, dim=-1)
        k_rot = rotate(k_rot.unsqueeze(2), cos, sin).expand(-1, -1, self.num_heads, -1)
        queries = torch.cat((q_pass, rotate(q_rot, cos, sin)), dim=-1)  # (B, T, N, qk_head_dim)
        scores = torch.einsum("btnd,bsnd->btsn", queries, torch.cat((k_pass, k_rot), dim=-1)) * self.scaling
        weights = scores.softmax(self.softmax_dim)
        return self.out_proj(torch.einsum("btsn,bsnd->btnd", weights, values).flatten(2))


class LegacySpaceExploreMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.w1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, intermediate_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(hidden_states)) * self.w3(hidden_states))


class LegacySpaceExploreMoE(nn.Module):
    """Routed experts plus the shared one that sees every token."""

    def __init__(self, config: LegacySpaceExploreConfig):
        super().__init__()
        width = config.moe_intermediate_size
        self.top_k = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.experts = nn.ModuleList(
            LegacySpaceExploreMLP(config.hidden_size, width) for _ in range(config.n_routed_experts)
        )
        self.shared_expert = LegacySpaceExploreMLP(config.hidden_size, 4 * width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, 1)  # (B*T, D)
        # The weights are the logits themselves, not normalised, of either sign.
        top_k_weights, top_k_index = self.router(tokens).topk(self.top_k, dim=-1)  # (B*T, K)
        output = self.shared_expert(tokens)
        for which, expert in enumerate(self.experts):
            token_idx, top_k_pos = torch.where(top_k_index == which)
            weighted = expert(tokens[token_idx]) * top_k_weights[token_idx, top_k_pos, None]
            output = output.index_add(0, token_idx, weighted)
        return output.view_as(hidden_states)


class LegacySpaceExploreLayer(nn.Module):
    def __init__(self, config: LegacySpaceExploreConfig):
        super().__init__()
        self.pre_attn_norm = LegacySpaceExploreRMSNorm(config.hidden_size)
        self.attention = LegacySpaceExploreAttention(config)
        self.pre_moe_norm = LegacySpaceExploreRMSNorm(config.hidden_size)
        self.moe = LegacySpaceExploreMoE(config)

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(self.pre_attn_norm(hidden_states), cos, sin)
        return hidden_states + self.moe(self.pre_moe_norm(hidden_states))


@dataclass
class LegacySpaceExploreOutput(ModelOutput):
    r"""
    prediction (`torch.FloatTensor` of shape `(batch,)`, or `(batch, 3)` of a classification):
        What the last step of each window says: a number in units of the target's scaler, or probabilities of classes.
    last_hidden_state (`torch.FloatTensor` of shape `(batch, time, hidden)`):
        What the head reads, of every step.
    """

    prediction: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None


class LegacySpaceExploreModel(PreTrainedModel):
    """The network of the first SpaceExploreAI, for inference: it has no dropout and no loss.

    `past_values` are (B, T, F) daily bars of one ticker each, T at most `max_position_embeddings` (32 in training),
    without gaps and padding. The F columns were, in the published recipe of 64, `FEATURES` in their order: raw prices
    and volume, the calendar, both again from 1, 2, 3, 5 and 10 bars before, returns in percent (those of the coming
    1, 5 and 10 days too), ranges, volatilities, average true ranges, momenta and volume ratios. Missing values were 0;
    then every column was scaled by scikit-learn's RobustScaler, fitted to the ticker's first 81 % of days. The target,
    the return of the next 2 days in percent, was scaled in the same way. A checkpoint holds none of these scalers.
    """

    config_class = LegacySpaceExploreConfig
    main_input_name = "past_values"
    _no_split_modules = ["LegacySpaceExploreLayer"]

    def __init__(self, config: LegacySpaceExploreConfig):
        super().__init__(config)
        self.input_projection = nn.Linear(config.num_features, config.hidden_size)
        self.layers = nn.ModuleList(LegacySpaceExploreLayer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = LegacySpaceExploreRMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, PREDICTIONS[config.prediction_type])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.input_projection

    def forward(self, past_values: torch.Tensor) -> LegacySpaceExploreOutput:
        logger.warning_once(LEAK)
        self.check_values(past_values)
        hidden_states = self.input_projection(past_values)  # (B, T, D)
        angles = rotary_angles(self.config, past_values.shape[1], past_values.device).unsqueeze(1)
        cos, sin = angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin)
        hidden_states = self.final_norm(hidden_states)
        prediction = self.head(hidden_states[:, -1])
        if self.config.prediction_type == "regression":
            prediction = prediction.squeeze(-1)
        else:
            prediction = prediction.softmax(dim=-1)
        return LegacySpaceExploreOutput(prediction=prediction, last_hidden_state=hidden_states)

    def check_values(self, past_values: torch.Tensor):
        features, limit = self.config.num_features, self.config.max_position_embeddings
        if past_values.ndim != 3 or past_values.shape[-1] != features or not 1 <= past_values.shape[1] <= limit:
            raise ValueError(
                f"past_values must be (batch, 1 to {limit} steps, {features} features), got {tuple(past_values.shape)}"
            )


__all__ = ["LegacySpaceExploreConfig", "LegacySpaceExploreModel"]
LegacySpaceExploreConfig.register_for_auto_class()
LegacySpaceExploreModel.register_for_auto_class("AutoModel")
