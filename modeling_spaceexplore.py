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

# Shapes: B batch, T time steps, S tokens, F features, D hidden, N heads, E experts, K experts per token, H horizons,
# Q quantiles, V return tokens

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation, use_kernel_forward_from_hub
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput, MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, torch_compilable_check
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_spaceexplore import SpaceExploreConfig
from .front_end_spaceexplore import (
    SpaceExploreInputDyT,
    SpaceExploreMSCNN,
    SpaceExploreValueEmbedding,
    SpaceExploreWavelet,
    check_rows,
    check_values,
)
from .t2t_spaceexplore import IGNORE_INDEX, SpaceExploreT2T, SpaceExploreT2TDecoder, word_labels


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
        Computes the inverse frequencies of RoFormer (arXiv 2104.09864) over the rotary dimensions of a head.

        Returns:
            Tuple of (`torch.Tensor`, `float`), containing the inverse frequencies and the scaling of cos/sin, here 1.
        """
        dim = config.head_dim
        inv_freq = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
        return inv_freq, 1.0

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)  # (B, T, head_dim)
        cos = emb.cos() * self.attention_scaling
        sin = emb.sin() * self.attention_scaling
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


class SpaceExploreMLP(nn.Module):
    """SwiGLU network: of a dense layer, or of the shared experts side by side in one."""

    def __init__(self, config: SpaceExploreConfig, intermediate_size: int | None = None):
        super().__init__()
        intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
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
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):  # it would round the logits
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
        self.shared_experts = SpaceExploreMLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        _, top_k_weights, top_k_index = self.gate(hidden_states)
        tokens = hidden_states.view(-1, hidden_states.shape[-1])  # (B*T, D)
        routed = self.experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)
        return routed + self.shared_experts(hidden_states)


class SpaceExploreAttention(nn.Module):
    """Multi-head attention as Llama's; with fewer key and value heads grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: SpaceExploreConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, seq_length = hidden_states.shape[:-1]
        hidden_shape = (batch_size, seq_length, -1, self.head_dim)

        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)
        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx)

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


