from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.utils.other import transpose
from torch import nn

from .config import RavanConfig
from .dense import adapted_linear, dense_is_cheaper, form_weight, is_kept
from .formed_weight import FormedFrom, FormedWeight
from .functional import delta_output, scaled_cores
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
        self.keep_until: str | None = "backward"
        self.formed_weight = FormedWeight()
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

    def keep_formed_weight(self, until: str | None) -> None:
        """
        Choose how long the formed weight is kept. See [`RavanModel.keep_formed_weights`].

        Args:
            until (`str`, *optional*): `"backward"`, `"changed"` or `None`.
        """
        self.keep_until = until
        self.formed_weight.clear()

    def merge(self, *args, **kwargs) -> None:
        self.formed_weight.clear()
        super().merge(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args, **kwargs) -> nn.Module:
        self.formed_weight.clear()
        return super()._apply(fn, *args, **kwargs)

    def _adapted_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = [name for name in self.active_adapters if name in self.ravan_H]
        if args or kwargs or not self._can_be_dense(x, adapter_names):
            self.formed_weight.clear()
            return super()._adapted_forward(x, *args, **kwargs)
        [adapter_name] = adapter_names
        basis_A, basis_B, core, scaling = self.adapter_tensors(adapter_name)
        source = FormedFrom(adapter_name, self.base_layer.weight, basis_A, basis_B, core, scaling)
        # the state of a layer cannot be compiled
        reuses = self.keep_until == "changed" and not torch.compiler.is_compiling()
        formed = self.formed_weight.get(source) if reuses else None
        keep = self._keeps_for_backward(x)
        if formed is None and not self._dense_is_cheaper(x, adapter_name, keep):
            return super()._adapted_forward(x)
        if formed is None and reuses:
            with torch.no_grad():
                formed = form_weight(source.weight, basis_A, basis_B, scaled_cores(core, scaling))
            self.formed_weight.hold(formed, source)
        heads = self.gradient_heads(adapter_name)
        # what is held anyway costs nothing to keep
        keep = keep or formed is not None
        return adapted_linear(x, *source[1:2], self.base_layer.bias, *source[2:], heads, keep, formed)

    def _can_be_dense(self, x: torch.Tensor, adapter_names: list[str]) -> bool:
        """Whether the layer can be computed with its formed weight."""
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
        return (
            type(weight.data) is torch.Tensor
            and x.dtype == weight.dtype == core.dtype
            # in half precision, adding a small update to the weight would round it away
            and core.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _keeps_for_backward(self, x: torch.Tensor) -> bool:
        is_small = is_kept(x.numel() // self.in_features, self.in_features, self.out_features)
        return self.keep_until is not None and is_small

    def _dense_is_cheaper(self, x: torch.Tensor, adapter_name: str, keep: bool) -> bool:
        core = self.ravan_H[adapter_name]
        num_trained, r, _ = core.shape
        training = torch.is_grad_enabled() and core.requires_grad
        num_tokens, total_rank = x.numel() // self.in_features, self.num_heads[adapter_name] * r
        return dense_is_cheaper(
            num_tokens, self.in_features, self.out_features, total_rank, training, num_trained * r, keep
        )
