"""Clients one after the other, in the one process that there is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from ..exchange import ClientReply, ClientTask
from ..processes import TrainingGroup


T = TypeVar("T")
# what becomes of a task: a reply, or those of several clients that were trained at once
Work = Callable[[ClientTask], ClientReply | Sequence[ClientReply]]


def replies_of(done: ClientReply | Sequence[ClientReply]) -> Sequence[ClientReply]:
    """
    Args:
        done (`ClientReply` or `Sequence[ClientReply]`): What has become of a task.

    Returns:
        `Sequence[ClientReply]`: The replies.
    """
    return [done] if isinstance(done, ClientReply) else done


class Runner:
    """Runs one client after the other, in the one process that there is."""

    is_main = True
    group = TrainingGroup()

    def run(self, tasks: Sequence[ClientTask], work: Work) -> Iterator[ClientReply]:
        """
        Let clients do their tasks. Nothing is kept of a reply once the next is asked for.

        Args:
            tasks (`Sequence[ClientTask]`): The tasks.
            work (`Callable[[ClientTask], ClientReply | Sequence[ClientReply]]`):
                Does one of them. An error that it raises ends the run, in all processes.

        Yields:
            [`ClientReply`]: The replies.
        """
        for task in tasks:
            yield from replies_of(work(task))

    def at_server(self, replies: Iterable[ClientReply], close: Callable[[Iterable[ClientReply]], T]) -> T:
        """
        Let the server have the replies where it is, and all processes what comes out.

        Args:
            replies (`Iterable[ClientReply]`): The replies, which are asked for once.
            close (`Callable[[Iterable[ClientReply]], T]`): What the server does with them.

        Returns:
            What `close` returns.
        """
        return close(replies)

    def agree(self, value: T) -> T:
        """
        Args:
            value: A value that processes may have differently, such as a measured time.

        Returns:
            That of the main process.
        """
        return value

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """
        Give all processes the tensors of the main process.

        Args:
            tensors (`Iterable[torch.Tensor]`): The tensors, which are written into.
        """

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """
        Returns:
            A context in which this process does by itself what one process would.
        """
        return contextlib.nullcontext()

    def wait(self) -> None:
        """Wait for all processes."""
