from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.other import transpose
from torch import nn

from .bases import BasesShape, make_bases
from .config import RavanConfig
from .functional import adapted_linear, delta_output, delta_weight, dense_is_cheaper


class RavanLayer(BaseTunerLayer):
    """
    What every Ravan layer has: per adapter the trained core `ravan_H` `[h, r, r]` and scaling `ravan_s` `[h]`, and the
    frozen bases `ravan_A` `[h*r, d_in]` and `ravan_B` `[d_out, h*r]`.
    """

    # All names of layers that may contain (trainable) adapter weights
    adapter_layer_names: tuple[str, ...] = ("ravan_H", "ravan_s")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names: tuple[str, ...] = ("ravan_A", "ravan_B", "ravan_dropout", "r", "num_heads")

    def __init__(self, base_layer: nn.Module, config: RavanConfig, **kwargs) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.r: dict[str, int] = {}
        self.num_heads: dict[str, int] = {}
        self.ravan_dropout = nn.ModuleDict({})
        self.ravan_H = nn.ParameterDict({})
        self.ravan_s = nn.ParameterDict({})
        # Buffers, not frozen parameters: PEFT's set_requires_grad and gradient checkpointing would train parameters.
        self.ravan_A = BufferDict({}, persistent=config.save_projection)
        self.ravan_B = BufferDict({}, persistent=config.save_projection)
        # Mark the weight as unmerged
        self._disable_adapters = False
        self.merged_adapters = []
        # flag to enable/disable casting of input to weight dtype during forward call
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs

        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        if self.in_features is None or self.out_features is None:
            raise TypeError(f"Unsupported layer type {type(self.get_base_layer())}")

    def update_layer(self, adapter_name: str, target_name: str, config: RavanConfig, **kwargs) -> None:
        """
        Add an adapter to this layer.

        Args:
            adapter_name (`str`): The name of the adapter.
            target_name (`str`): The name of this layer within the base model; with the seed it determines the bases.
            config (`RavanConfig`): The configuration of the adapter.

        Raises:
            ValueError: if the bases do not fit into the layer.
        """
        shape = BasesShape(self.in_features, self.out_features, config.num_heads, config.r)
        basis_A, basis_B = make_bases(config.init_bases, shape, config.projection_seed, target_name)

        self.r[adapter_name] = config.r
        self.num_heads[adapter_name] = config.num_heads
        self.ravan_dropout[adapter_name] = nn.Dropout(config.ravan_dropout) if config.ravan_dropout else nn.Identity()
        self.ravan_H[adapter_name] = nn.Parameter(torch.zeros(config.num_heads, config.r, config.r))
        # [h] and never a 0-dim tensor, on which PEFT's check for broken adapters fails
        self.ravan_s[adapter_name] = nn.Parameter(torch.ones(config.num_heads))
        self.ravan_A[adapter_name] = basis_A
        self.ravan_B[adapter_name] = basis_B

        self.reset_ravan_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_ravan_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """
        Set the trained parameters of an adapter to their initial values: every s to 1, every H to 0.

        Args:
            adapter_name (`str`): The name of the adapter.
            init_weights (`bool`, *optional*, defaults to `True`): `False` makes H random instead.
        """
        if adapter_name not in self.ravan_H:
            return
        nn.init.ones_(self.ravan_s[adapter_name])
        if init_weights:
            nn.init.zeros_(self.ravan_H[adapter_name])
        else:
            nn.init.normal_(self.ravan_H[adapter_name])


class Linear(nn.Module, RavanLayer):
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
        super().__init__()
        RavanLayer.__init__(self, base_layer, config, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, target_name, config=config)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the active adapter weights into the base weights.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`):
                If `True`, the merge is done in a copy of the original weights, which is checked for NaNs before it
                takes their place.
            adapter_names (`list[str]`, *optional*):
                The names of the adapters to merge. If `None`, all active adapters are merged.

        Raises:
            ValueError: with `safe_merge`, if the merged weights are not finite.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.ravan_H:
                continue
            weight = self.get_base_weight()
            if safe_merge:
                weight = weight.clone()
            weight += self.get_delta_weight(adapter_name).to(weight.dtype)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
            self.set_base_weight(weight)
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Take all merged adapter weights out of the base weights."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            if adapter_name in self.ravan_H:
                weight = self.get_base_weight()
                weight -= self.get_delta_weight(adapter_name).to(weight.dtype)
                self.set_base_weight(weight)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute the weight update of an adapter, in the layout of the base weight.

        Args:
            adapter (`str`): The name of the adapter.

        Returns:
            `torch.Tensor`: `[d_out, d_in]`, or `[d_in, d_out]` for `Conv1D`, in the dtype of the adapter.
        """
        core = self.ravan_H[adapter]
        tensors = (self.ravan_A[adapter], self.ravan_B[adapter], core, self.ravan_s[adapter])
        # some CPUs have slow half precision products, and this one is rounded only once
        if core.device.type == "cpu" and core.dtype in (torch.float16, torch.bfloat16):
            tensors = tuple(tensor.float() for tensor in tensors)
        return transpose(delta_weight(*tensors), self.fan_in_fan_out).to(core.dtype)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)

        adapter_names = [name for name in self.active_adapters if name in self.ravan_H]
        if not args and not kwargs and self._can_use_dense_weight(x, adapter_names):
            return adapted_linear(x, self.base_layer.weight, self.base_layer.bias, *self._tensors(adapter_names[0]))

        result = self.base_layer(x, *args, **kwargs)
        result_dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter_name in adapter_names:
            x_cast = self._cast_input_dtype(x, self.ravan_H[adapter_name].dtype)
            result = result + delta_output(self.ravan_dropout[adapter_name](x_cast), *self._tensors(adapter_name))
        return result.to(result_dtype)

    def _tensors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            self.ravan_A[adapter_name],
            self.ravan_B[adapter_name],
            self.ravan_H[adapter_name],
            self.ravan_s[adapter_name],
        )

    def _can_use_dense_weight(self, x: torch.Tensor, adapter_names: list[str]) -> bool:
        """Whether the layer can be computed by one dense product, and whether that costs less."""
        if len(adapter_names) != 1:
            return False
        base_layer, core = self.base_layer, self.ravan_H[adapter_names[0]]
        dropout = self.ravan_dropout[adapter_names[0]]
        if (
            # exactly: a subclass may compute something else, and a hook would not be called
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
            # in half precision, a small update would be rounded away when it is added to the weight
            or core.dtype not in (torch.float32, torch.float64)
            or torch.is_autocast_enabled(x.device.type)
        ):
            return False
        training = torch.is_grad_enabled() and core.requires_grad
        num_tokens = x.numel() // self.in_features
        return dense_is_cheaper(
            num_tokens, self.in_features, self.out_features, core.shape[0] * core.shape[1], training
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "ravan." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
