# Copyright 2026 The SpaceExploreAI contributors. Licensed under the MIT License.
"""What stands before the decoder: input norm, value embedding and the multi-scale CNN with its wavelet transform."""

# Shapes: B batch, T time steps, F features, D hidden, C channels, R branches

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.utils import torch_compilable_check

from .configuration_spaceexplore import SpaceExploreConfig


def check_values(past_values: torch.Tensor | None, mask: torch.Tensor | None, num_features: int):
    """Raises a ValueError unless past_values are (B, T, F) and mask, if any, is (B, T) with an unpadded step a row."""
    if past_values is None:
        raise ValueError("the network needs past_values, or input_ids or inputs_embeds; got none of them")
    if past_values.ndim != 3 or past_values.shape[-1] != num_features or past_values.shape[1] == 0:
        raise ValueError(
            f"past_values must be (batch, time, {num_features} features) with a step at least, "
            f"got {tuple(past_values.shape)}"
        )
    if mask is None:
        return
    if mask.shape != past_values.shape[:2]:
        raise ValueError(
            f"the mask must be (batch, time) as past_values, {tuple(past_values.shape[:2])}, got {tuple(mask.shape)}"
        )
    check_rows(mask)


def check_rows(mask: torch.Tensor):
    """Raises a ValueError unless each row of a (B, T) mask has an unpadded step."""
    real = mask.bool().any(dim=-1)
    torch_compilable_check(
        real.all(), lambda: f"row {real.int().argmin()} of the batch is masked as a whole: it has no step to read"
    )


class SpaceExploreInputDyT(nn.Module):
    """Dynamic Tanh (arXiv 2503.10622, equation 2) with one slope per feature."""

    def __init__(self, num_features: int, eps: float):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((num_features,), 0.5))
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.tanh(self.alpha * values) + self.bias


