"""The state of a server between two rounds, as one value: all that has to be saved to resume a federation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..exchange import KeptFile
from ..random_state import RandomState
from .privacy import NoisyRound


State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ServerState:
    """
    The state of a server between two rounds.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The last merged tensors by name, without personal parts.
        round (`int`): The last round that was run.
        num_merged (`int`): The number of rounds in which updates were merged.
        earlier (`tuple[Mapping[str, torch.Tensor], ...]`):
            The merged states of earlier rounds, oldest first, as many as the mean of rounds needs.
        running_mean (`Mapping[str, torch.Tensor]`): The weighted mean of all merged states, if the result is that mean.
        merge_memory (`Mapping[str, torch.Tensor]`): The memory of the server optimizer and the merge method.
        control (`Mapping[str, torch.Tensor]`): SCAFFOLD's c, by parameter names.
        spent (`Mapping[NoisyRound, int]`): The noise of the rounds in which clients were asked, and how often it was used.
        kept (`Mapping[str, KeptFile]`): Client names to the files that clients keep, as of their last merged updates.
        has_succeeded (`bool`): Whether any client's update was ever merged.
        random_state ([`RandomState`], *optional*): The state of the random generators when this state was saved.
    """

    global_state: State
    round: int = 0
    num_merged: int = 0
    earlier: tuple[State, ...] = ()
    running_mean: State = field(default_factory=dict)
    merge_memory: State = field(default_factory=dict)
    control: State = field(default_factory=dict)
    spent: Mapping[NoisyRound, int] = field(default_factory=dict)
    kept: Mapping[str, KeptFile] = field(default_factory=dict)
    has_succeeded: bool = False
    random_state: RandomState | None = None
