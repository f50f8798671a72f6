"""The mean over the last rounds, which swings less than the last merged state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftConfig, PeftType

from peft_ravan.merging.method import MergeMethod

from .state import ServerState


State = Mapping[str, torch.Tensor]


def earlier_states(state: ServerState, number: int) -> tuple[State, ...]:
    """
    Args:
        state ([`ServerState`]): The state of the server before a merge.
        number (`int`): The number of rounds that are averaged, that of the merge included.

    Returns:
        `tuple[Mapping[str, torch.Tensor], ...]`: The merged states of earlier rounds to keep, oldest first.
    """
    # the state before the first merge is where training starts from, and not part of the mean
    merged = (*state.earlier, state.global_state) if state.num_merged else ()
    return merged[max(0, len(merged) - number + 1) :]


def mean_of_rounds(state: ServerState) -> dict[str, torch.Tensor]:
    """
    Average the merged states of the last rounds. Ravan's products s*H enter the weight linearly, so their mean is the
    exact mean of the weights over the rounds. The mean of LoRA's A and B is not exact.

    Args:
        state ([`ServerState`]): The state of the server.

    Returns:
        `dict[str, torch.Tensor]`: The mean of `earlier` and `global_state`, in the dtypes of the latter.
    """
    if not state.earlier:
        return dict(state.global_state)
    states = (*state.earlier, state.global_state)
    return {
        name: (sum(merged[name].double() for merged in states) / len(states)).to(tensor.dtype)
        for name, tensor in state.global_state.items()
    }


def check_mean_of_rounds(method: MergeMethod, options: Mapping[str, object], config: PeftConfig) -> None:
    """
    Args:
        method ([`~peft_ravan.merging.method.MergeMethod`]): The merge method.
        options (`Mapping[str, object]`): Its options.
        config ([`~peft.PeftConfig`]): The configuration of the adapter.

    Raises:
        ValueError: if the factors of different rounds cannot be averaged.
    """
    if config.peft_type == PeftType.LORA and method.decomposes_with(options):
        raise ValueError(
            f"`average_rounds` does not work with merge_method={method.name!r} on LoRA: it computes A and B anew from their "
            "product in every round, so the mean of A and B over rounds has no meaning. Use another method, or a Ravan "
            "adapter, whose mean is exact."
        )
