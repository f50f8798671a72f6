"""Spreads clients over processes, each of which trains its own clients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from accelerate.utils import broadcast_object_list

from ..exchange import ClientReply
from ..processes import one_process
from .many_processes import MAIN, ManyProcesses
from .one_by_one import Tasks, Work, replies_of


T = TypeVar("T")


class _Turn(NamedTuple):
    """The result of one turn of a process: the replies, and the error that ends the run, if there is one."""

    replies: Sequence[ClientReply] = ()
    error: Exception | None = None

    def without_tensors(self) -> _Turn:
        told = ("round_number", "client", "purpose", "run", "attempt", "failure")
        return self._replace(
            replies=[ClientReply(**{name: getattr(reply, name) for name in told}) for reply in self.replies]
        )


class ProcessRunner(ManyProcesses):
    """
    Spreads clients over processes, each of which trains its own clients as if it were the only process. In each turn,
    every process trains at most one client, or one group of clients at once. Then the replies are sent to the main
    process, where the server runs, in the order of the tasks. So a process holds the updates of one turn at a time, and
    the result does not depend on the number of processes. The other processes are notified of the replies, but do not
    receive the updates.
    """

    def run(self, tasks: Sequence[Tasks], work: Work) -> Iterator[ClientReply]:
        count, mine = self.state.num_processes, self.state.process_index
        for start in range(0, len(tasks), count):
            turn = tasks[start : start + count]
            own = None
            if mine < len(turn):
                with self.alone():
                    own = _attempt(work, turn[mine])
            for owner in range(len(turn)):
                yield from self._to_main(own if mine == owner else None, owner)

    def _to_main(self, turn: _Turn | None, owner: int) -> Sequence[ClientReply]:
        """Send the replies of one process to the main process, and notify the others without sending the updates."""
        mine = self.state.process_index
        errors = {} if turn is None else {reply.client: reply.error for reply in turn.replies}
        if turn is not None:
            # not every error can be sent to other processes
            turn = turn._replace(replies=[replace(reply, error=None) for reply in turn.replies])
        if owner != MAIN and mine in (owner, MAIN):
            turn = self._sent(turn, owner)
        told = broadcast_object_list([None if turn is None else turn.without_tensors()], from_process=MAIN)[0]
        turn = turn if mine == MAIN else told
        if turn.error is not None:
            raise turn.error
        return [replace(reply, error=errors.get(reply.client)) for reply in turn.replies]

    def _sent(self, turn: _Turn | None, owner: int) -> _Turn:
        parcel = [turn]
        if self.state.process_index == owner:
            torch.distributed.send_object_list(parcel, dst=MAIN)
        else:
            torch.distributed.recv_object_list(parcel, src=owner)
        return parcel[0]

    def at_server(self, replies: Iterable[ClientReply], close: Callable[[Iterable[ClientReply]], T]) -> T:
        outcome, error = None, None
        try:
            if self.is_main:
                outcome = close(replies)
        except Exception as raised:
            error = raised
        try:
            for _ in replies:  # all take part in every exchange, even if the server did not ask for it
                pass
        except Exception as raised:  # it ends the run in all processes
            error = error or raised
        outcome, told = self.agree((outcome, None if error is None else _sendable(error)))
        if error is not None or told is not None:
            raise error or told
        return outcome

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with one_process():
            yield


def _attempt(work: Work, task: Tasks) -> _Turn:
    try:
        return _Turn(replies_of(work(task)))
    except Exception as error:
        return _Turn(error=_sendable(error))


def _sendable(error: Exception) -> Exception:
    """A copy of the error without its frames, or if it cannot be copied, an error with the same message."""
    try:
        return copy.copy(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
