"""The layers that clients train, for the rows of several clients at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import nn

from peft_ravan.tuner.copies import forward_of_copies
from peft_ravan.tuner.linear import Linear as RavanLinear

from .rows import Rows


def forward_of_all(layers: Sequence[nn.Module], rows: Rows) -> Callable[..., Any]:
    """
    Args:
        layers (`Sequence[nn.Module]`): The same layer of each client.
        rows ([`Rows`]): Which rows belong to which client.

    Returns:
        `Callable`: The forward pass of the layer for all rows. For linear layers of Ravan and LoRA, the base weight is
        applied to all rows at once. All other layers are called once for each client.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        together = _TOGETHER.get(type(layers[0]))
        is_plain = together is not None and len(args) == 1 and not kwargs and _is_plain(layers)
        if is_plain and (sizes := rows.sizes_in(args[0])) is not None:
            return together(layers, args[0], sizes)
        split = rows.split_inputs((args, kwargs))
        return rows.join([layer(*own, **named) for layer, (own, named) in zip(layers, split, strict=True)])

    return forward


def _is_plain(layers: Sequence[nn.Module]) -> bool:
    """
    Whether the layers compute what is computed here for all of them: with the same base layer, without hooks, and with
    plain LoRA.
    """
    if any(parameter.requires_grad for parameter in layers[0].base_layer.parameters()):
        return False
    for layer in layers:
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
            return False
        if isinstance(layer, lora.Linear):
            [adapter] = layer.active_adapters
            if adapter not in layer.lora_A or layer.lora_variant.get(adapter) or layer.lora_bias.get(adapter):
                return False
        elif layer.active_adapters[0] not in layer.ravan_H or layer.quantization_backend is not None:
            return False
    return True


def _lora(layers: Sequence[lora.Linear], x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    layer = layers[0]
    [adapter] = layer.active_adapters
    result = layer.base_layer(x)
    down = [layer.lora_A[adapter].weight for layer in layers]
    up = [layer.lora_B[adapter].weight for layer in layers]
    x = layer.lora_dropout[adapter](layer._cast_input_dtype(x, down[0].dtype))
    if len(set(sizes)) == 1:
        own = x.reshape(len(layers), -1, x.shape[-1])  # [K, n, d_in]
        inner = own @ torch.stack(down).transpose(1, 2)  # [K, n, r]
        delta = (inner @ torch.stack(up).transpose(1, 2)).reshape(result.shape)
    else:
        parts = zip(x.split(list(sizes)), down, up, strict=True)
        delta = torch.cat([nn.functional.linear(nn.functional.linear(part, a), b) for part, a, b in parts])
    return (result + delta * layer.scaling[adapter]).to(result.dtype)


# exactly these classes: a subclass may compute something else
_TOGETHER = {RavanLinear: forward_of_copies, lora.Linear: _lora}
