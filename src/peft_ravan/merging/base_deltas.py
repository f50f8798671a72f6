"""What a merge hands back to be added to the weights of the base model, and the one place that adds it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import transpose
from torch import nn


# of the norm of an update, from where on its rounding is worth a warning
MAX_LOST_SHARE = 0.01


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


def add_base_deltas(
    model: nn.Module,
    base_deltas: Mapping[str, BaseDelta],
    remainders: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """
    Add what a merge hands back to the weights of the base model.

    The layer says how it keeps its weight: `Linear` and `Conv2d` as `[d_out, ...]`, transformers' `Conv1D` and
    `Embedding` transposed.

    In float32 the sum is as exact as one addition. A weight in half precision is rounded after it, to the nearest number of
    its dtype, and of a small update that can lose most. What it has lost is the remainder, which is returned: give it to
    the next call, so that it is added then. After any number of rounds every entry is within half a unit in the last place
    of the exact sum, and the weight and its remainder together are that sum up to the rounding of float32.

    Args:
        model ([`~peft.PeftModel`]):
            The model, whose base weights are changed in place.
        base_deltas (`Mapping[str, BaseDelta]`):
            The updates by the names of adapted modules in `model`.
        remainders (`Mapping[str, torch.Tensor]`, *optional*):
            What the last call returned, and an empty dict in the first round. Without it, what rounding loses is taken
            for lost, and a warning tells if that is more than 1 % of an update.

    Returns:
        `dict[str, torch.Tensor]`: What is still to be added to each weight in half precision, by module: float32, with the
        shape of the weight. It can be saved as safetensors.

    Raises:
        ValueError: if a module is not an adapted layer, if a shape does not fit, if the weight is quantized, or if
            another module shares it, or if it would have NaN or infinite entries. No weight has changed then.
    """
    addresses = Counter(
        parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False) if parameter.numel()
    )
    sums = {}
    with torch.no_grad():
        for name, delta in base_deltas.items():
            weight = _base_weight(model, name)
            if addresses[weight.data_ptr()] > 1:
                raise ValueError(
                    f"Module {name!r}: its base weight is shared with another module, which would change, too. Load the "
                    "base model with untied weights (`tie_word_embeddings=False`), or use a merge method that changes no "
                    "base weight."
                )
            sums[name] = _Sum.of(name, weight, _change(model, name, weight, delta), (remainders or {}).get(name))
        if remainders is None:
            _warn_of_rounding(sums)
        for sum_ in sums.values():
            sum_.weight.copy_(sum_.rounded)
    left_out = {name: sum_.left_out for name, sum_ in sums.items() if sum_.left_out is not None}
    return {**(remainders or {}), **left_out}


@dataclass(frozen=True)
class _Sum:
    """A base weight, the number of its dtype next to its sum with an update, and what this leaves out of the update."""

    weight: torch.Tensor
    rounded: torch.Tensor
    left_out: torch.Tensor | None
    lost_share: float

    @classmethod
    def of(cls, name: str, weight: torch.Tensor, change: torch.Tensor, remainder: torch.Tensor | None) -> _Sum:
        if remainder is not None:
            if remainder.shape != weight.shape:
                raise ValueError(
                    f"Module {name!r}: its remainder has shape {tuple(remainder.shape)}, but its base weight "
                    f"{tuple(weight.shape)}. Give the remainders that the last call for this model returned."
                )
            change = change + remainder.to(change)
        rounded = (weight.to(change) + change).to(weight.dtype)
        if not torch.isfinite(rounded).all():
            raise ValueError(
                f"Module {name!r}: its base weight would have NaN or infinite entries, where {weight.dtype} ends at "
                f"{torch.finfo(weight.dtype).max:g}. Load the base model in float32, or use a merge method that changes no "
                "base weight."
            )
        if weight.dtype.itemsize >= 4:
            return cls(weight, rounded, None, 0.0)
        # the difference of two numbers in half precision is one of float32, so nothing is lost twice
        left_out = change - (rounded.to(change) - weight.to(change))
        lost_share = (left_out.norm() / change.norm()).item() if change.any() else 0.0
        return cls(weight, rounded, left_out, lost_share)


def _change(model: nn.Module, name: str, weight: torch.Tensor, delta: BaseDelta) -> torch.Tensor:
    """What is added to a weight, in its shape and in at least float32."""
    layer = model.get_submodule(name)
    transposed = getattr(layer, "fan_in_fan_out", False) or isinstance(layer.get_base_layer(), nn.Embedding)
    change = transpose(delta.dense(), transposed)
    if change.numel() != weight.numel() or (weight.dim() == 2 and change.shape != weight.shape):
        raise ValueError(
            f"Module {name!r}: its base weight has shape {tuple(weight.shape)}, which an update of shape "
            f"{tuple(change.shape)} does not fit. Was it merged from adapters of another model?"
        )
    return change.reshape(weight.shape).to(weight.device, torch.promote_types(weight.dtype, torch.float32))


def _warn_of_rounding(sums: Mapping[str, _Sum]) -> None:
    losing = {name: sum_ for name, sum_ in sums.items() if sum_.lost_share > MAX_LOST_SHARE}
    if losing:
        name, worst = max(losing.items(), key=lambda item: item[1].lost_share)
        warnings.warn(
            f"Module {name!r}: rounding to {worst.weight.dtype} loses {worst.lost_share:.0%} of the update of the base "
            f"weight, and in {len(losing)} of {len(sums)} modules more than {MAX_LOST_SHARE:.0%}. Give what "
            "`add_base_deltas` returns to its next call as `remainders`, with an empty dict in the first round, so that it is "
            "added later. Or load the base model in float32."
        )


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
