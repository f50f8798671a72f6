"""
Additions to the objective of a client: FedProx's pull towards the global adapter, and SCAFFOLD's control variates.

Both are terms of the gradient. They are added right before an optimizer step, after clipping. So they work with every
trainer and optimizer, with mixed precision and with gradient accumulation, and the reported loss is the client's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


SCAFFOLD_PREFIX = "scaffold."


class GradientCorrection:
    """
    Corrects the gradients in the local training of one client.

    FedProx (Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020) adds `mu * (w - w_global)`. SCAFFOLD
    (Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, ICML 2020) adds `c - c_i`. The
    client's new control variate is the mean of its gradients over all steps, which for SGD is option II of the paper.
    If the loss of a step does not depend on a parameter, its gradient counts as zero, and both terms are added to it.

    Args:
        model (`torch.nn.Module`):
            The model, with the global adapter loaded and with the parameters that the client trains.
        proximal_mu (`float`):
            FedProx's mu; 0 disables it.
        server_control (`Mapping[str, torch.Tensor]`, *optional*):
            SCAFFOLD's c, by parameter names. Missing entries count as zeros. `None` without SCAFFOLD.
        client_control (`Mapping[str, torch.Tensor]`, *optional*):
            SCAFFOLD's c_i, in the same form.
    """

    def __init__(
        self,
        model: nn.Module,
        proximal_mu: float = 0.0,
        server_control: Mapping[str, torch.Tensor] | None = None,
        client_control: Mapping[str, torch.Tensor] | None = None,
    ):
        self.proximal_mu = proximal_mu
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._global = {name: p.detach().clone() for name, p in self._parameters.items()} if proximal_mu else {}
        self._uses_control = server_control is not None
        self._server_control, self._client_control = server_control or {}, client_control or {}
        self._means: dict[str, torch.Tensor] = {}
        self._num_steps = 0

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        """The hook before an optimizer step."""
        self._num_steps += 1
        for name, parameter in self._parameters.items():
            if self._uses_control:
                self._take_into_mean(name, parameter.grad)
            if parameter.grad is None:
                if not self._has_term(name):
                    continue
                parameter.grad = torch.zeros_like(parameter)
            gradient = parameter.grad
            if self._uses_control:
                gradient.add_(self._control(self._server_control, name) - self._control(self._client_control, name))
            if self.proximal_mu:
                gradient.add_(parameter - self._global[name], alpha=self.proximal_mu)

    def _take_into_mean(self, name: str, gradient: torch.Tensor | None) -> None:
        if gradient is None and name not in self._means:
            return  # the mean is zero so far
        mean = self._means.get(name)
        if mean is None:
            mean = self._means[name] = torch.zeros_like(gradient, dtype=torch.float32)
        mean.lerp_(torch.zeros_like(mean) if gradient is None else gradient.float(), 1 / self._num_steps)

    def _has_term(self, name: str) -> bool:
        """Whether anything but zero is added to the gradient of a parameter."""
        if any(control[name].any() for control in (self._server_control, self._client_control) if name in control):
            return True
        return bool(self.proximal_mu) and not torch.equal(self._parameters[name], self._global[name])

    def _control(self, control: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        parameter = self._parameters[name]
        return control[name].to(parameter) if name in control else torch.zeros_like(parameter)

    def new_client_control(self) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict[str, torch.Tensor]`: The client's new c_i, on the CPU: the mean of its gradients over the steps.
            Parameters without a gradient in any step are left out.
        """
        return {name: mean.cpu() for name, mean in self._means.items()}


def of_scaffold(kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Args:
        kept (`Mapping[str, torch.Tensor]`): The tensors that a client keeps, or the memory of the server.

    Returns:
        `dict[str, torch.Tensor]`: The control variate among them, by parameter names.
    """
    prefixed = {name: tensor for name, tensor in kept.items() if name.startswith(SCAFFOLD_PREFIX)}
    return {name.removeprefix(SCAFFOLD_PREFIX): tensor for name, tensor in prefixed.items()}


def control_change(old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Args:
        old (`Mapping[str, torch.Tensor]`): A client's c_i before the round. Missing entries count as zeros.
        new (`Mapping[str, torch.Tensor]`): Its c_i after the round.

    Returns:
        `dict[str, torch.Tensor]`: Their difference, which the client uploads.
    """
    changes = {name: tensor - old[name] if name in old else tensor for name, tensor in new.items()}
    return {**changes, **{name: -tensor for name, tensor in old.items() if name not in new}}


def control_sent(
    new: Mapping[str, torch.Tensor], change: Mapping[str, torch.Tensor], sent: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    Args:
        new (`Mapping[str, torch.Tensor]`): A client's c_i after the round.
        change (`Mapping[str, torch.Tensor]`): Its change, as returned by [`control_change`].
        sent (`Mapping[str, torch.Tensor]`): The change that the server reads, which may be rounded.

    Returns:
        `dict[str, torch.Tensor]`: The c_i that the client keeps, which differs from the new one by what was rounded. So
        the server's c stays the mean of all c_i.
    """
    rounded = {name: sent[name].float() - tensor for name, tensor in change.items() if sent[name] is not tensor}
    return {**new, **{name: new[name] + error if name in new else error for name, error in rounded.items()}}
