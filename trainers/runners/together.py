"""Runs clients one after the other, each trained by all processes together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from ..exchange import ClientReply
from ..processes import TrainingGroup
from .many_processes import ManyProcesses


T = TypeVar("T")


class TogetherRunner(ManyProcesses):
    """Runs one client after the other, each with all processes together, like distributed training with Trainer."""

    @property
    def group(self) -> TrainingGroup:
        return TrainingGroup(self.state.num_processes, self.is_main, self.agree)

    def at_server(self, replies: Iterable[ClientReply], close: Callable[[Iterable[ClientReply]], T]) -> T:
        # every process has all replies, but all must continue from the same merge, bit for bit
        return self.agree(close(replies))
