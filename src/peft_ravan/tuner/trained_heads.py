"""
Training only some heads of an adapter. The other heads keep their values and still contribute to the output, but need
no gradient, no optimizer state and no upload.

While only some heads are trained, the trained parameters of a layer hold only these heads, `[k, r, r]` and `[k]`, so
that everything derived from them (gradients, moments of an optimizer) has k heads, too. The parameters of all heads
are set aside. They are updated in place with the trained values when all heads are trained again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn


HeadMask = torch.Tensor | Sequence[bool]


class AllHeads(nn.Module):
    """
    The parameters of all heads, while only some of them are trained. The values of the trained heads are outdated here
    until [`AllHeads.write`] is called. This is a module so that it can be moved and cast, but it is not registered in
    the model.

    Args:
        core (`torch.nn.Parameter`): H, `[h, r, r]`.
        scaling (`torch.nn.Parameter`): s, `[h]`.
        heads (`torch.Tensor`): The sorted indices of the trained heads, `[k]`.
    """

    def __init__(self, core: nn.Parameter, scaling: nn.Parameter, heads: torch.Tensor):
        super().__init__()
        self.core = core
        self.scaling = scaling
        self.register_buffer("heads", heads)

    def with_trained(self, core: torch.Tensor, scaling: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """H `[h, r, r]` and s `[h]`, with gradients only to the trained heads, `[k, r, r]` and `[k]`."""
        if not len(self.heads):
            return self.core.detach(), self.scaling.detach()
        return (
            self.core.detach().index_copy(0, self.heads, core),
            self.scaling.detach().index_copy(0, self.heads, scaling),
        )

    @torch.no_grad()
    def write(self, core: torch.Tensor, scaling: torch.Tensor) -> None:
        """Update the values of the trained heads in place."""
        self.core[self.heads] = core
        self.scaling[self.heads] = scaling


class LayerTrainedHeads:
    """The part of a [`RavanLayer`] for training only some heads."""

    # each expert has its own heads, which a mask of h entries cannot describe
    can_train_some_heads = True

    def check_trained_heads(self, adapter_name: str, mask: HeadMask | None, target: str = "") -> torch.Tensor:
        """
        Args:
            adapter_name (`str`): The name of the adapter.
            mask (`torch.Tensor` or `Sequence[bool]`, *optional*): Which heads are trained, `[h]`. `None` means all.
            target (`str`, *optional*): The name of this layer, for the message.

        Returns:
            `torch.Tensor`: The mask as a bool tensor, `[h]`.

        Raises:
            ValueError: if it is not a mask of the heads of this layer.
        """
        num_heads = self.num_experts * self.num_heads[adapter_name]
        if mask is None:
            return torch.ones(num_heads, dtype=torch.bool)
        name = f"the target {target!r}" if target else "this layer"
        mask = torch.as_tensor(mask)
        if mask.dtype != torch.bool or mask.shape != (num_heads,):
            raise ValueError(
                f"A mask of trained heads must have one bool for each head, but for {name}, which has {num_heads} heads, got "
                f"{mask.dtype} of shape {tuple(mask.shape)}. Pass `None` to train all of them."
            )
        if not (self.can_train_some_heads or mask.all()):
            raise ValueError(
                f"A part of the heads can be trained at layers only, but {name} is a parameter (`target_parameters`). Leave it "
                "out of the masks, which trains all its heads."
            )
        return mask.cpu()

    def set_trained_heads(self, adapter_name: str, mask: HeadMask | None) -> None:
        """
        Choose which heads of an adapter are trained. See [`RavanModel.set_trained_heads`].

        Args:
            adapter_name (`str`): The name of the adapter.
            mask (`torch.Tensor` or `Sequence[bool]`, *optional*): Which heads are trained, `[h]`. `None` means all.

        Raises:
            ValueError: if it is not a mask of the heads of this layer.
        """
        mask = self.check_trained_heads(adapter_name, mask)
        self._train_all_heads(adapter_name)
        if mask.all():
            return
        core, scaling = self.ravan_H[adapter_name], self.ravan_s[adapter_name]
        core.grad = scaling.grad = None
        heads = mask.nonzero().flatten().to(core.device)
        self.all_heads[adapter_name] = AllHeads(core, scaling, heads)
        self.ravan_H[adapter_name] = nn.Parameter(core.detach()[heads], requires_grad=core.requires_grad)
        self.ravan_s[adapter_name] = nn.Parameter(scaling.detach()[heads], requires_grad=scaling.requires_grad)

    def _train_all_heads(self, adapter_name: str) -> None:
        if adapter_name not in self.all_heads:
            return
        self._write_trained_heads(adapter_name)
        everything = self.all_heads.pop(adapter_name)
        # the adapter may have been activated or deactivated in the meantime
        everything.core.requires_grad_(self.ravan_H[adapter_name].requires_grad)
        everything.scaling.requires_grad_(self.ravan_s[adapter_name].requires_grad)
        self.ravan_H[adapter_name], self.ravan_s[adapter_name] = everything.core, everything.scaling

    def _write_trained_heads(self, adapter_name: str) -> None:
        self.all_heads[adapter_name].write(self.ravan_H[adapter_name], self.ravan_s[adapter_name])

    def trained_heads(self, adapter_name: str) -> torch.Tensor:
        """
        Args:
            adapter_name (`str`): The name of the adapter.

        Returns:
            `torch.Tensor`: Which of its heads are trained, a bool tensor `[h]` on the CPU.
        """
        mask = self.check_trained_heads(adapter_name, None)
        if adapter_name in self.all_heads:
            mask = torch.zeros_like(mask)
            mask[self.all_heads[adapter_name].heads.cpu()] = True
        return mask

    def gradient_heads(self, adapter_name: str) -> torch.Tensor | None:
        """The indices of the heads that need a gradient, `[k]`. `None` if all heads or no heads need one."""
        everything = self.all_heads.get(adapter_name)
        return None if everything is None or not len(everything.heads) else everything.heads

    # ---- What is visible from outside: always all heads ---------------------------

    def state_dict(self, *args, **kwargs) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for adapter_name, everything in self.all_heads.items():
            self._write_trained_heads(adapter_name)
            for part, tensor in (("ravan_H", everything.core), ("ravan_s", everything.scaling)):
                state[f"{prefix}{part}.{adapter_name}"] = tensor if kwargs.get("keep_vars") else tensor.detach()
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args) -> None:
        # called before the parameters of this layer are loaded from the same dict
        for adapter_name, everything in self.all_heads.items():
            for part, tensor in (("ravan_H", everything.core), ("ravan_s", everything.scaling)):
                loaded = state_dict.get(f"{prefix}{part}.{adapter_name}")
                if loaded is not None and loaded.shape == tensor.shape:
                    tensor.data.copy_(loaded)
                    state_dict[f"{prefix}{part}.{adapter_name}"] = tensor.detach()[everything.heads]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args, **kwargs) -> nn.Module:
        super()._apply(fn, *args, **kwargs)
        for everything in self.all_heads.values():
            everything._apply(fn, *args, **kwargs)
        return self


class ModelTrainedHeads:
    """The part of a [`RavanModel`] for training only some heads."""

    def _targets(self, adapter_name: str | None) -> tuple[str, dict[str, LayerTrainedHeads]]:
        if adapter_name is None:
            if len(self.active_adapters) != 1:
                raise ValueError(
                    f"Without `adapter_name` exactly one adapter must be active, got {self.active_adapters}. Name one."
                )
            [adapter_name] = self.active_adapters
        if adapter_name not in self.peft_config:
            raise ValueError(f"There is no adapter {adapter_name!r}, only {list(self.peft_config)}.")
        return adapter_name, {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, LayerTrainedHeads) and adapter_name in module.ravan_H
        }

    def set_trained_heads(self, masks: Mapping[str, HeadMask | None] | None, adapter_name: str | None = None) -> None:
        """
        Choose which heads of an adapter are trained. The others are frozen: they keep their values and still
        contribute to the output, but have no gradients and no optimizer state.

        Until all heads are trained again, `ravan_H` is `[k, r, r]` and `ravan_s` is `[k]` at a target with k trained
        heads. These are new parameters, so create the optimizer afterwards. Saving, merging and combining still use
        all heads.

        Args:
            masks (`dict[str, torch.Tensor]`, *optional*):
                Maps names of targets within the base model to masks of the trained heads, `[h]`: bool tensors or lists
                of bools. A mask without a true entry freezes the target. Targets that are not named train all their
                heads. With `None`, all targets do.
            adapter_name (`str`, *optional*):
                The name of the adapter, by default the active one.

        Raises:
            ValueError: if there is no such adapter or target, or if a mask does not fit its target. Nothing is changed
                in that case.

        Example:

            ```py
            >>> masks = {name: [True, True, False, False] for name in model.trained_heads()}
            >>> model.set_trained_heads(masks)
            >>> trainer = Trainer(model, args, train_dataset=dataset)
            >>> trainer.train()
            >>> model.set_trained_heads(None)
            ```
        """
        masks = masks or {}
        adapter_name, layers = self._targets(adapter_name)
        unknown = [name for name in masks if name not in layers]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is not a target of the adapter {adapter_name!r}. Its targets are the keys of "
                "`model.trained_heads()`."
            )
        for name, mask in masks.items():
            layers[name].check_trained_heads(adapter_name, mask, name)
        for name, layer in layers.items():
            layer.set_trained_heads(adapter_name, masks.get(name))

    def trained_heads(self, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """
        Which heads of an adapter are trained.

        Args:
            adapter_name (`str`, *optional*): The name of the adapter, by default the active one.

        Returns:
            `dict[str, torch.Tensor]`: Maps the names of all targets to bool tensors, `[h]`.

        Raises:
            ValueError: if there is no such adapter.
        """
        adapter_name, layers = self._targets(adapter_name)
        return {name: layer.trained_heads(adapter_name) for name, layer in layers.items()}
