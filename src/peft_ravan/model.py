from __future__ import annotations

import warnings

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, _maybe_include_all_linear_layers
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from .bases import BasesShape, check_bases_fit
from .config import RavanConfig
from .layer import Linear, RavanLayer


TRANSFORMERS_MODELS_TO_RAVAN_TARGET_MODULES_MAPPING = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "dinov2": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "vit": ["query", "value"],
}


def _get_supported_base_layer(target: nn.Module, target_name: str) -> nn.Module:
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base_layer, (nn.Linear, Conv1D)):
        return base_layer
    quantization_backend = resolve_quantization_backend(base_layer)
    if quantization_backend is not None and quantization_backend.layer_type == "linear":
        return base_layer
    raise TypeError(
        f"Target module {target_name!r} is a {type(base_layer).__name__}, which Ravan does not support. Supported are "
        "`torch.nn.Linear` (optionally quantized) and `transformers.pytorch_utils.Conv1D`. Name other modules in "
        "`target_modules`, or leave this one out with `exclude_modules`."
    )


class RavanModel(BaseTuner):
    """
    Creates a Ravan model from a pretrained transformers model.

    The method is described in detail in https://huggingface.co/papers/2506.05568.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`RavanConfig`]): The configuration of the Ravan model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The Ravan model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_ravan import RavanConfig

        >>> base_model = AutoModelForCausalLM.from_pretrained("facebook/opt-125m")
        >>> config = RavanConfig(r=55, num_heads=4)
        >>> model = get_peft_model(base_model, config)
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`RavanConfig`]): The configuration of the Ravan model.
    """

    prefix: str = "ravan_"
    tuner_layer_cls = RavanLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_RAVAN_TARGET_MODULES_MAPPING

    def _check_new_adapter_config(self, config: RavanConfig) -> None:
        """
        A helper method to check the config when a new adapter is being added.

        Raise a ValueError if there is something wrong with the config or if it conflicts with existing adapters.
        """
        super()._check_new_adapter_config(config)

        # whether buffers are persistent is a property of the container that all adapters of a layer share
        values = {existing.save_projection for existing in self.peft_config.values()}
        if len(values) > 1:
            raise ValueError(
                "`save_projection` must be the same for all adapters of a model, but got "
                f"save_projection={config.save_projection} for the new adapter and {not config.save_projection} for an "
                "existing one. Set the same value for both."
            )

    def _prepare_model(self, peft_config: RavanConfig, model: nn.Module) -> None:
        # Every target is checked before the first one is replaced: an error must not leave a half adapted model.
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        for key, module in model.named_modules():
            if not self._check_target_module_exists(peft_config, key):
                continue
            base_layer = _get_supported_base_layer(module, key)
            d_in, d_out = _get_in_out_features(base_layer)
            shape = BasesShape(d_in, d_out, peft_config.num_heads, peft_config.r)
            check_bases_fit(peft_config.init_bases, shape, key)

    def _create_and_replace(
        self,
        ravan_config: RavanConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")

        if isinstance(target, RavanLayer):
            target.update_layer(adapter_name, current_key, config=ravan_config)
            return

        new_module = self._create_new_module(
            ravan_config, adapter_name, target, current_key, **get_quantization_kwargs(self)
        )
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(
        ravan_config: RavanConfig, adapter_name: str, target: nn.Module, current_key: str, **kwargs
    ) -> Linear:
        # derived from the layer, not from the config: one model may have both kinds
        is_conv1d = isinstance(_get_supported_base_layer(target, current_key), Conv1D)
        if ravan_config.fan_in_fan_out and not is_conv1d:
            warnings.warn(
                "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. "
                "Setting fan_in_fan_out to False."
            )
            ravan_config.fan_in_fan_out = False
        return Linear(target, adapter_name, current_key, ravan_config, fan_in_fan_out=is_conv1d, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Unlike the parent class, do not touch weight and bias of a module that takes the place of its wrapper: with
        # trainable_token_indices those are read-only properties.
        setattr(parent, child_name, new_module)
        child = child.base_layer if hasattr(child, "base_layer") else child
        weight = getattr(child, "qweight", getattr(child, "W_q", getattr(child, "weight", None)))
        if weight is None:
            weight = next(child.parameters())
        for name, module in new_module.named_modules():
            tensors = [*module.parameters(), *module.buffers()]
            if self.prefix in name and not any(tensor.device == torch.device("meta") for tensor in tensors):
                module.to(weight.device)
