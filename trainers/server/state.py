"""What a server has between two rounds, as one value: all that has to be saved to go on with a federation."""

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
    What a server has between two rounds.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): What was merged last, by checkpoint names, without what stays with clients.
        round (`int`): The last round that was run.
        merge_memory (`Mapping[str, torch.Tensor]`): What the server optimizer and the merge method remember.
        control (`Mapping[str, torch.Tensor]`): SCAFFOLD's c, by names of parameters.
        spent (`Mapping[NoisyRound, int]`): The noise of the rounds in which clients were asked, and how often it was used.
        kept (`Mapping[str, KeptFile]`): What clients keep for themselves counts from which round, by their names.
        has_succeeded (`bool`): Whether the update of any client was ever merged.
        random_state ([`RandomState`], *optional*): The random generators, when the state was saved.
    """

    global_state: State
    round: int = 0
    merge_memory: State = field(default_factory=dict)
    control: State = field(default_factory=dict)
    spent: Mapping[NoisyRound, int] = field(default_factory=dict)
    kept: Mapping[str, KeptFile] = field(default_factory=dict)
    has_succeeded: bool = False
    random_state: RandomState | None = None
