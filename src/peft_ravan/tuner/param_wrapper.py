"""Ravan on an `nn.Parameter` that is not the weight of a layer, such as the stacked weights of a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .config import RavanConfig
from .functional import scaled_cores
from .layer import RavanLayer


# PEFT looks for this class name when it injects parameters
class ParamWrapper(RavanLayer):
    """
    Adapts one parameter of a module, `[d_out, d_in]`, or the parameter of E experts, `[E, d_out, d_in]`
    (`[E, d_in, d_out]` if the module says `is_transposed`). All experts share the bases, and each expert has its own h
    heads: `ravan_H` is `[E*h, r, r]` and `ravan_s` is `[E*h]`, ordered by expert.

    For several parameters of one module, wrappers are nested.
    """

    can_train_some_heads = False

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        target_name: str,
        config: RavanConfig,
        parameter_name: str,
        **kwargs,
    ) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, target_name, config, **kwargs)

    def get_param(self) -> nn.Parameter:
        """The parameter of the base module, without the adapter."""
        return self.get_base_layer()._parameters[self.parameter_name]

    def get_base_weight(self) -> torch.Tensor:
        return self.get_param().data

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        self.get_param().data = weight_data

    @property
    def num_experts(self) -> int:
        parameter = self.get_param()
        return parameter.shape[0] if parameter.dim() == 3 else 1

    @property
    def is_transposed(self) -> bool:
        return self.get_param().dim() == 3 and getattr(self.get_base_layer(), "is_transposed", False)

    def _layer_features(self) -> tuple[int, int]:
        if self.parameter_name not in self.get_base_layer()._parameters:
            raise ValueError(
                f"{self.parameter_name!r} of {type(self.get_base_layer()).__name__} is parametrized, which Ravan does not "
                "support. Remove it with `torch.nn.utils.parametrize.remove_parametrizations` first."
            )
        parameter = self.get_param()
        if parameter.dim() not in (2, 3):
            raise ValueError(
                f"Ravan adapts parameters of 2 or 3 dimensions, but {self.parameter_name!r} has {parameter.dim()}."
            )
        d_out, d_in = parameter.shape[-2:]
        return (d_out, d_in) if self.is_transposed else (d_in, d_out)

    def bases_dimensions(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        parameter = self.get_param()
        return parameter.device, parameter.dtype

    def to_weight_layout(self, delta: torch.Tensor) -> torch.Tensor:
        delta = delta.transpose(1, 2) if self.is_transposed else delta
        return delta.reshape(self.get_param().shape)

    def compute_delta(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        raise NotImplementedError("The output of the module is computed from the adapted parameter.")

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute the update of the parameter, in the parameter's layout.

        Args:
            adapter (`str`): The name of the adapter.

        Returns:
            `torch.Tensor`: A tensor with the shape and dtype of the parameter.
        """
        basis_A, basis_B, core, scaling = self.adapter_tensors(adapter)
        r, num_heads = self.r[adapter], self.num_heads[adapter]
        products = scaled_cores(core, scaling).reshape(self.num_experts, num_heads, r, r)
        per_head_B = basis_B.reshape(-1, num_heads, r)  # [d_out, h, r]
        projected = torch.einsum("ohr,ehrs->eohs", per_head_B, products).flatten(2)  # [E, d_out, h*r]
        return self.to_weight_layout(projected @ basis_A).to(self.get_param().dtype)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("Ravan on `target_parameters` does not support mixed adapter batches.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        with self._adapted_parameter():
            return self.base_layer(x, *args, **kwargs)

    @contextmanager
    def _adapted_parameter(self) -> Iterator[None]:
        # An instance attribute hides the registered parameter, but only from the module's own code.
        active = [name for name in self.active_adapters if name in self.ravan_H]
        attributes = self.get_base_layer().__dict__
        if active:
            attributes[self.parameter_name] = self.get_param() + sum(self.get_delta_weight(name) for name in active)
        try:
            yield
        finally:
            attributes.pop(self.parameter_name, None)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Remove this wrapper, and those it wraps, from the module. PEFT calls this instead of `merge`."""
        module = self
        while isinstance(module, ParamWrapper):
            if merge:
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            module = module.base_layer
        return module

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}; {super().extra_repr()}"
