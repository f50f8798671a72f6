"""Computes parts of the model for several clients at once, each with its own adapter, and their gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .layers import forward_of_all
from .replica import Call, Replica
from .rows import Inputs, Rows


class CommonModel:
    """
    The model that computes the common parts for several clients.

    Args:
        model ([`~peft.PeftModel`]): The model.
        layers (`Sequence[str]`): The names of the layers that clients train.

    **Attributes**:
        - **model** ([`~peft.PeftModel`]) -- The model.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]):
        self.model, self._layers = model, layers
        config = getattr(model, "config", None)
        padding = getattr(config, "pad_token_id", None)
        self.padding = padding if isinstance(padding, int) and padding >= 0 else 0

    def inputs_of(self, call: Call) -> Inputs:
        """
        Args:
            call ([`Call`]): The call of a client.

        Returns:
            [`Inputs`]: Its inputs.

        Raises:
            CannotBatchError: if it has no inputs with rows.
        """
        return Inputs(call.named, self.padding)

    def outputs(self, call: Call, inputs: Sequence[Inputs], replicas: Sequence[Replica]) -> list[Any]:
        """
        Args:
            call ([`Call`]): The call of any of the clients.
            inputs (`Sequence[Inputs]`): The inputs of each client, which are of the same kind.
            replicas (`Sequence[Replica]`): The clients.

        Returns:
            `list[Any]`: The outputs of each client.

        Raises:
            CannotBatchError: if inputs cannot be put together, or outputs not taken apart.
        """
        rows = Rows(inputs)
        with self._with_layers_of(replicas, rows), self._as_in(call):
            # not the module itself: its hooks run for each client
            return rows.split_outputs(self.model.get_submodule(call.part).forward(**rows.joined_inputs()))

    def alone(self, call: Call, inputs: Inputs, replica: Replica) -> Any:
        """
        Args:
            call ([`Call`]): The call of any of the clients.
            inputs ([`Inputs`]): The inputs of one of them.
            replica ([`Replica`]): This client.

        Returns:
            The outputs that it computes by itself.
        """
        with replica.answering(), self._as_in(call):
            return replica.trainer.model.get_submodule(call.part).forward(**inputs.named)

    @contextlib.contextmanager
    def _as_in(self, call: Call) -> Iterator[None]:
        device = next(self.model.parameters()).device.type
        autocast = torch.autocast(device, dtype=call.autocast, enabled=call.autocast is not None)
        with torch.set_grad_enabled(call.with_gradients), autocast:
            yield

    @contextlib.contextmanager
    def _with_layers_of(self, replicas: Sequence[Replica], rows: Rows) -> Iterator[None]:
        layers = {name: self.model.get_submodule(name) for name in self._layers}
        with contextlib.ExitStack() as stack:
            for replica in replicas:
                stack.enter_context(replica.answering())
            for name, layer in layers.items():
                layer.forward = forward_of_all([replica.layers[name] for replica in replicas], rows)
                stack.callback(vars(layer).pop, "forward")
            yield


def compute_gradients(losses: Sequence[torch.Tensor]) -> None:
    """
    Add the gradients of the losses of several clients to their parameters.

    Args:
        losses (`Sequence[torch.Tensor]`): A loss of each client.
    """
    torch.autograd.backward(list(losses))