class SpaceExploreLatentCore(nn.Module):
    """What the library's attention functions ask of a module, where all heads share one latent as key and value."""

    def __init__(self, config: SpaceExploreConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = config.num_attention_heads
        self.is_causal = True


class SpaceExploreLatentAttention(nn.Module):
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
        self.scaling = yarn_apply_mscale(config.rope_parameters, self.qk_head_dim**-0.5)
        self.latent_core = SpaceExploreLatentCore(config, layer_idx)

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

    def can_absorb(self) -> bool:
        """Whether the weight of `kv_b_proj` is all it does: adapters, quantisation and offloading do more."""
        return type(self.kv_b_proj) is nn.Linear and self.kv_b_proj.weight.device.type != "meta"

    def attend_to_latents(
        self, attend: Callable, q_pass: torch.Tensor, q_rot: torch.Tensor, kv_nope: torch.Tensor, k_rot: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        `attend` without expanding the cache: the expansion of the keys is absorbed into the query and that of the
        values into the output, which leaves attention of all heads to one latent (DeepSeek-V2, section 2.1.2).
        """
        up = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_lora_rank)
        key_up, value_up = up.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        query_states = torch.cat((torch.matmul(q_pass, key_up), q_rot), dim=-1)  # (B, N, 1, kv_lora_rank + rotary)
        key_states = torch.cat((kv_nope, k_rot), dim=-1)
        attn_output, attn_weights = attend(self.latent_core, query_states, key_states, kv_nope)
        attn_output = torch.matmul(attn_output.transpose(1, 2), value_up.transpose(1, 2))
        return attn_output.transpose(1, 2), attn_weights

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
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
        if cache is not None:
            kv_nope, k_rot = cache.update(kv_nope, k_rot, self.layer_idx)

        attend = partial(
            ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward),
            attention_mask=attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **kwargs,
        )
        if cache is not None and seq_length == 1 and self.can_absorb():
            attn_output, attn_weights = self.attend_to_latents(attend, q_pass, q_rot, kv_nope, k_rot)
        else:
            query_states = torch.cat((q_pass, q_rot), dim=-1)  # (B, N, T, qk_head_dim)
            attn_output, attn_weights = attend(self, query_states, *self.expand_kv(kv_nope, k_rot))
        attn_output = attn_output.reshape(batch_size, seq_length, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


ATTENTION_CLASSES = {
    "mla": SpaceExploreLatentAttention,
    "gqa": SpaceExploreAttention,
    "mha": SpaceExploreAttention,
}


class SpaceExploreDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: SpaceExploreConfig, layer_idx: int):
        super().__init__()
        self.self_attn = ATTENTION_CLASSES[config.attention_type](config=config, layer_idx=layer_idx)
        # CODEPATH: every checkpoint, as DeepSeek-V3's: the first layer is dense; dense students have no other.
        if layer_idx >= config.first_k_dense_replace:
            self.mlp = SpaceExploreMoE(config)
        else:
            self.mlp = SpaceExploreMLP(config)
        self.input_layernorm = SpaceExploreRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = SpaceExploreRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
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
    _no_split_modules = ["SpaceExploreDecoderLayer", "SpaceExploreMSCNN", "SpaceExploreT2T"]
    _skip_keys_device_placement = ["cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": SpaceExploreDecoderLayer,
        "attentions": [SpaceExploreLatentAttention, SpaceExploreAttention],
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
        elif isinstance(module, SpaceExploreInputDyT):
            init.constant_(module.alpha, 0.5)
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SpaceExploreWavelet):
            init.copy_(module.scaling_filter, module.make_filter())
        elif isinstance(module, SpaceExploreT2T):
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, SpaceExploreT2TDecoder):
            init.normal_(module.mask_token, mean=0.0, std=std)
        elif isinstance(module, SpaceExploreQuantileHead):
            # Returns in units of their volatility are near a unit normal.
            quantiles = module.unit_normal_quantiles()
            init.copy_(module.bias, module.bias_for(torch.zeros(len(quantiles)), quantiles))

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).finish_loading()
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As the library's; but a pipeline whose code is not in the folder is not promised by its configuration."""
        pipelines = vars(self.config).get("custom_pipelines") or {}
        names = [one["impl"].rpartition(".")[0] for one in pipelines.values()]
        # "owner/name--file" is found in that repository.
        if all("--" in name or Path(save_directory, f"{name}.py").is_file() for name in names):
            return super().save_pretrained(save_directory, *args, **kwargs)
        del self.config.custom_pipelines
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.custom_pipelines = pipelines

    def finish_loading(self):
        """
        Forecasts do not train the time-to-text extractor. Said here and not in the constructor alone, because the
        library loads every weight as trainable, and makes the generation config anew.
        """
        if self.base_model.t2t is not None:
            self.base_model.t2t.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module | None:
        """The token embedding; None where there is none, since time steps are projected. FSDP asks every model."""
        return self.base_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        self.base_model.embed_tokens = value

    def describe(
        self, past_values: torch.Tensor, attention_mask: torch.Tensor | None = None, dates=None
    ) -> list[list[dict]]:
        """Words for the patches of each series, see `SpaceExploreT2T.describe`."""
        if self.base_model.t2t is None:
            raise ValueError(
                "this network has no time-to-text extractor, "
                f"got t2t_num_hidden_layers={self.config.t2t_num_hidden_layers}"
            )
        check_values(past_values, attention_mask, self.config.num_features)
        return self.base_model.t2t.describe(past_values, attention_mask, dates)

    def expert_load(
        self, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Share of the choices that each expert got, over unpadded steps; 1/E is balance.

        Args:
            router_logits (`tuple(torch.Tensor)`): as returned with `output_router_logits=True`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 for padded steps.
        Returns:
            `torch.Tensor` of shape `(num_moe_layers, n_routed_experts)`, rows of which sum to 1.
        """
        logits = torch.stack([layer.detach().float() for layer in router_logits])  # (L, B*T, E)
        chosen = torch.zeros_like(logits).scatter(-1, logits.topk(self.config.num_experts_per_tok).indices, 1.0)
        if attention_mask is not None:
            chosen = chosen * attention_mask.flatten().unsqueeze(-1)
        load = chosen.sum(dim=1)
        return load / load.sum(dim=-1, keepdim=True).clamp(min=1)

    def wants_router_logits(self, labels: torch.Tensor | None, output_router_logits: bool | None) -> bool:
        """The load-balancing loss needs them in training."""
        if output_router_logits is not None:
            return output_router_logits
        return self.config.output_router_logits or (labels is not None and self.training)

    def load_balancing_loss(self, outputs: ModelOutput, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """
        Switch Transformer's (arXiv 2101.03961, equations 4 to 6), over unpadded steps, as a mean over layers; `None`
        without a router.
        """
        if not outputs.router_logits:
            return None
        if attention_mask is not None:
            # That of a cache is longer; a 4D one, of a static cache, does not say which steps are padded: all count.
            steps = outputs.last_hidden_state.shape[1]
            attention_mask = attention_mask[:, -steps:] if attention_mask.ndim == 2 else None
        # Layer by layer: given all, the function counts an expert's choices in one sum over the layers, which is even
        # where each layer has favourites of its own.
        sizes = (self.config.n_routed_experts, self.config.num_experts_per_tok)
        losses = [load_balancing_loss_func((layer,), *sizes, attention_mask) for layer in outputs.router_logits]
        return torch.stack(losses).mean()

    def average_loss(
        self,
        total: torch.Tensor,
        count: torch.Tensor,
        outputs: ModelOutput,
        aux_loss: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """
        The mean over labels of a loss summed over `count` of them, and the two auxiliary losses.

        Those are weighted by the labels they stand for, so that micro-batches add up to a mean, not to a sum.
        """
        if aux_loss is not None:
            total = total + self.config.router_aux_loss_coef * aux_loss * count
        if outputs.feature_loss is not None:
            total = total + self.config.t2t_loss_weight * outputs.feature_loss * count
        items = torch.as_tensor(count if num_items_in_batch is None else num_items_in_batch, device=total.device)
        return total / items.clamp(min=1)


@auto_docstring(custom_intro="Hidden states of the backbone, and what its training needs of the front end.")
@dataclass
class SpaceExploreModelOutput(MoeModelOutputWithPast):
    r"""
    feature_loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned in training when `t2t_loss_weight` is set):
        Distance between the features of the multi-scale CNN and those of the time-to-text extractor.
    """

    feature_loss: torch.FloatTensor | None = None


@auto_docstring(
    custom_intro="""
    The SpaceExploreAI backbone. It reads time steps, or tokens among which `<ts>` placeholders stand for time steps.
    """
)
class SpaceExploreModel(SpaceExplorePreTrainedModel):
    def __init__(self, config: SpaceExploreConfig):
        super().__init__(config)
        self.value_embedding = SpaceExploreValueEmbedding(config)
        self.mscnn = SpaceExploreMSCNN(config)
        # CODEPATH: the tiny recipe has no extractor.
        self.t2t = SpaceExploreT2T(config) if config.t2t_num_hidden_layers else None
        # CODEPATH: checkpoints that learn from a trained extractor.
        self.feature_proj = nn.Linear(config.hidden_size, config.t2t_hidden_size) if config.t2t_loss_weight else None
        # CODEPATH: causal language models; a parameter that is never used would stop distributed training.
        if config.vocab_size is None:
            self.embed_tokens = None
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [SpaceExploreDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = SpaceExploreRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = SpaceExploreRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.finish_loading()

        # Initialize weights and apply final processing
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        past_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        past_values_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SpaceExploreModelOutput:
        r"""
        past_values (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_features)`, *optional*):
            Normalised features, oldest first. NaN stands for a missing value. With a `cache` the whole history is
            given again, as is its `attention_mask`: the multi-scale CNN looks back, and only new steps are decoded.
        past_values_mask (`torch.Tensor` of shape `(batch_size, num_steps)`, *optional*):
            With `input_ids`: 0 for padded steps of `past_values`. Each row has a `<ts>` token for each other step.
        """
        past_seen = cache.get_seq_length() if cache is not None else 0
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if input_ids is None and inputs_embeds is None:
            past_values_mask = attention_mask
            hidden_states = values = self.embed_values(past_values, attention_mask, past_seen)
        else:
            values = None if past_values is None else self.embed_values(past_values, past_values_mask)
            hidden_states = self.fill_placeholders(input_ids, inputs_embeds, values, past_values_mask)  # (B, S, D)
        feature_loss = self.feature_loss(values, past_values, past_values_mask)
        self.check_length(hidden_states.shape[1] + past_seen, attention_mask)
        if position_ids is None:
            position_ids = self.make_position_ids(hidden_states, attention_mask, past_seen)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for decoder_layer in self.layers:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                cache=cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return SpaceExploreModelOutput(
            last_hidden_state=self.norm(hidden_states), cache=cache, feature_loss=feature_loss
        )

    def embed_values(
        self, past_values: torch.Tensor | None, mask: torch.Tensor | None, past_seen: int | torch.Tensor = 0
    ) -> torch.Tensor:
        """Front end: time steps (B, T, F) to what the decoder reads of those not in the cache, (B, T - seen, D)."""
        check_values(past_values, mask, self.config.num_features)
        if past_seen >= past_values.shape[1]:
            raise ValueError(
                f"past_values must be the whole history, the {past_seen} steps in the cache and newer ones; "
                f"got {past_values.shape[1]} steps"
            )
        # A compiled graph, and a static cache, whose count is a tensor, want shapes that do not depend on the mask.
        varies = isinstance(past_seen, int) and past_seen > 0 and not torch.compiler.is_compiling()
        first = self.mscnn.first_needed(mask, past_seen) if varies else 0
        seen = None if mask is None else mask[:, first:]
        return self.mscnn(self.value_embedding(past_values[:, first:], seen), seen)[:, past_seen - first :]

    def feature_loss(
        self, values: torch.Tensor | None, past_values: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        if self.feature_proj is None or values is None or not self.training:
            return None
        if values.shape[1] < past_values.shape[1]:  # new steps alone
            return None
        return self.t2t.feature_loss(values, past_values, mask, self.feature_proj)

    def fill_placeholders(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        values: torch.Tensor | None,
        values_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embeds tokens, (B, S, D), and puts the unpadded `values` (B, T, D) in the places of the `<ts>` tokens."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("tokens are either input_ids or inputs_embeds, got both")
        if input_ids is None:
            if values is not None:
                raise ValueError("past_values take the places of the <ts> tokens in input_ids, got inputs_embeds")
            return inputs_embeds
        if self.embed_tokens is None:
            raise ValueError(f"input_ids need a token embedding, got vocab_size={self.config.vocab_size}")
        placeholders = input_ids == self.config.ts_token_id
        slots = placeholders.sum(dim=-1)
        inputs_embeds = self.embed_tokens(input_ids)
        if values is None:
            torch_compilable_check(
                ~placeholders.any(), lambda: f"{slots.max()} <ts> tokens stand for past_values, got past_values=None"
            )
            return inputs_embeds
        if len(values) != len(input_ids):
            raise ValueError(
                f"past_values need a row for each of the {len(input_ids)} of input_ids, got {len(values)}"
            )
        if values_mask is None:
            values_mask = torch.ones_like(values[..., 0], dtype=torch.long)
        steps = values_mask.bool().sum(dim=-1)
        torch_compilable_check(
            (slots == steps).all(),
            lambda: f"past_values need a <ts> token for each step, {steps.tolist()} a row; got {slots.tolist()}",
        )
        # The k-th placeholder takes the k-th unpadded step; a sort by "is padded" that keeps the order finds it.
        order = values_mask.bool().logical_not().int().argsort(dim=-1, stable=True)
        index = order.gather(1, (placeholders.cumsum(dim=-1) - 1).clamp(min=0, max=order.shape[1] - 1))
        filled = values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
        return torch.where(placeholders.unsqueeze(-1), filled.to(inputs_embeds.dtype), inputs_embeds)

    def check_length(self, length: int | torch.Tensor, attention_mask: torch.Tensor | None):
        """`length` counts the steps and tokens in the cache too; a static cache has it as a tensor."""
        longest = self.config.max_position_embeddings
        torch_compilable_check(
            length <= longest,
            lambda: f"a context of {length} steps is longer than max_position_embeddings={longest}",
        )
        if attention_mask is not None and attention_mask.ndim == 2:
            width = attention_mask.shape[1]
            torch_compilable_check(
                length == width, lambda: f"attention_mask must cover {length} steps and tokens, got {width}"
            )
            check_rows(attention_mask)

    @staticmethod
    def make_position_ids(
        hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, past_seen: int
    ) -> torch.Tensor:
        """Counts 0..n-1 from the first unpadded step, never calendar days: the library reads gaps as packing."""
        batch_size, seq_length = hidden_states.shape[:2]
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq_length:]
        positions = torch.arange(seq_length, device=hidden_states.device) + past_seen
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
        Weighted sum of squared error, pinball loss and, in training, the auxiliary losses.
    mean (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_horizons)`):
        Mean cumulative log-return to each horizon; in units of `scale * sqrt(horizon)` when no `scale` is given.
    quantiles (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_horizons, num_quantiles)`):
        Quantiles of the same, never crossing.
    aux_loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned with router logits):
        Load-balancing loss over unpadded steps.
    cache (`Cache`, *optional*, returned when `use_cache=True`):
        Latents of multi-head latent attention, or keys and values.
    router_logits (`tuple(torch.FloatTensor)`, *optional*, returned when `output_router_logits=True`):
        One tensor of shape `(batch_size * sequence_length, n_routed_experts)` per layer with experts.
    """

    loss: torch.FloatTensor | None = None
    mean: torch.FloatTensor | None = None
    quantiles: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


@auto_docstring(custom_intro="What the training of the time-to-text extractor looks at.")
@dataclass
class SpaceExploreTimeToTextOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`):
        Mean squared error of the hidden steps, plus the cross-entropy of the words of the visible patches where
        `returns` are given.
    reconstruction (`torch.FloatTensor` of shape `(batch_size, num_patches, patch_length, num_features)`):
        Values of every patch, decoded from the visible ones.
    word_logits (`torch.FloatTensor` of shape `(batch_size, num_patches, num_words)`):
        Words of every patch; those of hidden patches mean nothing.
    visible (`torch.BoolTensor` of shape `(batch_size, num_patches)`):
        Patches that the encoder saw.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    word_logits: torch.FloatTensor | None = None
    visible: torch.BoolTensor | None = None


