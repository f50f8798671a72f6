"""A trainer of its own for each client that trains at the same time, on the same base model."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .lanes import Lane


@dataclass(frozen=True)
class Call:
    """
    The call of a part of a model by a client, which waits for its outputs.

    Args:
        part (`str`): The name of the part.
        named (`Mapping[str, Any]`): Its inputs by name.
        with_gradients (`bool`): Whether gradients are needed.
        autocast (`torch.dtype`, *optional*): The dtype of mixed precision, or `None` without it.
    """

    part: str
    named: Mapping[str, Any]
    with_gradients: bool
    autocast: torch.dtype | None


@dataclass(frozen=True)
class Backward:
    """
    A loss of a client, which waits for its gradients.

    Args:
        loss (`torch.Tensor`): The loss.
    """

    loss: torch.Tensor


ALONE = object()  # the answer to a call that the client has to compute by itself


class Replica:
    """
    A copy of a trainer and its model with adapters of its own. All frozen tensors are shared with the original. While it
    trains, it asks for the outputs of the common parts of the model, and for gradients.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.
        parts (`Sequence[str]`): The names of the common parts.
        layers (`Sequence[str]`): The names of the layers in them that clients train.

    **Attributes**:
        - **trainer** ([`~transformers.Trainer`]) -- The copy.
        - **layers** (`dict[str, nn.Module]`) -- Its layers.
        - **lane** ([`Lane`], *optional*) -- Where it trains.
    """

    def __init__(self, trainer: Trainer, parts: Sequence[str], layers: Sequence[str]):
        self.lane: Lane | None = None
        self._is_asking = False
        self._original = trainer
        self.trainer = copy.copy(trainer)
        model, optimizer = _copy_of_trained(trainer)
        accelerator = copy.copy(trainer.accelerator)
        accelerator.backward = self._backward
        model.train = functools.partial(self._train_mode, model.train)
        model.parameters = functools.partial(self._parameters, model.parameters)
        self._known_parameters: list[nn.Parameter] | None = None
        self._own = {
            "model": model,
            "model_wrapped": model,
            "accelerator": accelerator,
            "optimizer_cls_and_kwargs": optimizer,
            "training_step": self._training_step,
        }
        self.refresh()
        self.layers = {name: model.get_submodule(name) for name in layers}
        for name in parts:
            part = model.get_submodule(name)
            part.forward = self._asking(name, part.forward, trainer.model.get_submodule(name).forward)

    def refresh(self) -> None:
        """Take over all attributes of the original trainer, except for the model and what depends on it."""
        vars(self.trainer).clear()
        vars(self.trainer).update({**vars(self._original), **self._own})
        self._known_parameters = None  # which heads are trained differs from client to client

    def _train_mode(self, train: Callable, mode: bool = True) -> nn.Module:
        model = self._own["model"]
        return model if self._is_asking and mode and model.training else train(mode)

    def _parameters(self, parameters: Callable, recurse: bool = True) -> Iterator[nn.Parameter]:
        if not recurse or self._known_parameters is None:
            return parameters(recurse)
        return iter(self._known_parameters)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Ask for nothing within a context, since this is what computes the answers."""
        before, self._is_asking = self._is_asking, False
        try:
            yield
        finally:
            self._is_asking = before

    def _training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._is_asking = self.lane is not None
        if self._known_parameters is None:
            self._known_parameters = list(self._own["model"].parameters())
        try:
            return type(self.trainer).training_step(self.trainer, *args, **kwargs)
        finally:
            self._is_asking = False

    def _backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        if self._is_asking:
            self.lane.ask(Backward(loss))
        else:
            self._original.accelerator.backward(loss, **kwargs)

    def _asking(self, part: str, forward: Callable, original: Callable) -> Callable:
        names = _positional_names(original)

        @functools.wraps(forward)
        def ask(*args: Any, **kwargs: Any) -> Any:
            if not self._is_asking or self._has_other_adapters() or len(args) > len(names):
                return forward(*args, **kwargs)
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            named.pop("num_items_in_batch", None)  # of this client, for its loss
            device = self.trainer.args.device.type
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            answer = self.lane.ask(Call(part, named, torch.is_grad_enabled(), autocast))
            return forward(*args, **kwargs) if answer is ALONE else answer

        return ask

    def _has_other_adapters(self) -> bool:
        """Whether the trainer has switched adapters off, or to others, as for the reference of DPO."""
        active = self._original.model.active_adapters
        return any(
            getattr(layer, "disable_adapters", False)
            or getattr(layer, "merged", False)
            or list(layer.active_adapters) != active
            for layer in self.layers.values()
            if hasattr(layer, "active_adapters")
        )


def _positional_names(forward: Callable) -> list[str]:
    parameters = inspect.signature(forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _copy_of_trained(trainer: Trainer) -> tuple[nn.Module, Any]:
    """A copy of the model and of what may refer to its parameters. Frozen parameters and bases are shared."""
    model = trainer.model
    shared = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    shared += [buffer for name, buffer in model.named_buffers() if ".ravan_" in name]
    return copy.deepcopy((model, trainer.optimizer_cls_and_kwargs), {id(tensor): tensor for tensor in shared})
