"""Clients shared out over processes, each of which trains its own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from accelerate.utils import broadcast_object_list

from ..exchange import ClientReply, ClientTask
from ..processes import one_process
from .many_processes import MAIN, ManyProcesses
from .one_by_one import Work, replies_of


T = TypeVar("T")


class _Turn(NamedTuple):
    """What a process has done: the replies, and the error that ends the run, if there is one."""

    replies: Sequence[ClientReply] = ()
    error: Exception | None = None

    def without_tensors(self) -> _Turn:
        told = ("round_number", "client", "purpose", "run", "attempt", "failure")
        return self._replace(
            replies=[ClientReply(**{name: getattr(reply, name) for name in told}) for reply in self.replies]
        )


class ProcessRunner(ManyProcesses):
    """
    Shares clients out over processes, each of which trains its own as if it were the only one. In turns, each process
    trains one client; then the replies go to the main process in the order of the tasks, where the server is. So a process
    holds one update at a time, and what comes out does not depend on how many processes there are. The other processes
    are told who has replied, without what was uploaded.
    """

    def run(self, tasks: Sequence[ClientTask], work: Work) -> Iterator[ClientReply]:
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
        """All processes learn how the clients of one of them did, and the main process has their updates."""
        mine = self.state.process_index
        errors = {} if turn is None else {reply.client: reply.error for reply in turn.replies}
        if turn is not None:
            # errors cannot all be sent
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
            for _ in replies:  # all take part in each exchange, also in those that the server has not asked for
                pass
        except Exception as raised:  # which ends the run in all processes
            error = error or raised
        outcome, told = self.agree((outcome, None if error is None else _sendable(error)))
        if error is not None or told is not None:
            raise error or told
        return outcome

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with one_process():
            yield


def _attempt(work: Work, task: ClientTask) -> _Turn:
    try:
        return _Turn(replies_of(work(task)))
    except Exception as error:
        return _Turn(error=_sendable(error))


def _sendable(error: Exception) -> Exception:
    """The same error without its frames, or if it cannot be put together again, one that says the same."""
    try:
        return copy.copy(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
