"""Determines which modules of a model can be adapted, and by which kind of layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .config import RavanConfig
from .layer import Conv2d, Embedding, RavanLayer
from .linear import Linear


# models whose fast kernels read weights directly, as in PEFT's list for LoRA
_MAMBA_MODELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_READ_BY_KERNELS = ("conv1d", "out_proj")


def base_layer_of(target: nn.Module) -> nn.Module:
    """
    Args:
        target (`torch.nn.Module`): A target. It may already be adapted.

    Returns:
        `torch.nn.Module`: The layer of the base model: the target itself, or the layer that it wraps.
    """
    return target.get_base_layer() if isinstance(target, BaseTunerLayer) else target


def modules_to_match(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """
    Args:
        model (`torch.nn.Module`): A base model, with or without adapters.

    Yields:
        `tuple[str, torch.nn.Module]`: The modules that patterns are matched against, by name. Modules that adapters
        added to their layers are left out.
    """
    adapted = None
    for name, module in model.named_modules():
        if not name or (adapted is not None and name.startswith(adapted)):
            continue
        adapted = f"{name}." if isinstance(module, BaseTunerLayer) else None
        yield name, module


def check_is_called(model: nn.Module, target_name: str) -> None:
    """
    Args:
        model (`torch.nn.Module`): A base model.
        target_name (`str`): The name of a target in it.

    Raises:
        ValueError: if the model reads its weight without calling it, so that an adapter would have no effect.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _MAMBA_MODELS and target_name.rpartition(".")[2] in _READ_BY_KERNELS:
        raise ValueError(
            f"Target module {target_name!r} is incompatible with Mamba-based models such as {model_type!r}: their kernels "
            "read its weight without calling it, so an adapter would have no effect. Leave it out with `exclude_modules`."
        )


def warn_of_unmatched_heads(config: RavanConfig, target_names: Iterable[str]) -> None:
    """
    Warn about entries of `heads_pattern` that match no target, as PEFT does for `rank_pattern`.

    Args:
        config ([`RavanConfig`]): A configuration.
        target_names (`Iterable[str]`): The names of its targets, without those of `target_parameters`.
    """
    patterns = dict.fromkeys(config.heads_pattern or {})
    if not patterns or config.target_parameters:
        return
    matched = {key for key in patterns if any(get_pattern_key([key], name) == key for name in target_names)}
    unmatched = sorted(patterns.keys() - matched)
    if unmatched:
        warnings.warn(
            f"The following heads_pattern keys did not match any targeted module and were ignored: {unmatched}.",
            RuntimeWarning,
        )


def layer_class(target: nn.Module, target_name: str) -> type[RavanLayer]:
    """
    Args:
        target (`torch.nn.Module`): A target. It may already be adapted.
        target_name (`str`): Its name, for the message.

    Returns:
        `type[RavanLayer]`: The kind of layer that adapts it.

    Raises:
        TypeError: if there is no such layer, or if an adapter would have no effect.
    """
    base_layer = base_layer_of(target)
    if isinstance(base_layer, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"Target module {target_name!r} is the output projection of an `nn.MultiheadAttention`, which reads its weight "
            "without calling it: an adapter would have no effect. Leave it out with `exclude_modules`."
        )
    if isinstance(base_layer, nn.Embedding):
        return Embedding
    if isinstance(base_layer, nn.Conv2d):
        return Conv2d
    # a quantised linear layer is a subclass of nn.Linear in some libraries and a separate class in others
    if isinstance(base_layer, (nn.Linear, Conv1D)):
        return Linear
    quantization_backend = resolve_quantization_backend(base_layer)
    if quantization_backend is not None and quantization_backend.layer_type == "linear":
        return Linear
    raise TypeError(
        f"Target module {target_name!r} is a {type(base_layer).__name__}, which Ravan does not support. Supported are "
        "`torch.nn.Linear` (optionally quantized), `torch.nn.Embedding`, `torch.nn.Conv2d` and "
        "`transformers.pytorch_utils.Conv1D`. Name other modules in `target_modules`, or leave this one out with "
        "`exclude_modules`."
    )
