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
"""PyTorch SpaceExploreAI model: a causal decoder over daily market features, after DeepSeek-V3 (arXiv 2412.19437)."""

# Shapes: B batch, T time steps, F features, D hidden, N heads, E experts, K experts per token, H horizons, Q quantiles

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation, use_kernel_forward_from_hub
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_spaceexplore import SpaceExploreConfig


@use_kernel_forward_from_hub("RMSNorm")
class SpaceExploreRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6):
        """
        SpaceExploreRMSNorm is equivalent to T5LayerNorm
        """
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class SpaceExploreValueEmbedding(nn.Module):
    """Embeds each time step; a missing value (NaN) is zero plus its own indicator."""

    def __init__(self, config: SpaceExploreConfig):
        super().__init__()
        self.value_proj = nn.Linear(config.num_features, config.hidden_size)
        self.missing_proj = nn.Linear(config.num_features, config.hidden_size, bias=False)

    def forward(self, past_values: torch.Tensor) -> torch.Tensor:
        missing = torch.isnan(past_values)
        values = past_values.masked_fill(missing, 0.0).to(self.value_proj.weight.dtype)
        return self.value_proj(values) + self.missing_proj(missing.to(values.dtype))  # (B, T, D)


class SpaceExploreRotaryEmbedding(nn.Module):
    def __init__(self, config: SpaceExploreConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = self.config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(self.config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: SpaceExploreConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """
        Computes the inverse frequencies of RoFormer (arXiv 2104.09864) over the decoupled rotary dimensions.

        Returns:
            Tuple of (`torch.Tensor`, `float`), containing the inverse frequencies and the scaling of cos/sin, here 1.
        """
        dim = config.qk_rope_head_dim
        inv_freq = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
        return inv_freq, 1.0

    @torch.no_grad()
    @dynamic_rope_update  # power user: used with advanced RoPE types (e.g. dynamic rope)
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)  # (B, T, qk_rope_head_dim)
        cos = emb.cos() * self.attention_scaling
        sin = emb.sin() * self.attention_scaling
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


class SpaceExploreMLP(nn.Module):
    """SwiGLU network of the shared experts, side by side in one."""

    def __init__(self, config: SpaceExploreConfig):
        super().__init__()
        intermediate_size = config.moe_intermediate_size * config.n_shared_experts
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class SpaceExploreTopkRouter(nn.Module):
    """DeepSeek-V3's router with a single group: sigmoid affinities in float32, the chosen ones normalised."""

    def __init__(self, config: SpaceExploreConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.hidden_dim = config.hidden_size
        self.routed_scaling_factor = config.routed_scaling_factor
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_states = hidden_states.view(-1, self.hidden_dim)  # (B*T, D)
        router_logits = F.linear(hidden_states.float(), self.weight.float())  # (B*T, E)
        top_k_weights, top_k_index = router_logits.sigmoid().topk(self.top_k, dim=-1)  # (B*T, K)
        if self.norm_topk_prob:
            top_k_weights = top_k_weights / (top_k_weights.sum(dim=-1, keepdim=True) + 1e-20)
        return router_logits, top_k_weights * self.routed_scaling_factor, top_k_index


@use_experts_implementation
class SpaceExploreExperts(nn.Module):
    """Collection of expert weights stored as 3D tensors."""

    def __init__(self, config: SpaceExploreConfig):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The plain loop that `experts_implementation="eager"` runs; others are the library's."""
        final_hidden_states = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token_idx, top_k_pos = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token_idx], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            weighted = expert_output * top_k_weights[token_idx, top_k_pos, None]
            final_hidden_states.index_add_(0, token_idx, weighted.to(final_hidden_states.dtype))
        return final_hidden_states


class SpaceExploreMoE(nn.Module):
    """Routed experts plus the shared one that sees every token."""

    def __init__(self, config: SpaceExploreConfig):
        super().__init__()
        self.experts = SpaceExploreExperts(config)
        self.gate = SpaceExploreTopkRouter(config)
        self.shared_experts = SpaceExploreMLP(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        _, top_k_weights, top_k_index = self.gate(hidden_states)
        tokens = hidden_states.view(-1, hidden_states.shape[-1])  # (B*T, D)
        routed = self.experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)
        return routed + self.shared_experts(hidden_states)


def repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """
    This is the equivalent of torch.repeat_interleave(x, dim=1, repeats=n_rep). The hidden states go from (batch,
    num_key_value_heads, seqlen, head_dim) to (batch, num_attention_heads, seqlen, head_dim)
    """
    batch, num_key_value_heads, slen, head_dim = hidden_states.shape
    if n_rep == 1:
        return hidden_states
    hidden_states = hidden_states[:, :, None, :, :].expand(batch, num_key_value_heads, n_rep, slen, head_dim)
    return hidden_states.reshape(batch, num_key_value_heads * n_rep, slen, head_dim)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    key_states = repeat_kv(key, module.num_key_value_groups)
    value_states = repeat_kv(value, module.num_key_value_groups)

    attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask

    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value_states)
    return attn_output.transpose(1, 2).contiguous(), attn_weights


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Rotates half the hidden dims of the input."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


