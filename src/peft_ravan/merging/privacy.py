"""
Client-level differential privacy: the influence of one client on a mean is bounded, and Gaussian noise hides it.

McMahan et al., Learning Differentially Private Recurrent Language Models, ICLR 2018, with uniform weights and a fixed number
of clients. An upload is clipped as a whole, with one norm over all tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..tuner.state import has_part
from .changes import clip_change, working_dtype
from .method import MergeMethod
from .methods.registry import MERGE_METHODS
from .updates import ClientUpdate, MergeResult


@dataclass(frozen=True)
class GaussianMechanism:
    """
    Bounds and hides the influence of a client on a merge: the result is the mean of the clipped changes plus Gaussian
    noise.

    If the upload of one client is replaced, the mean moves by at most `2 * clip_norm / num_clients`. If it is missing,
    the mean moves by at most `clip_norm / num_clients`. The noise on each entry has the standard deviation
    `noise_std`.

    Args:
        clip_norm (`float`):
            The largest L2 norm of a client's change, over all tensors together.
        noise_multiplier (`float`):
            The standard deviation of the noise on the sum of the changes, divided by `clip_norm`.
        num_clients (`int`):
            The number of clients that were asked. A client that fails, or whose upload does not fit, counts as one
            that changed nothing, since a divisor that depends on the clients would reveal something about them.
        seed (`int` or `Sequence[int]`, *optional*):
            The seed of the noise. Anyone who knows it can remove the noise. By default it comes from the operating
            system.

    Raises:
        ValueError: if a number is out of range, or the noise would have to hide changes of any size.
    """

    clip_norm: float
    noise_multiplier: float
    num_clients: int
    seed: int | Sequence[int] | None = field(default=None, repr=False)

    def __post_init__(self):
        check_clipping(self.clip_norm, self.noise_multiplier)
        if self.num_clients < 1:
            raise ValueError(f"`num_clients` must be 1 or more, got {self.num_clients!r}.")

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise on each entry of the mean."""
        return self.noise_multiplier * self.clip_norm / self.num_clients if self.noise_multiplier else 0.0


def check_clipping(clip_norm: float, noise_multiplier: float) -> None:
    """
    Args:
        clip_norm (`float`): Must be above 0, and finite if there is noise.
        noise_multiplier (`float`): Must be finite, and 0 or more.

    Raises:
        ValueError: if one of these conditions is violated.
    """
    if not clip_norm > 0:
        raise ValueError(f"`clip_norm` must be above 0, got {clip_norm!r}.")
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise ValueError(f"`noise_multiplier` must be a finite number, 0 or more, got {noise_multiplier!r}.")
    if noise_multiplier and math.isinf(clip_norm):
        raise ValueError(
            f"`clip_norm` is infinite, so no noise hides what a client changes, but `noise_multiplier` is {noise_multiplier}. "
            "Give a finite `clip_norm`, or no noise."
        )


def gaussian_noise(
    shapes: Mapping[str, torch.Size], std: float, seed: int | Sequence[int] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Args:
        shapes (`Mapping[str, torch.Size]`): Names to shapes, in any order.
        std (`float`): The standard deviation.
        seed (`int` or `Sequence[int]`, *optional*): The seed, by default from the operating system.

    Yields:
        `tuple[str, torch.Tensor]`: A name and independent Gaussian noise in float64.
    """
    # not torch's generator, which uses only 32 bits of a seed on a CPU: few enough to try them all
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    for name in sorted(shapes):
        yield name, torch.from_numpy(np.asarray(generator.standard_normal(tuple(shapes[name])))).mul_(std)


def merge_privately(
    method: MergeMethod,
    global_state: Mapping[str, torch.Tensor],
    updates: Iterable[ClientUpdate],
    mechanism: GaussianMechanism,
    options: Mapping[str, Any],
    frozen: tuple[str, ...] = (),
) -> MergeResult:
    """
    Merge the clipped changes with uniform weights and add noise to their mean.

    Args:
        method ([`MergeMethod`]): A method that is a plain mean.
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Iterable[ClientUpdate]`): What clients uploaded, checked. None of them is kept.
        mechanism ([`GaussianMechanism`]): How to bound and hide the changes.
        options (`Mapping[str, Any]`): The options of the method.
        frozen (`tuple[str, ...]`, *optional*): Parts of names of tensors that are frozen in this round and get no
            noise.

    Returns:
        [`MergeResult`]: The new state. Under `privacy`, the diagnostics contain the figures of the mechanism and the
        number of uploads that were clipped (`clipped`). That number is not protected.

    Raises:
        ValueError: if the method is not a plain mean, or there are more updates than clients that were asked.
    """
    check_plain_mean(method)
    # average changes, so that rounding is relative to the change and not to a weight that may be much larger
    nothing = {
        name: torch.zeros(tensor.shape, dtype=working_dtype(tensor), device=tensor.device)
        for name, tensor in global_state.items()
    }
    norms: list[float] = []
    result = method.function(nothing, _uniform(global_state, nothing, updates, mechanism, norms), **options)
    _add_noise(result.state, mechanism, frozen + method.personal_parts)
    state = {
        name: (tensor.to(nothing[name]) + result.state[name]).to(tensor.dtype) for name, tensor in global_state.items()
    }
    figures = {
        "clip_norm": mechanism.clip_norm,
        "noise_multiplier": mechanism.noise_multiplier,
        "noise_std": mechanism.noise_std,
        "num_clients": mechanism.num_clients,
        "clipped": sum(norm > mechanism.clip_norm for norm in norms),
    }
    return MergeResult(state, {**result.diagnostics, "privacy": figures})


def check_plain_mean(method: MergeMethod) -> None:
    """
    Args:
        method ([`MergeMethod`]): A merge method.

    Raises:
        ValueError: if it is not a plain mean.
    """
    if not method.plain_mean:
        able = ", ".join(repr(name) for name, method in MERGE_METHODS.items() if method.plain_mean)
        raise ValueError(
            f"Privacy needs a merge method that is a plain mean, since there a bound on each upload bounds what one client "
            f"changes, and noise hides it. For {method.name!r} it would prove nothing. Choose one of: {able}."
        )


def _uniform(
    global_state: Mapping[str, torch.Tensor],
    nothing: Mapping[str, torch.Tensor],
    updates: Iterable[ClientUpdate],
    mechanism: GaussianMechanism,
    norms: list[float],
) -> Iterator[ClientUpdate]:
    """One update with equal weight for every client that was asked: its change, or zero if it failed."""
    for update in updates:
        if len(norms) == mechanism.num_clients:
            raise ValueError(
                f"There are more updates than the {mechanism.num_clients} clients of the mechanism, which would be more than "
                "the noise hides. Give `num_clients` as many as were asked."
            )
        change, norm = clip_change(update, global_state, mechanism.clip_norm)
        norms.append(norm)
        yield ClientUpdate(change, 1, update.client_id)
    for _ in range(len(norms), mechanism.num_clients):
        yield ClientUpdate(nothing, 1)


def _add_noise(state: Mapping[str, torch.Tensor], mechanism: GaussianMechanism, leave_out: tuple[str, ...]) -> None:
    if mechanism.noise_std:
        shapes = {name: t.shape for name, t in state.items() if not has_part(name, leave_out)}
        for name, noise in gaussian_noise(shapes, mechanism.noise_std, mechanism.seed):
            state[name].copy_(state[name].double() + noise.to(state[name].device))
