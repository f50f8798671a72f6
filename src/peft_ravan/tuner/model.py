from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    _maybe_include_all_linear_layers,
    replicate_layers,
)
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from .bases import BASES, BasesShape, check_bases_fit
from .config import RavanConfig
from .formed_weight import KEEP_UNTIL
from .layer import RavanLayer
from .linear import Linear
from .param_wrapper import ParamWrapper
from .patterns import check_patterns
from .saved_bases import SavedBases
from .targets import base_layer_of, check_is_called, layer_class, modules_to_match, warn_of_unmatched_heads
from .trained_heads import ModelTrainedHeads
from .weighted_adapter import (
    ON_SHARED_BASES,
    check_combination,
    combine_cores,
    combined_config,
    concatenate_heads,
    copy_modules_to_save,
    core_combination,
    have_shared_bases,
)


TRANSFORMERS_MODELS_TO_RAVAN_TARGET_MODULES_MAPPING = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "dinov2": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "vit": ["query", "value"],
}


def _pass_adapter_names(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


class RavanModel(ModelTrainedHeads, SavedBases, BaseTuner):
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

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel reads this from the model it wraps, which forwards the attribute to this one.
        # Otherwise it would send all buffers to all processes in every forward pass, although seeded bases are the
        # same everywhere.
        seeded = {
            name for name, config in self.peft_config.items() if BASES[config.init_bases].from_matrix != "gradient"
        }
        return [
            f"base_model.{name}"
            for name, _ in self.named_buffers()
            if name.split(".")[-2] in ("ravan_A", "ravan_B") and name.split(".")[-1] in seeded
        ]

    def _check_new_adapter_config(self, config: RavanConfig) -> None:
        """
        A helper method to check the config when a new adapter is being added.

        Raise a ValueError if there is something wrong with the config or if it conflicts with existing adapters.
        """
        super()._check_new_adapter_config(config)
        check_patterns(config, [name for name, _ in modules_to_match(self.model)])

        # all adapters of a layer share one container for their buffers, which is persistent or not as a whole
        values = {existing.save_projection for existing in self.peft_config.values()}
        if len(values) > 1:
            raise ValueError(
                "`save_projection` must be the same for all adapters of a model, but got "
                f"save_projection={config.save_projection} for the new adapter and {not config.save_projection} for an "
                "existing one. Set the same value for both."
            )

        # parameter wrappers are nested, so an adapter without one of them would be saved under different names
        parameters = {tuple(sorted(existing.target_parameters or ())) for existing in self.peft_config.values()} - {()}
        if len(parameters) > 1:
            raise ValueError(
                "With `target_parameters` all adapters must target the same set of parameters, or none, but got "
                f"{' and '.join(str(list(names)) for names in sorted(parameters))}."
            )

    @classmethod
    def target_sizes(cls, model: nn.Module, config: RavanConfig) -> dict[str, tuple[int, int]]:
        """
        Find the targets of a configuration in a base model.

        Args:
            model (`torch.nn.Module`): The base model.
            config ([`RavanConfig`]): The configuration. Default targets and `"all-linear"` are written into it.

        Returns:
            `dict[str, tuple[int, int]]`: Maps the names of the targets to d_in and d_out of their bases.

        Raises:
            TypeError: if Ravan does not support the type of a target.
            ValueError: if no targets are given and the architecture has no default, or if the model reads the weight
                of a target without calling it.
        """
        if config.target_modules is None:
            config.target_modules = cls.target_module_mapping.get(cls.get_model_config(model)["model_type"])
            if config.target_modules is None:
                raise ValueError("Please specify `target_modules` in `peft_config`")
        config = _maybe_include_all_linear_layers(config, model)
        sizes = {}
        for name, module in modules_to_match(model):
            if cls._check_target_module_exists(config, name):
                check_is_called(model, name)
                sizes[name] = layer_class(module, name).bases_size(base_layer_of(module))
        return sizes

    def _prepare_adapter_config(self, peft_config: RavanConfig, model_config: dict) -> RavanConfig:
        if peft_config.target_modules is None and peft_config.target_parameters:
            # with `target_parameters`, the default modules are not wanted in addition
            peft_config.target_modules = set()
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: RavanConfig, model: nn.Module) -> None:
        # Check every target before the first one is replaced, so that an error does not leave a half-adapted model.
        sizes = self.target_sizes(model, peft_config)
        for name, size in sizes.items():
            r, num_heads = peft_config.size_of(name)
            check_bases_fit(peft_config.init_bases, BasesShape(*size, num_heads, r), name)
        warn_of_unmatched_heads(peft_config, sizes)
        peft_config.base_model_config = getattr(model, "config", None)
        if peft_config.layer_replication:
            replicate_layers(model, peft_config.layer_replication)

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

        if parameter_name is not None:
            # a wrapper of another parameter of the same module gets another wrapper around it
            if isinstance(target, ParamWrapper) and target.parameter_name == parameter_name:
                target.update_layer(adapter_name, current_key, config=ravan_config)
                return
            new_module = ParamWrapper(target, adapter_name, current_key, ravan_config, parameter_name)
        elif isinstance(target, RavanLayer):
            target.update_layer(adapter_name, current_key, config=ravan_config)
            return
        else:
            kwargs = get_quantization_kwargs(self)
            new_module = self._create_new_module(ravan_config, adapter_name, target, current_key, **kwargs)
        if adapter_name not in self.active_adapters:
            # an additional adapter is not automatically trainable
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(
        ravan_config: RavanConfig, adapter_name: str, target: nn.Module, current_key: str, **kwargs
    ) -> RavanLayer:
        kind = layer_class(target, current_key)
        if kind is not Linear:
            return kind(target, adapter_name, current_key, ravan_config, **kwargs)
        # determined by the layer, not by the config, because one model may have both kinds
        is_conv1d = isinstance(base_layer_of(target), Conv1D)
        if ravan_config.fan_in_fan_out and not is_conv1d:
            warnings.warn(
                "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. "
                "Setting fan_in_fan_out to False."
            )
            ravan_config.fan_in_fan_out = False
        return Linear(target, adapter_name, current_key, ravan_config, fan_in_fan_out=is_conv1d, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Unlike the parent class, do not touch weight and bias of a module that replaces its wrapper. With
        # trainable_token_indices, those are read-only properties.
        setattr(parent, child_name, new_module)
        child = child.base_layer if hasattr(child, "base_layer") else child
        weight = getattr(child, "qweight", getattr(child, "W_q", getattr(child, "weight", None)))
        if weight is None:
            weight = next(child.parameters())
        for name, module in new_module.named_modules():
            tensors = [*module.parameters(), *module.buffers()]
            if self.prefix in name and not any(tensor.device == torch.device("meta") for tensor in tensors):
                module.to(weight.device)

    def _add_modules_to_save_to_tie(self, peft_config: RavanConfig, tied_weight_keys: list[str]) -> None:
        # The input embeddings are saved, and PEFT ties the same layers to them as the base model.
        peft_config.modules_to_tie = set(tied_weight_keys)
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        is_tied = [
            module
            for module in peft_config.modules_to_save or ()
            if any(re.match(rf"(^|.*\.){module}($|\..*)", key) for key in tied_weight_keys)
        ]
        kept = [module for module in peft_config.modules_to_save or () if module not in is_tied]
        peft_config.modules_to_save = list(dict.fromkeys([*kept, name]))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        # passes `adapter_names` of a mixed batch to the layers, since the base model does not accept this argument
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, (RavanLayer, AuxiliaryTrainingWrapper))]
        # a layer may lack an adapter, but a name that no layer has is a typo
        known = {name for layer in layers if isinstance(layer, RavanLayer) for name in layer.ravan_H}
        unknown = sorted({*adapter_names} - known - {"__base__"})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

        # beam search repeats the inputs of the decoder, not those of an encoder
        repeated = [name for name in adapter_names for _ in range(kwargs.get("num_beams") or 1)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        in_encoder = set() if encoder is None or encoder is self.model else set(encoder.modules())
        handles = [
            layer.register_forward_pre_hook(
                partial(_pass_adapter_names, adapter_names=adapter_names if layer in in_encoder else repeated),
                with_kwargs=True,
            )
            for layer in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keep_formed_weights(self, until: str | None = "backward") -> None:
        """
        Choose how long linear layers keep their formed weight `W + sum_i s_i B_i H_i A_i`, if they compute with it. It
        has as many numbers as the base weight. This is not saved with the adapter.

        Args:
            until (`str`, *optional*, defaults to `"backward"`):
                `"backward"` keeps it from the forward pass until the backward pass has used it, if it is not larger
                than the input and the output of the layer together. `None` forms it again in the backward pass, which
                takes less memory. `"changed"` keeps it in addition for further passes, until the adapter, the bases or
                the base weight have changed. This saves time over the steps of gradient accumulation and in
                evaluation, and takes as much memory as the adapted weights also while nothing is computed.

        Raises:
            ValueError: if `until` is something else.
        """
        if until not in KEEP_UNTIL:
            raise ValueError(f"`until` must be 'backward', 'changed' or None, got {until!r}.")
        for module in self.model.modules():
            if isinstance(module, Linear):
                module.keep_formed_weight(until)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """
        Combine adapters into a new one.

        Args:
            adapters (`list[str]`):
                The names of the adapters.
            weights (`list[float]`):
                Their weights.
            adapter_name (`str`):
                The name of the new adapter. If an adapter of that name exists, nothing happens.
            combination_type (`str`, *optional*):
                `"linear"` takes the weighted sum of the products s*H. It needs adapters with the same bases and keeps
                their size. `"cat"` stacks the heads and works with any bases. Both are exact: the weight update is the
                weighted sum. The default is `"linear"` if the bases are the same, otherwise `"cat"`. `"ties"`,
                `"dare_linear"`, `"dare_ties"` and `"magnitude_prune"` act on the products and need the same bases,
                too.
            density (`float`, *optional*):
                The share of entries to keep, for the combinations that prune.
            majority_sign_method (`str`, *optional*, defaults to `"total"`):
                `"total"` or `"frequency"`, for the combinations that elect a sign.

        Raises:
            ValueError: if the adapters cannot be combined that way. Nothing is changed in that case.
        """
        if adapter_name in self.peft_config:
            return
        check_combination(self, adapters, weights, combination_type or "linear", density)
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, RavanLayer) and any(adapter in module.ravan_H for adapter in adapters)
        }
        present = {name: [a for a in adapters if a in layer.ravan_H] for name, layer in layers.items()}
        different = [name for name, layer in layers.items() if not have_shared_bases(layer, present[name])]
        if different and combination_type in ON_SHARED_BASES:
            raise ValueError(
                f"combination_type={combination_type!r} needs adapters with the same bases, but at {different[0]!r} they "
                "differ: they were made with another `projection_seed`, size or `init_bases`. Use 'cat'."
            )
        concatenate = combination_type == "cat" or bool(different)
        self.peft_config[adapter_name] = combined_config(self, layers, adapters, concatenate)
        self.inject_adapter(self.model, adapter_name)
        weight_of = dict(zip(adapters, weights, strict=True))
        combine = core_combination(combination_type or "linear", density, majority_sign_method)
        with torch.no_grad():
            for name, layer in layers.items():
                layer_weights = [weight_of[adapter] for adapter in present[name]]
                if concatenate:
                    concatenate_heads(layer, present[name], layer_weights, adapter_name)
                else:
                    combine_cores(layer, present[name], layer_weights, adapter_name, combine)
        copy_modules_to_save(self, adapters, adapter_name)
        self.set_requires_grad(adapter_name, requires_grad=False)