@use_kernel_forward_from_hub("rotary_pos_emb")
def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies Rotary Position Embedding to the query and key tensors.

    Args:
        q (`torch.Tensor`): The query tensor.
        k (`torch.Tensor`): The key tensor.
        cos (`torch.Tensor`): The cosine part of the rotary embedding.
        sin (`torch.Tensor`): The sine part of the rotary embedding.
        unsqueeze_dim (`int`, *optional*, defaults to 1): The dimension of the heads.
    Returns:
        `tuple(torch.Tensor)` comprising of the query and key tensors rotated using the Rotary Position Embedding.
    """
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


class SpaceExploreAttention(nn.Module):
    """Multi-head latent attention with decoupled rotary dimensions (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    def __init__(self, config: SpaceExploreConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = 1
        self.attention_dropout = config.attention_dropout
        self.q_lora_rank = config.q_lora_rank
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.is_causal = True
        self.scaling = self.qk_head_dim**-0.5

        bias = config.attention_bias
        q_width = self.num_heads * self.qk_head_dim
        if self.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = SpaceExploreRMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, bias=bias
        )
        self.kv_a_layernorm = SpaceExploreRMSNorm(config.kv_lora_rank)
        kv_width = self.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, kv_width, bias=False)
        self.o_proj = nn.Linear(self.num_heads * config.v_head_dim, config.hidden_size, bias=bias)

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.q_lora_rank is None:
            return self.q_proj(hidden_states)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))

    def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Expands the compressed latents into key and value states.

        Args:
            kv_nope (`torch.Tensor` of shape `(batch, 1, seq, kv_lora_rank)`): key and value without position.
            k_rot (`torch.Tensor` of shape `(batch, 1, seq, qk_rope_head_dim)`): rotated key shared by the heads.
        Returns:
            Two tensors of shape `(batch, num_heads, seq, qk_head_dim)` and `(batch, num_heads, seq, v_head_dim)`.
        """
        batch_size, _, seq_length, _ = kv_nope.shape
        shape = (batch_size, seq_length, self.num_heads, self.qk_nope_head_dim + self.v_head_dim)
        expanded = self.kv_b_proj(kv_nope).view(shape).transpose(1, 2)
        k_nope, value_states = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat((k_nope, k_rot.expand(-1, self.num_heads, -1, -1)), dim=-1), value_states

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, seq_length = hidden_states.shape[:-1]
        q_states = self.project_query(hidden_states).view(batch_size, seq_length, self.num_heads, self.qk_head_dim)
        q_pass, q_rot = q_states.transpose(1, 2).split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)

        compressed_kv = self.kv_a_proj_with_mqa(hidden_states)
        kv_nope, k_rot = compressed_kv.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        # Both latents are viewed as single-head, 4D tensors so all cache layers handle them correctly
        kv_nope = self.kv_a_layernorm(kv_nope).unsqueeze(1)
        q_rot, k_rot = apply_rotary_pos_emb(q_rot, k_rot.unsqueeze(1), *position_embeddings)
        if past_key_values is not None:
            kv_nope, k_rot = past_key_values.update(kv_nope, k_rot, self.layer_idx)

        query_states = torch.cat((q_pass, q_rot), dim=-1)  # (B, N, T, qk_head_dim)
        key_states, value_states = self.expand_kv(kv_nope, k_rot)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(batch_size, seq_length, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


class SpaceExploreDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: SpaceExploreConfig, layer_idx: int):
        super().__init__()
        self.self_attn = SpaceExploreAttention(config=config, layer_idx=layer_idx)
        self.mlp = SpaceExploreMoE(config)
        self.input_layernorm = SpaceExploreRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = SpaceExploreRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + self.dropout(hidden_states)

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return residual + self.dropout(hidden_states)


@auto_docstring
class SpaceExplorePreTrainedModel(PreTrainedModel):
    config: SpaceExploreConfig
    base_model_prefix = "model"
    main_input_name = "past_values"
    input_modalities = ("time",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpaceExploreDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": SpaceExploreDecoderLayer,
        "attentions": SpaceExploreAttention,
        "router_logits": OutputRecorder(SpaceExploreTopkRouter, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, SpaceExploreTopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, SpaceExploreExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, SpaceExploreQuantileHead):
            # Returns in units of their volatility are near a unit normal.
            init.copy_(module.bias, module.bias_for(module.unit_normal_quantiles()))

    def get_input_embeddings(self):
        """None: time steps are projected, not looked up. FSDP asks every model for it."""


@auto_docstring
class SpaceExploreModel(SpaceExplorePreTrainedModel):
    def __init__(self, config: SpaceExploreConfig):
        super().__init__(config)
        self.value_embedding = SpaceExploreValueEmbedding(config)
        self.layers = nn.ModuleList(
            [SpaceExploreDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = SpaceExploreRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = SpaceExploreRotaryEmbedding(config=config)
        self.gradient_checkpointing = False

        # Initialize weights and apply final processing
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        past_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        r"""
        past_values (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_features)`):
            Normalised features, oldest first. NaN stands for a missing value.
        """
        self.check_shape(past_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self.make_position_ids(past_values, attention_mask, past_key_values)

        hidden_states = self.value_embedding(past_values)  # (B, T, D)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for decoder_layer in self.layers:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
        )

    def check_shape(self, past_values: torch.Tensor):
        if past_values.ndim != 3 or past_values.shape[-1] != self.config.num_features:
            raise ValueError(
                f"past_values must be (batch, time, {self.config.num_features} features), "
                f"got {tuple(past_values.shape)}"
            )
        if past_values.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"a context of {past_values.shape[1]} steps is longer than "
                f"max_position_embeddings={self.config.max_position_embeddings}"
            )

    @staticmethod
    def make_position_ids(
        past_values: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor:
        """Counts 0..n-1 from the first unpadded step, never calendar days: the library reads gaps as packing."""
        batch_size, seq_length = past_values.shape[:2]
        past_seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq_length:]
        positions = torch.arange(seq_length, device=past_values.device) + past_seen
        return positions.unsqueeze(0).expand(batch_size, -1)


@auto_docstring(
    custom_intro="""
    Distribution of future log-returns: their mean and quantiles, for every horizon and at every time step.
    """
)
@dataclass
class SpaceExploreForecastOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        Weighted sum of squared error, pinball loss and load-balancing loss.
    mean (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_horizons)`):
        Mean cumulative log-return to each horizon; in units of `scale * sqrt(horizon)` when no `scale` is given.
    quantiles (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_horizons, num_quantiles)`):
        Quantiles of the same, never crossing.
    aux_loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned with router logits):
        Load-balancing loss over unpadded steps.
    past_key_values (`Cache`, *optional*, returned when `use_cache=True`):
        Latents of multi-head latent attention.
    router_logits (`tuple(torch.FloatTensor)`, *optional*, returned when `output_router_logits=True`):
        One tensor of shape `(batch_size * sequence_length, n_routed_experts)` per layer.
    """

    loss: torch.FloatTensor | None = None
    mean: torch.FloatTensor | None = None
    quantiles: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


class SpaceExploreQuantileHead(nn.Linear):
    """
    Quantiles that cannot cross: the middle one, and positive steps outwards from it.

    A linear layer, not a module around one: the library initialises only modules with parameters of their own.
    """

    def __init__(self, config: SpaceExploreConfig):
        super().__init__(config.hidden_size, len(config.horizons) * len(config.quantile_levels))
        self.levels = list(config.quantile_levels)
        self.middle = len(self.levels) // 2
        self.num_horizons = len(config.horizons)

    def bias_for(self, quantiles: torch.Tensor) -> torch.Tensor:
        """Bias, (H*Q,), at which the head without weights gives these (H, Q) quantiles."""
        steps = quantiles.diff(dim=-1).clamp(min=1e-3).expm1().log()  # inverse of softplus
        return torch.cat((quantiles[:, self.middle, None], steps), dim=-1).flatten()

    def unit_normal_quantiles(self) -> torch.Tensor:
        quantiles = torch.tensor([NormalDist().inv_cdf(level) for level in self.levels])
        return quantiles.expand(self.num_horizons, -1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(hidden_states).float().unflatten(-1, (self.num_horizons, -1))  # (B, T, H, Q)
        middle, steps = outputs[..., :1], F.softplus(outputs[..., 1:])
        offsets = F.pad(steps.cumsum(-1), (1, 0))
        return middle + offsets - offsets[..., self.middle, None]


def pinball_loss(targets: torch.Tensor, quantiles: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """
    Pinball loss (Koenker and Bassett, 1978), averaged over the levels.

    Args:
        targets (`torch.Tensor` of shape `(...)`): realised values.
        quantiles (`torch.Tensor` of shape `(..., Q)`): predicted quantiles.
        levels (`torch.Tensor` of shape `(Q,)`): their levels.
    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    errors = targets.unsqueeze(-1) - quantiles
    return torch.maximum(levels * errors, (levels - 1) * errors).mean(-1)


@auto_docstring(
    custom_intro="""
    The SpaceExploreAI model with a regression head: mean and quantiles of the log-return over each horizon, at every
    time step.
    """
)
class SpaceExploreForRegression(SpaceExplorePreTrainedModel):
    ignore_index = -100  # as a label: not supervised. Trainer counts the others as `num_items_in_batch`.

    def __init__(self, config: SpaceExploreConfig):
        super().__init__(config)
        self.model = SpaceExploreModel(config)
        self.mean_head = nn.Linear(config.hidden_size, len(config.horizons))
        self.quantile_head = SpaceExploreQuantileHead(config)

        # Initialize weights and apply final processing
        self.post_init()

    @torch.no_grad()
    def start_from_marginal(self, mean: torch.Tensor, quantiles: torch.Tensor):
        """
        Sets the biases of the heads so that training starts from the marginal distribution of its targets, which is
        the EWMA-volatility baseline, instead of having to find it.

        Args:
            mean (`torch.Tensor` of shape `(num_horizons,)`): of the labels in units of `scale * sqrt(horizon)`.
            quantiles (`torch.Tensor` of shape `(num_horizons, num_quantiles)`): of the same.
        """
        self.mean_head.bias.copy_(mean)
        self.quantile_head.bias.copy_(self.quantile_head.bias_for(quantiles))

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        past_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        scale: torch.FloatTensor | None = None,
        labels: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SpaceExploreForecastOutput:
        r"""
        past_values (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_features)`):
            Normalised features, oldest first. NaN stands for a missing value.
        scale (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Daily volatility known at each step; predictions are in its units, and multiplied by it when it is given.
        labels (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_horizons)`, *optional*):
            Realised cumulative log-returns from each step to each horizon; -100 is ignored. Needs `scale`.
        num_items_in_batch (`int`, *optional*):
            Labels in all micro-batches of the step, over which the loss is averaged; those of this one by default.

        Example:

        ```python
        >>> from transformers import AutoFeatureExtractor, AutoModelForTimeSeriesPrediction

        >>> extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
        >>> model = AutoModelForTimeSeriesPrediction.from_pretrained(folder, trust_remote_code=True)
        >>> outputs = model(**extractor(prices))
        >>> extractor.decode(outputs, prices, model.config)
        ```"""
        if output_router_logits is None:
            # The load-balancing loss needs them in training.
            output_router_logits = self.config.output_router_logits or (labels is not None and self.training)
        outputs: MoeModelOutputWithPast = self.model(
            past_values=past_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        mean = self.mean_head(outputs.last_hidden_state).float()  # (B, T, H)
        quantiles = self.quantile_head(outputs.last_hidden_state)  # (B, T, H, Q)

        aux_loss = self.load_balancing_loss(outputs, attention_mask) if output_router_logits else None
        loss = None
        if labels is not None:
            loss = self.forecast_loss(mean, quantiles, labels, self.step(scale), num_items_in_batch, aux_loss)
        if scale is not None:
            step = self.step(scale)
            mean, quantiles = mean * step, quantiles * step.unsqueeze(-1)

        return SpaceExploreForecastOutput(
            loss=loss,
            mean=mean,
            quantiles=quantiles,
            aux_loss=aux_loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def load_balancing_loss(
        self, outputs: MoeModelOutputWithPast, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Switch Transformer's (arXiv 2101.03961, equations 4 to 6), over unpadded steps."""
        if attention_mask is not None:
            # A batch that is all padding has no load: 0/0 in the library's function.
            attention_mask = attention_mask + (attention_mask.sum() == 0)
        return load_balancing_loss_func(
            outputs.router_logits, self.config.n_routed_experts, self.config.num_experts_per_tok, attention_mask
        )

    def step(self, scale: torch.Tensor | None) -> torch.Tensor:
        """Size of a typical move to each horizon, (B, T, H): volatility grows with the square root of time."""
        if scale is None:
            raise ValueError("labels need scale, the daily volatility known at each step; got scale=None")
        horizons = torch.tensor(self.config.horizons, device=scale.device, dtype=torch.float)
        return scale.float().unsqueeze(-1) * horizons.sqrt()

    def forecast_loss(
        self,
        mean: torch.Tensor,
        quantiles: torch.Tensor,
        labels: torch.Tensor,
        step: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
        aux_loss: torch.Tensor | None,
    ) -> torch.Tensor:
        """Squared error of the mean and pinball loss of the quantiles, both in units of `step`, over known labels."""
        known = labels != self.ignore_index
        targets = torch.where(known, labels / step, 0.0)  # (B, T, H)
        levels = torch.tensor(self.config.quantile_levels, device=mean.device)
        losses = self.config.mean_loss_weight * (mean - targets).square()
        losses = losses + self.config.quantile_loss_weight * pinball_loss(targets, quantiles, levels)
        count = known.sum()
        total = torch.where(known, losses, 0.0).sum()
        if aux_loss is not None:
            # Weighted by the labels it stands for, so that micro-batches add up to a mean, not to a sum.
            total = total + self.config.router_aux_loss_coef * aux_loss * count
        items = torch.as_tensor(count if num_items_in_batch is None else num_items_in_batch)
        return total / items.clamp(min=1)


__all__ = ["SpaceExploreForRegression", "SpaceExploreModel", "SpaceExplorePreTrainedModel"]
SpaceExploreModel.register_for_auto_class("AutoModel")
SpaceExploreForRegression.register_for_auto_class("AutoModelForTimeSeriesPrediction")
