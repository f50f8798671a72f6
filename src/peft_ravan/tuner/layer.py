from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn

from .bases import BASES, BasesShape, make_bases, scale_of
from .config import RavanConfig
from .functional import autocast_dtype, delta_weight, expand
from .trained_heads import AllHeads, LayerTrainedHeads


class RavanLayer(LayerTrainedHeads, BaseTunerLayer, nn.Module):
    """
    The base class of Ravan layers. Each adapter has the trained core `ravan_H` `[h, r, r]` and scaling `ravan_s`
    `[h]`, and the frozen bases `ravan_A` `[h*r, d_in]` and `ravan_B` `[d_out, h*r]`. While only k heads are trained,
    `ravan_H` and `ravan_s` hold these k heads, and `all_heads` holds the parameters of all heads.

    Subclasses define d_in and d_out (`bases_size`), how the input is projected (`compute_delta`), and the layout of
    the weight (`to_weight_layout`).
    """

    # All names of layers that may contain (trainable) adapter weights
    adapter_layer_names: tuple[str, ...] = ("ravan_H", "ravan_s")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names: tuple[str, ...] = (
        "ravan_A", "ravan_B", "ravan_dropout", "r", "num_heads", "init_bases", "bases_scale", "all_heads"
    )  # fmt: skip

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, target_name: str, config: RavanConfig, **kwargs
    ) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.r: dict[str, int] = {}
        self.num_heads: dict[str, int] = {}
        self.init_bases: dict[str, str] = {}
        self.bases_scale: dict[str, float] = {}
        # PEFT freezes these again whenever it activates an adapter. An own dict, since that of the class is shared.
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.ravan_dropout = nn.ModuleDict({})
        self.ravan_H = nn.ParameterDict({})
        self.ravan_s = nn.ParameterDict({})
        self.all_heads: dict[str, AllHeads] = {}
        # Buffers instead of frozen parameters: PEFT's set_requires_grad and gradient checkpointing would train
        # parameters.
        self.ravan_A = BufferDict({}, persistent=config.save_projection)
        self.ravan_B = BufferDict({}, persistent=config.save_projection)
        # Mark the weight as unmerged
        self._disable_adapters = False
        self.merged_adapters = []
        # flag to enable/disable casting of input to weight dtype during forward call
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs

        self.in_features, self.out_features = self._layer_features()
        if self.in_features is None or self.out_features is None:
            raise TypeError(f"Unsupported layer type {type(self.get_base_layer())}")
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, target_name, config=config)

    @property
    def num_experts(self) -> int:
        """The number of sets of heads that share the bases."""
        return 1

    def _layer_features(self) -> tuple[int | None, int | None]:
        return _get_in_out_features(self.get_base_layer())

    def bases_dimensions(self) -> tuple[int, int]:
        """d_in and d_out of the bases of this layer."""
        return self.bases_size(self.get_base_layer())

    @staticmethod
    def bases_size(base_layer: nn.Module) -> tuple[int, int]:
        """d_in and d_out of a base layer of this kind."""
        return _get_in_out_features(base_layer)

    @abstractmethod
    def compute_delta(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The output that an adapter adds to the base layer."""

    def add_delta(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The output of the base layer and what an adapter adds to it. The result is not changed in place."""
        return result + self.compute_delta(x, adapter_name)

    @abstractmethod
    def to_weight_layout(self, delta: torch.Tensor) -> torch.Tensor:
        """Convert a weight update `[d_out, d_in]` to the layout of the base weight."""

    def update_layer(self, adapter_name: str, target_name: str, config: RavanConfig, **kwargs) -> None:
        """
        Add an adapter to this layer.

        Args:
            adapter_name (`str`): The name of the adapter.
            target_name (`str`): The name of this layer within the base model. The name and the seed determine the
                bases.
            config (`RavanConfig`): The configuration of the adapter.

        Raises:
            ValueError: if the bases do not fit the layer.
        """
        r, num_heads = config.size_of(target_name)
        shape = BasesShape(*self.bases_dimensions(), num_heads, r)
        from_weight = BASES[config.init_bases].from_matrix == "weight"
        matrix = self._base_matrix() if from_weight else None
        basis_A, basis_B = make_bases(
            config.init_bases, shape, config.projection_seed, target_name, matrix, config.bases_scale
        )

        self.all_heads.pop(adapter_name, None)
        self.r[adapter_name] = r
        self.num_heads[adapter_name] = num_heads
        self.init_bases[adapter_name] = config.init_bases
        self.frozen_peft_weight_names[adapter_name] = () if config.train_scaling else ("ravan_s",)
        self.bases_scale[adapter_name] = scale_of(config.bases_scale, config.init_bases, shape)
        self.ravan_dropout[adapter_name] = nn.Dropout(config.ravan_dropout) if config.ravan_dropout else nn.Identity()
        num_cores = self.num_experts * num_heads
        self.ravan_H[adapter_name] = nn.Parameter(torch.zeros(num_cores, r, r))
        # [h] and never 0-dimensional, since PEFT's check for broken adapters fails on such tensors
        self.ravan_s[adapter_name] = nn.Parameter(torch.ones(num_cores))
        self.ravan_A[adapter_name] = basis_A
        self.ravan_B[adapter_name] = basis_B

        self.reset_ravan_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.save_projection and self.ravan_H[adapter_name].device.type == "meta":
            # low_cpu_mem_usage does not move buffers to meta; these are loaded from the checkpoint
            for bases in (self.ravan_A, self.ravan_B):
                bases[adapter_name] = bases[adapter_name].to("meta")
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _base_matrix(self) -> torch.Tensor:
        """The base weight as `[d_out, d_in]`."""
        # the layout conversions of all kinds of layers are their own inverse
        weight = self.get_base_weight()
        return self.to_weight_layout(weight) if weight.dim() == 2 else weight.flatten(1)

    def reset_ravan_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """
        Set the trained parameters of an adapter to their initial values: every s to 1, every H to 0.

        Args:
            adapter_name (`str`): The name of the adapter.
            init_weights (`bool`, *optional*, defaults to `True`): `False` gives a random H instead.
        """
        if adapter_name not in self.ravan_H:
            return
        nn.init.ones_(self.ravan_s[adapter_name])
        if init_weights:
            nn.init.zeros_(self.ravan_H[adapter_name])
        else:
            nn.init.normal_(self.ravan_H[adapter_name], std=1 / self.bases_scale[adapter_name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the active adapter weights into the base weights.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`):
                If `True`, the merge is done in a copy of the original weights, which is checked for NaNs before it
                replaces them.
            adapter_names (`list[str]`, *optional*):
                The names of the adapters to merge. If `None`, all active adapters are merged.

        Raises:
            ValueError: if the merged weights are not finite, with `safe_merge`.
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
        """Remove all merged adapter weights from the base weights."""
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
            `torch.Tensor`: The update in that layout, `[d_out, d_in]` or its counterpart, in the dtype of the adapter.
        """
        tensors = self.adapter_tensors(adapter)
        dtype = tensors[2].dtype
        # half precision products are slow on some CPUs, and this way there is only one rounding
        if tensors[2].device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            tensors = tuple(tensor.float() for tensor in tensors)
        return self.to_weight_layout(delta_weight(*tensors)).to(dtype)

    def adapter_tensors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A `[h*r, d_in]`, B `[d_out, h*r]`, H `[h, r, r]` and s `[h]` of an adapter, in the dtype of the bases."""
        core, scaling = self.ravan_H[adapter_name], self.ravan_s[adapter_name]
        if adapter_name in self.all_heads:
            core, scaling = self.all_heads[adapter_name].with_trained(core, scaling)
        basis_A, basis_B = self.ravan_A[adapter_name], self.ravan_B[adapter_name]
        # on a quantised model, TRL casts what is trained to bfloat16, and leaves the frozen bases as they are
        return basis_A, basis_B, core.to(basis_A.dtype), scaling.to(basis_A.dtype)

    def _cast_to_each_other(self, x: torch.Tensor, adapter_name: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """
        Cast the input to the dtype of the adapter, or the adapter to the dtype of the input if input casting is off.
        """
        tensors = self.adapter_tensors(adapter_name)
        if autocast_dtype(x) is not None:
            # products are computed in that dtype anyway, and an input that already has it is not cast back and forth
            return x, tensors
        if self.cast_input_dtype_enabled:
            return self._cast_input_dtype(x, tensors[0].dtype), tensors
        return x, tuple(tensor.to(x.dtype) for tensor in tensors)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        self._check_forward_args(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        return self._adapted_forward(x, *args, **kwargs)

    def _adapted_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self._base_result(x, *args, **kwargs)
        result_dtype = result.dtype
        for adapter_name in self.active_adapters:
            if adapter_name in self.ravan_H:
                result = self.add_delta(result, x, adapter_name)
        return result.to(result_dtype)

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """Compute each sample of the batch with the adapter named for it. `"__base__"` means no adapter."""
        result = self._base_result(x, *args, **kwargs)
        for adapter_name in dict.fromkeys(adapter_names):
            if adapter_name in self.ravan_H:
                rows = [index for index, name in enumerate(adapter_names) if name == adapter_name]
                result[rows] += self.compute_delta(x[rows], adapter_name).to(result.dtype)
        return result

    def _base_result(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        return (
            result if self.quantization_backend is None else self.quantization_backend.maybe_clone_base_result(result)
        )

    def _check_forward_args(self, x: torch.Tensor, adapter_names: list[str] | None) -> None:
        if adapter_names is None:
            return
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # PEFT only converts updates of `nn.Linear` layers
        return False

    def __repr__(self) -> str:
        return "ravan." + super().__repr__()

    def extra_repr(self) -> str:
        adapters = [
            f"{name}: {self.num_heads[name]} heads of rank {self.r[name]}, {self.init_bases[name]} bases"
            for name in self.r
        ]
        return "; ".join(part for part in [*adapters, quantization_extra_repr(self)] if part)


class Embedding(RavanLayer):
    # Ravan implemented in an embedding layer: a token selects a column of A, [h*r, num_embeddings]
    def to_weight_layout(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.T

    def compute_delta(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        basis_A, *tensors = self.adapter_tensors(adapter_name)
        delta = expand(F.embedding(x, basis_A.T), *tensors, self.gradient_heads(adapter_name))
        scale = self._get_embed_scale()
        return delta if scale is None else delta * scale.to(delta.dtype)


class Conv2d(RavanLayer):
    # Ravan implemented in a conv2d layer: A is a convolution with the same kernel size into h*r channels, B a
    # pointwise one
    @staticmethod
    def bases_size(base_layer: nn.Module) -> tuple[int, int]:
        return base_layer.weight[0].numel(), base_layer.out_channels

    def to_weight_layout(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.reshape(self.get_base_layer().weight.shape)

    def compute_delta(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        x, (basis_A, *tensors) = self._cast_to_each_other(x, adapter_name)
        x = self.ravan_dropout[adapter_name](x)
        # the base layer's own convolution, so that its stride and its padding mode apply, too
        base_layer = self.get_base_layer()
        if base_layer.groups > 1:
            kernel = self.to_weight_layout(delta_weight(basis_A, *tensors))
            return base_layer._conv_forward(x, kernel, None)
        kernel = basis_A.reshape(-1, *base_layer.weight.shape[1:])  # [h*r, channels, height, width]
        inner = base_layer._conv_forward(x, kernel, None)  # [N, h*r, height, width]
        return expand(inner.movedim(1, -1), *tensors, self.gradient_heads(adapter_name)).movedim(-1, 1)
