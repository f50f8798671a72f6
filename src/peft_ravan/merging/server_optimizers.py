"""
Server optimizers: they treat the difference between the merged and the global state as a gradient.

Their state is a dict of tensors, which can be saved as safetensors and passed to the next merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from .entries import check_merged
from .lora import LoraTarget
from .truncation import aligned_factors, orthonormal_factors


State = dict[str, torch.Tensor]


def step_by_tensor(
    global_state: Mapping[str, torch.Tensor],
    merged_state: Mapping[str, torch.Tensor],
    server_state: Mapping[str, torch.Tensor],
    moments: Mapping[str, float],
    step: Callable[..., tuple[torch.Tensor, ...]],
) -> tuple[State, State]:
    """
    Take a step, tensor by tensor.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        merged_state (`Mapping[str, torch.Tensor]`):
            The state merged from their updates. A tensor that is missing here stays unchanged, and so do its moments.
        server_state (`Mapping[str, torch.Tensor]`):
            What the last step returned, or nothing in the first round.
        moments (`Mapping[str, float]`):
            The names of the moments and their initial values.
        step (`Callable`):
            Maps the difference and the moments of a tensor to the step and the new moments.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: The new state and the new server state, in at least
        float32.

    Raises:
        ValueError: if the merge changed shapes, or the server state belongs to another adapter.
    """
    new_state, new_server_state = {}, {}
    for name, start in global_state.items():
        if name not in merged_state:
            new_state[name] = start.clone()
            names = [f"{moment}.{name}" for moment in moments]
            new_server_state.update({key: server_state[key].clone() for key in names if key in server_state})
            continue
        merged = merged_state[name]
        if merged.shape != start.shape:
            raise ValueError(
                f"Tensor {name!r}: the merge has changed its shape from {tuple(start.shape)} to {tuple(merged.shape)}, so a "
                "server optimizer has no difference to follow. Use a merge method that keeps the rank."
            )
        start = start.to(torch.promote_types(start.dtype, torch.float32))
        old = []
        for moment, first_value in moments.items():
            value = server_state.get(f"{moment}.{name}")
            if value is not None and value.shape != start.shape:
                raise ValueError(
                    f"Server state {moment}.{name!r}: has shape {tuple(value.shape)}, but the tensor has "
                    f"{tuple(start.shape)}. Give the server state that the last merge of this adapter returned."
                )
            old.append(torch.full_like(start, first_value) if value is None else value.to(start))
        update, *new = step(merged.to(start) - start, *old)
        new_state[name] = (start + update).to(merged.dtype)
        new_server_state.update({f"{moment}.{name}": value for moment, value in zip(moments, new, strict=True)})
    return new_state, new_server_state


def step_between_products(
    targets: Sequence[LoraTarget],
    global_state: Mapping[str, torch.Tensor],
    merged_state: Mapping[str, torch.Tensor],
    step: Callable[[State, State], tuple[State, State]],
) -> tuple[State, State]:
    """
    Take a step after a merge that recomputed LoRA's A and B from their product.

    A step follows differences of A and B, but only their product has a meaning. So both states are first rewritten
    with one orthonormal factor and aligned with each other, and the new state is made orthonormal again afterwards. An
    unchanged product then gives no difference, and the norms of A and B do not drift.

    Args:
        targets (`Sequence[LoraTarget]`): The modules.
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        merged_state (`Mapping[str, torch.Tensor]`): The state merged from their updates.
        step (`Callable`): Takes the step from the first state towards the second.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: The new state and the new server state.

    Raises:
        ValueError: if the step produced entries that are NaN or infinite.
    """
    start, merged = dict(global_state), dict(merged_state)
    for target in targets:
        names = (target.A_name, target.B_name)
        # not rounded to half precision in between
        like = {name: start[name].to(torch.promote_types(start[name].dtype, torch.float32)) for name in names}
        start.update(aligned_factors(target, start, like))
        merged.update(aligned_factors(target, merged, start))
    state, server_state = step(start, merged)
    for target in targets:
        check_merged({name: state[name] for name in (target.A_name, target.B_name)})
        state.update(orthonormal_factors(target, state, like=global_state))
    return state, server_state


def step_with_two_moments(
    global_state: Mapping[str, torch.Tensor],
    merged_state: Mapping[str, torch.Tensor],
    server_state: Mapping[str, torch.Tensor],
    name: str,
    second_moment: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    learning_rate: float,
    beta_1: float,
    tau: float,
) -> tuple[State, State]:
    """
    Take a step proportional to the mean difference divided by its root mean square (Reddi et al., algorithm 2).

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        merged_state (`Mapping[str, torch.Tensor]`): The state merged from their updates.
        server_state (`Mapping[str, torch.Tensor]`): What the last step returned.
        name (`str`): The name of the server optimizer.
        second_moment (`Callable`): Maps the second moment and the squared difference to the new second moment.
        learning_rate (`float`): The learning rate of the server.
        beta_1 (`float`): The decay of the first moment.
        tau (`float`): Added to the root of the second moment, which starts at `tau^2`.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: The new state and the new server state.
    """

    def step(difference: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean = beta_1 * mean + (1 - beta_1) * difference
        variance = second_moment(variance, difference.square())
        return learning_rate * mean / (variance.sqrt() + tau), mean, variance

    moments = {f"{name}.mean": 0.0, f"{name}.variance": tau**2}
    return step_by_tensor(global_state, merged_state, server_state, moments, step)


def check_options(name: str, learning_rate: float, *decays: float, tau: float = 1.0) -> None:
    """
    Args:
        name (`str`): The name of the server optimizer.
        learning_rate (`float`): Must be above 0.
        *decays (`float`): Must be at least 0 and below 1.
        tau (`float`, *optional*, defaults to 1.0): Must be above 0.

    Raises:
        ValueError: if one of these conditions is violated.
    """
    if not (learning_rate > 0 and tau > 0):
        raise ValueError(f"{name}: `learning_rate` and `tau` must be above 0, got {learning_rate!r} and {tau!r}.")
    if not all(0 <= decay < 1 for decay in decays):
        raise ValueError(f"{name}: momentum and betas must be at least 0 and below 1, got {decays!r}.")
