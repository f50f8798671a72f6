from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import transpose
from torch import nn

from .config import RavanConfig
from .dense import adapted_linear, dense_is_cheaper
from .functional import delta_output
from .layer import RavanLayer


class Linear(RavanLayer):
    # Ravan implemented in a dense layer: nn.Linear, Conv1D and quantised linear layers
    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        target_name: str,
        config: RavanConfig,
        fan_in_fan_out: bool = False,
        **kwargs,
    ) -> None:
        self.fan_in_fan_out = fan_in_fan_out
        super().__init__(base_layer, adapter_name, target_name, config, **kwargs)

    def to_weight_layout(self, delta: torch.Tensor) -> torch.Tensor:
        return transpose(delta, self.fan_in_fan_out)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def compute_delta(self, x: torch.Tensor, adapter_name: str, result: torch.Tensor | None = None) -> torch.Tensor:
        x, tensors = self._cast_to_each_other(x, adapter_name)
        return delta_output(self.ravan_dropout[adapter_name](x), *tensors, self.gradient_heads(adapter_name), result)

    def add_delta(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        return self.compute_delta(x, adapter_name, result)

    def _adapted_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = [name for name in self.active_adapters if name in self.ravan_H]
        if not args and not kwargs and self._can_use_dense_weight(x, adapter_names):
            tensors = (*self.adapter_tensors(adapter_names[0]), self.gradient_heads(adapter_names[0]))
            return adapted_linear(x, self.base_layer.weight, self.base_layer.bias, *tensors)
        return super()._adapted_forward(x, *args, **kwargs)

    def _can_use_dense_weight(self, x: torch.Tensor, adapter_names: list[str]) -> bool:
        """Whether the layer can be computed with one dense product, and whether that is cheaper."""
        if len(adapter_names) != 1:
            return False
        base_layer, core = self.base_layer, self.ravan_H[adapter_names[0]]
        dropout = self.ravan_dropout[adapter_names[0]]
        if (
            # exactly this class: a subclass may compute something else, and hooks would not be called
            type(base_layer) is not nn.Linear
            or base_layer._forward_hooks
            or base_layer._forward_pre_hooks
            or (self.training and not isinstance(dropout, nn.Identity))
        ):
            return False
        weight = base_layer.weight
        if (
            type(weight.data) is not torch.Tensor
            or not (x.dtype == weight.dtype == core.dtype)
            # in half precision, adding a small update to the weight would round it away
            or core.dtype not in (torch.float32, torch.float64)
            or torch.is_autocast_enabled(x.device.type)
        ):
            return False
        num_trained, r, _ = core.shape
        training = torch.is_grad_enabled() and core.requires_grad
        num_tokens, total_rank = x.numel() // self.in_features, self.num_heads[adapter_names[0]] * r
        return dense_is_cheaper(num_tokens, self.in_features, self.out_features, total_rank, training, num_trained * r)
