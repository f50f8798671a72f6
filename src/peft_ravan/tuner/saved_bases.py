"""
Saving an adapter without its bases (`save_projection=False`). Instead of the bases, the file contains a fingerprint of
the bases and a record of the layer for each target, which are checked when the adapter is loaded.

Both are tensors of the adapter's state, so PEFT's own functions handle them for files, the Hub and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .fingerprint import TOLERANCE, fingerprint_distance, fingerprints_of_state, make_fingerprint
from .layer import Conv2d, Embedding, RavanLayer
from .param_wrapper import ParamWrapper
from .state import BASES_NAMES, CORE_NAME, FINGERPRINT_NAME, LAYER_NAME, is_core, is_record


# the indices are saved in files, so the order must not change
LAYER_KINDS = ("linear", "embedding", "conv2d", "parameter", "other")
PEFT_PREFIX = "base_model.model."


def layer_kind(layer: RavanLayer) -> str:
    """
    Args:
        layer ([`RavanLayer`]): A layer.

    Returns:
        `str`: One of `LAYER_KINDS`. A convolution whose dilation, groups or padding LoRA does not support is
        `"other"`.
    """
    if isinstance(layer, ParamWrapper):
        return "parameter"
    if isinstance(layer, Embedding):
        return "embedding"
    if not isinstance(layer, Conv2d):
        return "linear"
    conv = layer.get_base_layer()
    plain = conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    return "conv2d" if plain else "other"


def layer_record(layer: RavanLayer) -> torch.Tensor:
    """
    Args:
        layer ([`RavanLayer`]): A layer.

    Returns:
        `torch.Tensor`: Integers: the index of its kind, d_out and d_in. For a convolution, d_in is three numbers:
        channels, height, width.
    """
    kind = layer_kind(layer)
    d_in, d_out = layer.bases_dimensions()
    sizes = layer.get_base_layer().weight.shape if kind == "conv2d" else (d_out, d_in)
    return torch.tensor([LAYER_KINDS.index(kind), *sizes], dtype=torch.int64, device="cpu")


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, RavanLayer]:
    """
    Args:
        model (`torch.nn.Module`): A model with Ravan layers.
        adapter_name (`str`): The name of the adapter.

    Returns:
        `dict[str, RavanLayer]`: The layers of the adapter, by their names within the base model.
    """
    layers = {
        name.replace("_fsdp_wrapped_module.", "").removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, RavanLayer) and adapter_name in module.ravan_H
    }
    return layers


class SavedBases:
    """The part of a [`RavanModel`] that saves and loads adapters whose bases are not saved."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        layers = adapter_layers(model, adapter_name)
        records = {}
        for name in state:
            if not name.endswith(f".{CORE_NAME}.{adapter_name}"):
                continue
            target = name.removesuffix(f".{CORE_NAME}.{adapter_name}")
            layer = layers[target.removeprefix(PEFT_PREFIX)]
            has_bases = f"{target}.{BASES_NAMES[0]}.{adapter_name}" in state
            if not has_bases and layer.ravan_A[adapter_name].device.type != "meta":
                bases = layer.ravan_A[adapter_name], layer.ravan_B[adapter_name]
                fingerprint = make_fingerprint(*bases, layer.num_heads[adapter_name])
                records[f"{target}.{FINGERPRINT_NAME}.{adapter_name}"] = fingerprint
            # a linear layer with bases needs no record, because their shapes say everything
            if not has_bases or layer_kind(layer) != "linear":
                records[f"{target}.{LAYER_NAME}.{adapter_name}"] = layer_record(layer)
        return {**state, **records}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        _check_bases(model, adapter_name, state_dict)
        state_dict = {name: tensor for name, tensor in state_dict.items() if not is_record(name)}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _check_bases(model: nn.Module, adapter_name: str, state: Mapping[str, torch.Tensor]) -> None:
    """Raise an error if a state was trained on other bases than those its cores are about to be loaded into."""
    layers = adapter_layers(model, adapter_name)
    kept = {}
    for name in filter(is_core, state):
        target = name.removesuffix(f".{CORE_NAME}")
        layer = layers.get(target.removeprefix(PEFT_PREFIX))
        loads_bases = f"{target}.{BASES_NAMES[0]}" in state and layer is not None and layer.ravan_A.persistent
        if layer is not None and not loads_bases:
            kept[target] = layer
    of_kept = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] in kept}
    distances = {}
    for target, fingerprint in fingerprints_of_state(of_kept).items():
        basis_A, basis_B = kept[target].ravan_A[adapter_name], kept[target].ravan_B[adapter_name]
        if basis_A.device.type == "meta":
            raise ValueError(
                f"The bases of {target!r} are to be loaded, since `save_projection=True` in the configuration, but the "
                "checkpoint does not have them. Use the configuration that was saved with it."
            )
        made = make_fingerprint(basis_A, basis_B, kept[target].num_heads[adapter_name])
        distances[target] = fingerprint_distance(made, fingerprint)
    different = [target for target, distance in distances.items() if distance > TOLERANCE]
    if different:
        raise ValueError(
            f"The adapter was trained on other bases than those that were made here: at "
            f"{different[0].removeprefix(PEFT_PREFIX)!r}"
            f"{f' and {len(different) - 1} more targets' if len(different) > 1 else ''} their fingerprints differ by "
            f"{distances[different[0]]:.2g}, where {TOLERANCE} is allowed, so its cores would do something else. "
            f"Bases are made from `init_bases={model.peft_config[adapter_name].init_bases!r}`, `projection_seed`, the name "
            "and the size of the target, and with 'weight_svd' from its weight: use the configuration and the base model "
            "of the adapter. A file that was saved with `save_projection=True` contains its bases and loads anywhere."
        )
