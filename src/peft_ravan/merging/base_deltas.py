"""What a merge hands back to be added to the weights of the base model, and the one place that adds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import transpose
from torch import nn


@dataclass(frozen=True)
class BaseDelta:
    """
    The update of one base weight, as the product of two factors, or whole where that is smaller.

    Args:
        left (`torch.Tensor`): `[d_out, k]`, or the whole update `[d_out, d_in]`.
        right (`torch.Tensor`, *optional*): `[k, d_in]`, or `None` if `left` is the whole update.
    """

    left: torch.Tensor
    right: torch.Tensor | None = None

    @classmethod
    def from_factors(cls, left: torch.Tensor, right: torch.Tensor) -> BaseDelta:
        """
        Args:
            left (`torch.Tensor`): `[d_out, k]`.
            right (`torch.Tensor`): `[k, d_in]`.

        Returns:
            [`BaseDelta`]: The product, in the smaller of both forms.
        """
        d_out, d_in = left.shape[0], right.shape[1]
        return cls(left @ right) if left.numel() + right.numel() >= d_out * d_in else cls(left, right)

    def dense(self) -> torch.Tensor:
        """
        Returns:
            `torch.Tensor`: `[d_out, d_in]`: y changes by this matrix times x, however the layer keeps its weight. The
            kernel of a convolution is flattened to `[c_out, c_in * k * k]`.
        """
        return self.left if self.right is None else self.left @ self.right


def add_base_deltas(model: nn.Module, base_deltas: Mapping[str, BaseDelta]) -> None:
    """
    Add what a merge hands back to the weights of the base model.

    The layer says how it keeps its weight: `Linear` and `Conv2d` as `[d_out, ...]`, transformers' `Conv1D` and
    `Embedding` transposed.

    Args:
        model ([`~peft.PeftModel`]): The model, whose base weights are changed in place.
        base_deltas (`Mapping[str, BaseDelta]`): The updates by the names of adapted modules in `model`.

    Raises:
        ValueError: if a module is not an adapted layer, if a shape does not fit, if the weight is quantized, or if
            another module shares it. No weight has changed then.
    """
    addresses = Counter(
        parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False) if parameter.numel()
    )
    changes = []
    for name, delta in base_deltas.items():
        weight = _base_weight(model, name)
        if addresses[weight.data_ptr()] > 1:
            raise ValueError(
                f"Module {name!r}: its base weight is shared with another module, which would change, too. Load the base "
                "model with untied weights (`tie_word_embeddings=False`), or use a merge method that changes no base weight."
            )
        layer = model.get_submodule(name)
        transposed = getattr(layer, "fan_in_fan_out", False) or isinstance(layer.get_base_layer(), nn.Embedding)
        change = transpose(delta.dense(), transposed)
        if change.numel() != weight.numel() or (weight.dim() == 2 and change.shape != weight.shape):
            raise ValueError(
                f"Module {name!r}: its base weight has shape {tuple(weight.shape)}, which an update of shape "
                f"{tuple(change.shape)} does not fit. Was it merged from adapters of another model?"
            )
        changes.append((weight, change))
    with torch.no_grad():
        for weight, change in changes:
            weight.add_(change.reshape(weight.shape).to(weight))


def _base_weight(model: nn.Module, name: str) -> torch.Tensor:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, BaseTunerLayer):
        raise ValueError(
            f"There is no adapted module {name!r} in the model. Give the PEFT model that the adapters were trained in."
        )
    weight = layer.get_base_layer().weight
    # torchao's quantized tensors have a class of their own and pretend to be floating point, as sharded ones do
    plain = type(weight) in (torch.Tensor, nn.Parameter)
    if not plain or not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None:
        kind = f"quantized ({weight.dtype})" if plain else f"quantized or sharded ({type(weight).__name__})"
        raise ValueError(
            f"Module {name!r}: its base weight is {kind}, and nothing can be added to it. Load the base "
            "model in full precision, or use a merge method that changes no base weight."
        )
    return weight