class SpaceExploreQuantileHead(nn.Linear):
    """
    Quantiles that cannot cross: positive steps outwards from a centre.

    The input stretches one shape for each horizon: it says how far returns may go, and not where to, which is left to
    the mean. Quantiles that may lean learn by heart where past days went (docs/LOG.md). Centre and shape are biases.
    With `config.quantile_form` "free", as for targets with a direction, the input moves the centre and each step.

    A linear layer, not a module around one: the library initialises only modules with parameters of their own.
    """

    def __init__(self, config: SpaceExploreConfig):
        levels, horizons, is_free = config.quantile_levels, len(config.horizons), config.quantile_form == "free"
        below, above = sum(level < 0.5 for level in levels), sum(level > 0.5 for level in levels)
        numbers = 1 + below + above  # the centre, and a step for each level on either side
        super().__init__(config.hidden_size, horizons * (numbers if is_free else 1), bias=False)
        self.bias = nn.Parameter(torch.empty(horizons * numbers))
        self.below, self.above, self.levels = below, above, levels
        self.num_horizons, self.is_free = horizons, is_free

    def bias_for(self, centre: torch.Tensor, quantiles: torch.Tensor) -> torch.Tensor:
        """Bias at which the head without weights gives these (H, Q) quantiles around an (H,) centre, which is the
        median itself where that is one of them."""
        below, median, above = quantiles.tensor_split((self.below, quantiles.shape[-1] - self.above), dim=-1)
        centre = torch.cat((median, centre.unsqueeze(-1)), dim=-1)[:, :1]
        down = torch.cat((below, centre), dim=-1).diff(dim=-1).flip(-1)
        up = torch.cat((centre, above), dim=-1).diff(dim=-1)
        steps = torch.cat((down, up), dim=-1).clamp(min=1e-3).expm1().log()  # inverse of softplus
        return torch.cat((centre, steps), dim=-1).flatten()

    def unit_normal_quantiles(self) -> torch.Tensor:
        quantiles = torch.tensor([NormalDist().inv_cdf(level) for level in self.levels])
        return quantiles.expand(self.num_horizons, -1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        outputs = F.linear(hidden_states, self.weight).float().unflatten(-1, (self.num_horizons, -1))
        bias = self.bias.float().view(self.num_horizons, -1)  # (H, 1+Q), or (H, Q) with a median
        # Without weights the stretch is 1; an exponential would be infinite where a softplus is large.
        shape, stretch = (bias + outputs, 1.0) if self.is_free else (bias, F.softplus(outputs + math.log(math.e - 1)))
        centre, down, up = shape.split((1, self.below, self.above), dim=-1)
        down, up = F.softplus(down).cumsum(-1).flip(-1), F.softplus(up).cumsum(-1)
        median = torch.zeros_like(centre[..., : len(self.levels) - self.below - self.above])
        return centre + stretch * torch.cat((-down, median, up), dim=-1)  # (B, T, H, Q)


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


def typical_move(scale: torch.Tensor | None, labels: torch.Tensor | None, horizons: list[int]) -> torch.Tensor | None:
    """
    Size of a typical move to each horizon: volatility grows with the square root of time.

    Args:
        scale (`torch.Tensor` of shape `(B, T)`, *optional*): daily volatility known at each step.
        labels (`torch.Tensor` of shape `(B, T, H)`, *optional*): what is to be measured in it.
        horizons (`list[int]`): trading days ahead.
    Returns:
        `torch.Tensor` of shape `(B, T, H)`, or `None` without a scale.
    """
    if labels is not None and scale is None:
        raise ValueError("labels need scale, the daily volatility known at each step; got scale=None")
    if labels is not None and labels.shape != (*scale.shape, len(horizons)):
        raise ValueError(
            f"labels must be (batch, time, {len(horizons)} horizons {list(horizons)}) with the (batch, time) "
            f"{tuple(scale.shape)} of scale, got {tuple(labels.shape)}"
        )
    if scale is None:
        return None
    days = torch.tensor(horizons, device=scale.device, dtype=torch.float)
    return scale.float().unsqueeze(-1) * days.sqrt()


@auto_docstring(
    custom_intro="""
    The SpaceExploreAI model with a regression head: mean and quantiles of the log-return over each horizon, at every
    time step.
    """
)
class SpaceExploreForRegression(SpaceExplorePreTrainedModel):
    _tp_plan = {"mean_head": "colwise_gather_output"}  # quantiles are sums over levels: that head stays whole
    _pp_plan = {"mean_head": (["hidden_states"], ["mean"]), "quantile_head": (["hidden_states"], ["quantiles"])}

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
        self.quantile_head.bias.copy_(self.quantile_head.bias_for(mean, quantiles))

    @can_return_tuple
    @auto_docstring
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        past_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        scale: torch.FloatTensor | None = None,
        labels: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
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
        step = typical_move(scale, labels, self.config.horizons)
        output_router_logits = self.wants_router_logits(labels, output_router_logits)
        outputs: SpaceExploreModelOutput = self.model(
            past_values=past_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        aux_loss = self.load_balancing_loss(outputs, attention_mask) if output_router_logits else None
        mean = self.mean_head(outputs.last_hidden_state).float()  # (B, T, H)
        quantiles = self.quantile_head(outputs.last_hidden_state)  # (B, T, H, Q)

        loss = None
        if labels is not None:
            total, count = self.forecast_loss(mean, quantiles, labels, step)
            loss = self.average_loss(total, count, outputs, aux_loss, num_items_in_batch)
        if step is not None:
            step = step[:, -mean.shape[1] :]  # with a cache only new steps are predicted
            mean, quantiles = mean * step, quantiles * step.unsqueeze(-1)

        return SpaceExploreForecastOutput(
            loss=loss,
            mean=mean,
            quantiles=quantiles,
            aux_loss=aux_loss,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def forecast_loss(
        self, mean: torch.Tensor, quantiles: torch.Tensor, labels: torch.Tensor, step: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Squared error of the mean and pinball loss of the quantiles, both in units of `step`, summed over known labels,
        and how many of those there are.
        """
        known = labels != IGNORE_INDEX
        targets = torch.where(known, labels / step, 0.0)  # (B, T, H)
        levels = torch.tensor(self.config.quantile_levels, device=mean.device)
        losses = self.config.mean_loss_weight * (mean - targets).square()
        losses = losses + self.config.quantile_loss_weight * pinball_loss(targets, quantiles, levels)
        return torch.where(known, losses, 0.0).sum(), known.sum()


@auto_docstring(
    custom_intro="""
    The SpaceExploreAI model with a classification head: whether the price goes down, stays or goes up over each
    horizon, at every time step.
    """
)
class SpaceExploreForClassification(SpaceExplorePreTrainedModel):
    _tp_plan = {"score": "colwise_gather_output"}
    _pp_plan = {"score": (["hidden_states"], ["logits"])}

    def __init__(self, config: SpaceExploreConfig):
        super().__init__(config)
        self.model = SpaceExploreModel(config)
        self.score = nn.Linear(config.hidden_size, len(config.horizons) * config.num_labels)

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    @auto_docstring
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        past_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        scale: torch.FloatTensor | None = None,
        labels: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        r"""
        past_values (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_features)`):
            Normalised features, oldest first. NaN stands for a missing value.
        scale (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Daily volatility known at each step; the class "flat" is `flat_band` of its typical move wide to each side.
        labels (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_horizons)`, *optional*):
            Realised cumulative log-returns from each step to each horizon, as for the regression; -100 is ignored.
        num_items_in_batch (`int`, *optional*):
            Labels in all micro-batches of the step, over which the loss is averaged; those of this one by default.
        """
        step = typical_move(scale, labels, self.config.horizons)
        output_router_logits = self.wants_router_logits(labels, output_router_logits)
        outputs: SpaceExploreModelOutput = self.model(
            past_values=past_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        aux_loss = self.load_balancing_loss(outputs, attention_mask) if output_router_logits else None
        logits = self.score(outputs.last_hidden_state).float()
        logits = logits.unflatten(-1, (len(self.config.horizons), self.config.num_labels))  # (B, T, H, 3)

        loss = None
        if labels is not None:
            directions = self.directions(labels, step)
            total = F.cross_entropy(logits.flatten(0, 2), directions.flatten(), reduction="sum")
            count = (directions != IGNORE_INDEX).sum()
            loss = self.average_loss(total, count, outputs, aux_loss, num_items_in_batch)

        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            aux_loss=aux_loss,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def directions(self, labels: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Classes of log-returns, (B, T, H): 0 below minus `flat_band` of `step`, 2 above it, 1 between, else -100."""
        band = self.config.flat_band * step
        classes = 1 + (labels > band).long() - (labels < -band).long()
        return torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, classes)


@auto_docstring(
    custom_intro="""
    The SpaceExploreAI model as a causal language model of daily returns: after the `<ts>` placeholders of the numeric
    context, each token is the bin of a day's log-return in units of the volatility known at the forecast origin.
    """
)
class SpaceExploreForCausalLM(SpaceExplorePreTrainedModel, GenerationMixin):
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: SpaceExploreConfig):
        super().__init__(config)
        # CODEPATH: checkpoints of the other heads have no vocabulary; theirs becomes one by setting its size.
        if config.vocab_size is None:
            raise ValueError("a causal language model needs a vocabulary, got vocab_size=None")
        self.model = SpaceExploreModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        # Initialize weights and apply final processing
        self.post_init()
        self.finish_loading()

    def finish_loading(self):
        super().finish_loading()
        if self.generation_config.suppress_tokens is None:
            # A generated placeholder would ask for a time step that there is not.
            self.generation_config.suppress_tokens = [self.config.ts_token_id]
        if self.generation_config.top_k is None:
            # A path is a sample, the likeliest one never moves; and the library's 50 would cut the tails off.
            self.generation_config.update(do_sample=True, top_k=0)

    @can_return_tuple
    @auto_docstring
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_values: torch.FloatTensor | None = None,
        past_values_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        r"""
        past_values (`torch.FloatTensor` of shape `(batch_size, num_steps, num_features)`, *optional*):
            Normalised features, oldest first, which take the places of the `<ts>` tokens.
        past_values_mask (`torch.Tensor` of shape `(batch_size, num_steps)`, *optional*):
            0 for padded steps of `past_values`. Each row has a `<ts>` token for each other step.
        num_items_in_batch (`int`, *optional*):
            Labels in all micro-batches of the step, over which the loss is averaged; those of this one by default.

        Example:

        ```python
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        >>> tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        >>> prompt = tokenizer(tokenizer.prompt(num_steps=64), return_tensors="pt")
        >>> days = {"min_new_tokens": 10, "max_new_tokens": 10, "num_return_sequences": 100}
        >>> days["suppress_tokens"] = tokenizer.suppress_tokens
        >>> paths = model.generate(**prompt, past_values=past_values, **days)
        ```"""
        output_router_logits = self.wants_router_logits(labels, output_router_logits)
        outputs: SpaceExploreModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_values=past_values,
            past_values_mask=past_values_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))  # (B, S, V)
        aux_loss = self.load_balancing_loss(outputs, attention_mask) if output_router_logits else None
        loss = None
        if labels is not None:
            # A sum, because the auxiliary losses are averaged over the same items.
            total = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=1, **kwargs)
            targets = kwargs.get("shift_labels", labels[:, 1:])  # given where the sequence is split over devices
            count = (targets != IGNORE_INDEX).sum()
            loss = self.average_loss(total, count, outputs, aux_loss, num_items_in_batch)

        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def prepare_inputs_for_generation(self, input_ids, cache=None, inputs_embeds=None, **kwargs):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, cache=cache, inputs_embeds=inputs_embeds, **kwargs
        )
        if cache is not None and cache.get_seq_length() > 0:
            # In the cache by now, behind the placeholders.
            model_inputs["past_values"] = model_inputs["past_values_mask"] = None
        return model_inputs


