"""Tries out, once in a run, whether clients get the same from a common part of the model as alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .computation import CommonModel
from .replica import Call, Replica
from .rows import Inputs, leaves_of


# relative to the largest entry of an output
_TOLERANCE, _TOLERANCE_IN_HALF_PRECISION = 1e-3, 5e-2
_PLANTED = 0.05  # the size of the random numbers that are added to trained parameters


class UnsuitableModelError(ValueError):
    """The model mixes the rows of a batch, so it cannot compute several clients at once."""


def try_part(common: CommonModel, call: Call, inputs: Sequence[Inputs], replicas: Sequence[Replica]) -> bool:
    """
    Compare what clients get from a part of the model together and alone, without dropout, and with adapters that differ.

    Args:
        common ([`CommonModel`]): The model that computes them together.
        call ([`Call`]): The call of any of the clients.
        inputs (`Sequence[Inputs]`): The inputs of each client.
        replicas (`Sequence[Replica]`): The clients.

    Returns:
        `bool`: Whether they get the same. `False` if an input has led to an error for a client alone, so that nothing was
        found out.

    Raises:
        UnsuitableModelError: if they get something else together.
    """
    call = replace(call, with_gradients=False)
    models = [common.model, *(replica.trainer.model for replica in replicas)]
    with _evaluating(models), _planted([replica.trainer.model for replica in replicas]):
        try:
            alone = [common.alone(call, own, replica) for own, replica in zip(inputs, replicas, strict=True)]
        except Exception:
            return False
        try:
            together = common.outputs(call, inputs, replicas)
        except Exception as error:
            raise _unsuitable(call, len(replicas), f"it fails ({type(error).__name__}: {error})") from error
    is_half = call.autocast is not None or next(common.model.parameters()).dtype in (torch.float16, torch.bfloat16)
    tolerance = _TOLERANCE_IN_HALF_PRECISION if is_half else _TOLERANCE
    pairs = zip(leaves_of(together), leaves_of(alone), strict=True)
    if not all(_is_same(*pair, tolerance) for pair in pairs):
        raise _unsuitable(call, len(replicas), "its outputs for one client depend on the others")
    return True


def _unsuitable(call: Call, number: int, found: str) -> UnsuitableModelError:
    return UnsuitableModelError(
        f"`client_batching` puts the rows of {number} clients together, and the model cannot compute them so: {found}, in "
        f"{call.part!r}. This may be because it takes decisions or statistics from a whole batch. Set `client_batching=1`."
    )


def _is_same(found: Any, wanted: Any, tolerance: float) -> bool:
    if not (isinstance(found, torch.Tensor) and isinstance(wanted, torch.Tensor)):
        return True
    if found.shape != wanted.shape:
        return False
    if not wanted.is_floating_point() or not wanted.numel():
        return torch.equal(found, wanted)
    largest = wanted.abs().max().float().item()
    return torch.allclose(found.float(), wanted.float(), rtol=0, atol=tolerance * largest, equal_nan=True)


@contextlib.contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _planted(models: Sequence[nn.Module]) -> Iterator[None]:
    """Add random numbers to what is trained: an adapter that adds nothing yet would hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    trained = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    values = [parameter.detach().clone() for parameter in trained]
    try:
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(_PLANTED * torch.randn(parameter.shape, generator=generator).to(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, values, strict=True):
                parameter.copy_(value)
