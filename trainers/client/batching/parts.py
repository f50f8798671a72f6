"""Which parts of a model are computed for several clients at once, and which layers in them clients train."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def common_parts(model: nn.Module) -> list[str]:
    """
    Find the parts of a model that have adapted layers, such as the encoder below a classifier. What is around them is
    computed for each client by itself: the task head and the loss.

    Args:
        model ([`~peft.PeftModel`]): The model.

    Returns:
        `list[str]`: Their names.
    """
    top = model.get_base_model()
    [prefix] = [name for name, module in model.named_modules() if module is top]
    return list(_outermost(top, prefix))


def _outermost(module: nn.Module, name: str) -> Iterator[str]:
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}"
        if isinstance(child, AuxiliaryTrainingWrapper) or not _is_adapted(child):
            continue
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _outermost(child, path)  # it cannot be called
        else:
            yield path


def _is_adapted(module: nn.Module) -> bool:
    return any(isinstance(part, BaseTunerLayer) for part in module.modules())


def own_layers(model: nn.Module, parts: list[str]) -> list[str]:
    """
    Args:
        model ([`~peft.PeftModel`]): The model.
        parts (`list[str]`): Names of parts.

    Returns:
        `list[str]`: The names of the layers within these parts that have something to train.
    """
    return [name for part in parts for name in _own(model.get_submodule(part), part)]


def _own(module: nn.Module, name: str) -> Iterator[str]:
    is_wrapper = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    if is_wrapper or any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        yield name
        return
    for child_name, child in module.named_children():
        yield from _own(child, f"{name}.{child_name}")