@auto_docstring(
    custom_intro="""
    Training of the time-to-text extractor in the backbone: it reconstructs hidden patches and names the visible ones.
    The other heads load its checkpoint, learn from it when `t2t_loss_weight` is set, and `describe` with it.
    """
)
class SpaceExploreForTimeToText(SpaceExplorePreTrainedModel):
    accepts_loss_kwargs = False  # a mean over each batch: Trainer averages those of micro-batches
    supports_gradient_checkpointing = False  # the layers of the backbone do not run

    def __init__(self, config: SpaceExploreConfig):
        super().__init__(config)
        # CODEPATH: the tiny recipe has no extractor.
        if not config.t2t_num_hidden_layers:
            raise ValueError("there is no time-to-text extractor to train, got t2t_num_hidden_layers=0")
        self.model = SpaceExploreModel(config)
        self.decoder = SpaceExploreT2TDecoder(config)
        self.finish_loading()

        # Initialize weights and apply final processing
        self.post_init()

    def finish_loading(self):
        """The extractor and its decoder alone are trained."""
        self.model.requires_grad_(False)
        self.model.t2t.requires_grad_(True)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        past_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        returns: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SpaceExploreTimeToTextOutput:
        r"""
        past_values (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_features)`):
            Normalised features, oldest first. NaN stands for a missing value, and is reconstructed as zero.
        returns (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Daily log-returns in units of the volatility known the day before, NaN where unknown; the words follow.
        """
        check_values(past_values, attention_mask, self.config.num_features)
        t2t = self.model.t2t
        patches, real = t2t.cut(past_values, attention_mask)
        existing = real.any(dim=-1)
        visible = self.decoder.choose_visible(existing)
        features = t2t.encode(patches, visible)  # (B, P, E)
        reconstruction = self.decoder(features, visible, existing)  # (B, P, L, F)
        word_logits = t2t.name(features)

        hidden = self.decoder.hidden_steps(real, visible, t2t.stride)
        errors = (reconstruction - patches).float().square().mean(dim=-1)
        loss = torch.where(hidden, errors, 0.0).sum() / hidden.sum().clamp(min=1)
        if returns is not None:
            words = word_labels(returns, attention_mask, t2t.length, t2t.stride)
            words = torch.where(visible, words, IGNORE_INDEX).flatten()
            named = (words != IGNORE_INDEX).sum().clamp(min=1)
            loss = loss + F.cross_entropy(word_logits.float().flatten(0, 1), words, reduction="sum") / named
        if self.training:
            t2t.num_batches_tracked.add_(1)
        return SpaceExploreTimeToTextOutput(
            loss=loss, reconstruction=reconstruction, word_logits=word_logits, visible=visible
        )


__all__ = [
    "SpaceExploreForCausalLM",
    "SpaceExploreForClassification",
    "SpaceExploreForRegression",
    "SpaceExploreForTimeToText",
    "SpaceExploreModel",
    "SpaceExplorePreTrainedModel",
]
SpaceExploreModel.register_for_auto_class("AutoModel")
SpaceExploreForCausalLM.register_for_auto_class("AutoModelForCausalLM")
SpaceExploreForClassification.register_for_auto_class("AutoModelForSequenceClassification")
SpaceExploreForRegression.register_for_auto_class("AutoModelForTimeSeriesPrediction")
SpaceExploreForTimeToText.register_for_auto_class("AutoModelForPreTraining")
