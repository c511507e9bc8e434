"""Low-rank adapters (Hu et al., 2021, arXiv 2106.09685) through PEFT: few weights are trained, the others stay."""

import copy
import json

from transformers import PreTrainedModel
from transformers.utils import is_peft_available

# Every linear layer but the packed experts, which PEFT reaches by `target_parameters`.
DEFAULTS = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
ADAPTER = "adapter"  # folder


def read_fields(peft: dict | str) -> dict:
    """Fields of `LoraConfig`, from the YAML block or as JSON on the command line."""
    try:
        fields = json.loads(peft) if isinstance(peft, str) else peft
    except json.JSONDecodeError as error:
        raise ValueError(f"peft must be fields of LoraConfig as JSON, got {peft!r}: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"peft must be fields of LoraConfig, got {peft!r}")
    return fields


def add_adapter(model: PreTrainedModel, peft: dict | str):
    """The model with an adapter to train, see `adapter_config`."""
    config = adapter_config(model, peft)
    from peft import get_peft_model

    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"peft {read_fields(peft)}: {error}") from None


def adapter_config(model: PreTrainedModel, peft: dict | str):
    """PEFT's `LoraConfig` of an adapter. A head is trained whole: it is small, and may be new.

    Raises:
        ValueError: PEFT is not installed, or a field that LoraConfig does not know or refuses.
    """
    fields = read_fields(peft)
    if not is_peft_available():
        raise ValueError("peft is set but not installed: pip install 'spaceexploreai[lora]'")
    from peft import LoraConfig

    heads = [name for name, _ in model.named_children() if name not in ("model", "lm_head")]  # one is tied
    try:
        return LoraConfig(**DEFAULTS | {"modules_to_save": heads} | fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft {fields}: {error}") from None


def has_adapter(model) -> bool:
    return hasattr(model, "merge_and_unload")


def merged(model) -> PreTrainedModel:
    """A plain network that says what the model with its adapter says."""
    return copy.deepcopy(model).merge_and_unload() if has_adapter(model) else model