class SpaceExploreInputRMSNorm(nn.Module):
    """Divides the features of a step by their root mean square, over those that are known."""

    def __init__(self, num_features: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.variance_epsilon = eps

    def forward(self, values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        variance = values.square().sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)
        return self.weight * (values * torch.rsqrt(variance + self.variance_epsilon))


class SpaceExploreInputBatchNorm(nn.BatchNorm1d):
    """Batch normalisation (arXiv 1502.03167) whose statistics leave out padded steps and missing values."""

    def __init__(self, num_features: int, eps: float):
        super().__init__(num_features, eps=eps)

    def forward(self, values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        mean, variance = self.running_mean, self.running_var
        if self.training:
            count = known.sum(dim=(0, 1))  # (F,)
            mean = values.sum(dim=(0, 1)) / count.clamp(min=1)
            variance = torch.where(known, (values - mean).square(), 0.0).sum(dim=(0, 1)) / count.clamp(min=1)
            self.track(mean.detach(), variance.detach(), count)
        return (values - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias

    def track(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor):
        """Running statistics as torch keeps them; what is nowhere known teaches nothing, one value no variance."""
        unbiased = variance * count / (count - 1).clamp(min=1)
        for running, new, least in ((self.running_mean, mean, 1), (self.running_var, unbiased, 2)):
            momentum = torch.where(count >= least, self.momentum, 0.0)
            running.lerp_(new.to(running.dtype), momentum.to(running.dtype))
        self.num_batches_tracked.add_(1)


INPUT_NORMS = {"dyt": SpaceExploreInputDyT, "batch": SpaceExploreInputBatchNorm, "rms": SpaceExploreInputRMSNorm}


class SpaceExploreValueEmbedding(nn.Module):
    """Normalises and embeds each time step; a missing value (not a finite number) is zero plus its own indicator."""

    def __init__(self, config: SpaceExploreConfig):
        super().__init__()
        self.input_noise = config.input_noise
        self.input_norm = INPUT_NORMS[config.input_norm](config.num_features, config.rms_norm_eps)
        self.value_proj = nn.Linear(config.num_features, config.hidden_size)
        self.missing_proj = nn.Linear(config.num_features, config.hidden_size, bias=False)

    def forward(self, past_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        known = past_values.isfinite()
        if attention_mask is not None:
            known = known & attention_mask.bool().unsqueeze(-1)
        values = torch.where(known, past_values, 0.0).float()
        if self.training and self.input_noise:
            values = torch.where(known, values + self.input_noise * torch.randn_like(values), 0.0)
        # The dtype of the norm's weight, not of the projection's, which may be quantised.
        values = torch.where(known, self.input_norm(values, known), 0.0).to(self.input_norm.weight.dtype)
        return self.value_proj(values) + self.missing_proj((~known).to(values.dtype))  # (B, T, D)


# Daubechies (1988). Newest step first, the order of PyWavelets' `rec_lo`: so a Daubechies filter has its least delay,
# for db4 1.0 steps a level. The order of `dec_lo`, of the textbook's analysis bank, has 6.0. (sym4, nearly symmetric,
# has 4.0 in this order and 3.0 in the other.)
SCALING_FILTERS = {
    "haar": (0.7071067811865476, 0.7071067811865476),
    "db2": (0.48296291314453416, 0.8365163037378079, 0.2241438680420134, -0.12940952255126037),
    "db4": (
        0.2303778133088965,
        0.7148465705529157,
        0.6308807679298589,
        -0.027983769416859854,
        -0.18703481171909309,
        0.030841381835560764,
        0.0328830116668852,
        -0.010597401785069032,
    ),
    "sym4": (
        0.0322231006040427,
        -0.012603967262037833,
        -0.09921954357684722,
        0.29785779560527736,
        0.8037387518059161,
        0.49761866763201545,
        -0.02963552764599851,
        -0.07576571478927333,
    ),
}


def last_real_step(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """
    For every step the newest unpadded one up to it, and the first unpadded one before there is any.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 for padded steps.
    Returns:
        `torch.LongTensor` of shape `(B, T)`, or `None` where nothing is padded.
    """
    if attention_mask is None:
        return None
    real = attention_mask.bool()
    steps = torch.arange(real.shape[-1], device=real.device)
    unpadded_first = torch.where(real, steps, steps + real.shape[-1]).argsort(dim=-1)
    return unpadded_first.gather(-1, (real.cumsum(dim=-1) - 1).clamp(min=0))


def hold(values: torch.Tensor, steps: torch.Tensor | None) -> torch.Tensor:
    """Holds (B, C, T) values over padded steps, so that the left edge looks the same with and without padding."""
    return values if steps is None else values.gather(-1, steps.unsqueeze(1).expand_as(values))


def pad_left(values: torch.Tensor, steps: int) -> torch.Tensor:
    """Repeats the first step to the left: zeros would be a jump in level that the series never made."""
    return F.pad(values, (steps, 0), mode="replicate")


class SpaceExploreWavelet(nn.Module):
    r"""
    Undecimated wavelet transform, "à trous" (Holschneider et al., 1989), that never looks ahead.

    With the scaling filter \\(h\\) scaled to sum 1, \\(a_j[t] = \sum_k h[k]\, a_{j-1}[t - 2^{j-1} k]\\) and
    \\(d_j = a_{j-1} - a_j\\), so that the inverse is the sum \\(a_J + \sum_j d_j\\): exact and without delay.
    PyWavelets' `swt(..., norm=True)` of time reversed has the same approximations, up to its circular shift.
    """

    def __init__(self, wavelet: str, levels: int):
        super().__init__()
        self.wavelet = wavelet
        self.levels = levels
        # Lost when a checkpoint is loaded: `_init_weights` of the model fills it again.
        self.scaling_filter = nn.Buffer(self.make_filter(), persistent=False)

    @property
    def reach(self) -> int:
        """Steps back that the last approximation sees."""
        return (len(self.scaling_filter) - 1) * (2**self.levels - 1)

    def make_filter(self) -> torch.Tensor:
        return torch.tensor(SCALING_FILTERS[self.wavelet]) / math.sqrt(2)

    def smooth(self, values: torch.Tensor, spacing: int) -> torch.Tensor:
        """One approximation from the one before, (B, C, T); `spacing` steps lie between the taps."""
        channels = values.shape[1]
        taps = self.scaling_filter.to(values.dtype).flip(0).expand(channels, 1, -1)  # conv1d correlates
        padded = pad_left(values, spacing * (taps.shape[-1] - 1))
        return F.conv1d(padded, taps, dilation=spacing, groups=channels)

    def forward(
        self, values: torch.Tensor, steps: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Args:
            values (`torch.Tensor` of shape `(B, C, T)`): series, held over padded steps.
            steps (`torch.LongTensor` of shape `(B, T)`, *optional*): see `last_real_step`.
        Returns:
            The approximation of the last level and the details of all levels, the finest first, each (B, C, T).
        """
        approximation, details = values, []
        for level in range(self.levels):
            smoother = hold(self.smooth(approximation, 2**level), steps)
            details.append(approximation - smoother)
            approximation = smoother
        return approximation, details

    @staticmethod
    def inverse(approximation: torch.Tensor, details: list[torch.Tensor]) -> torch.Tensor:
        return approximation + sum(details)

    def split(self, values: torch.Tensor, steps: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Long-term and short-term part: the inverse without the details and without the approximation (eq. 3, 4)."""
        approximation, _ = self(values, steps)
        return approximation, values - approximation


class SpaceExploreMSCNNBlock(nn.Module):
    """Branches of growing receptive field, parted into long and short term and put together again, plus a residual."""

    def __init__(self, config: SpaceExploreConfig):
        super().__init__()
        width = config.mscnn_hidden_size or config.hidden_size
        self.num_branches = config.mscnn_num_branches
        self.kernel_size = config.mscnn_kernel_size
        channels = width // self.num_branches
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.in_proj = nn.Linear(config.hidden_size, width)
        self.convs = nn.ModuleList([nn.Conv1d(channels, channels, self.kernel_size) for _ in range(self.num_branches)])
        self.act_fn = ACT2FN[config.hidden_act]
        self.wavelet = SpaceExploreWavelet(config.wavelet, config.wavelet_levels)
        self.out_proj = nn.Linear(width, config.hidden_size)

    @property
    def reach(self) -> int:
        """Steps back that the last branch sees."""
        return self.num_branches * (self.kernel_size - 1) + self.wavelet.reach

    def extract(self, branches: tuple[torch.Tensor, ...], steps: torch.Tensor | None) -> torch.Tensor:
        """Every branch convolves its own channels plus what the one before it made of its own (eq. 1, 2)."""
        features, previous = [], 0
        for branch, conv in zip(branches, self.convs, strict=True):
            convolved = conv(pad_left(hold(branch + previous, steps), self.kernel_size - 1))
            previous = hold(self.act_fn(convolved), steps)
            features.append(previous)
        return torch.cat(features, dim=1)  # (B, C, T)

    def assemble(self, long_term: torch.Tensor, short_term: torch.Tensor) -> torch.Tensor:
        """Adds short terms from the most local branch on and long terms from the most global one on (eq. 5, 6)."""
        long_term = long_term.unflatten(1, (self.num_branches, -1))  # (B, R, C/R, T)
        short_term = short_term.unflatten(1, (self.num_branches, -1))
        globally = long_term.flip(1).cumsum(dim=1).flip(1)
        return (globally + short_term.cumsum(dim=1)).flatten(1, 2)

    def forward(self, hidden_states: torch.Tensor, steps: torch.Tensor | None) -> torch.Tensor:
        channels = self.in_proj(self.norm(hidden_states)).transpose(1, 2)  # (B, C, T)
        features = self.extract(channels.chunk(self.num_branches, dim=1), steps)
        long_term, short_term = self.wavelet.split(features, steps)
        assembled = self.assemble(long_term, short_term).transpose(1, 2)  # (B, T, C)
        return hidden_states + self.out_proj(assembled)


class SpaceExploreMSCNN(nn.Module):
    """
    Multi-scale CNN of LLM-PS (arXiv 2503.09656, equations 1 to 6), made causal: temporal patterns of several lengths,
    short-term and long-term.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, D)`): embedded time steps.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 for padded steps, which change nothing.
    Returns:
        `torch.Tensor` of shape `(B, T, D)`.
    """

    def __init__(self, config: SpaceExploreConfig):
        super().__init__()
        self.blocks = nn.ModuleList([SpaceExploreMSCNNBlock(config) for _ in range(config.mscnn_num_blocks)])

    def first_needed(self, attention_mask: torch.Tensor | None, known: int) -> int:
        """
        Where it may start reading, if the outputs of the first `known` steps are not wanted. Convolutions look back a
        fixed number of steps, and where one lands on padding, further: so only unpadded steps count.
        """
        reach = sum(block.reach for block in self.blocks)
        if attention_mask is None:
            return max(known - reach, 0)
        unpadded = attention_mask[:, :known].bool().flip(-1).cumsum(-1)  # from the newest back
        return max(int((unpadded.flip(-1) > reach).sum(-1).min()) - 1, 0)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        steps = last_real_step(attention_mask)
        for block in self.blocks:
            hidden_states = block(hidden_states, steps)
        return hidden_states


__all__ = ["SpaceExploreInputDyT", "SpaceExploreMSCNN", "SpaceExploreValueEmbedding", "SpaceExploreWavelet"]
