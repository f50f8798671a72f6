"""Runs clients one after the other in a single process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from ..exchange import ClientReply, ClientTask
from ..processes import TrainingGroup


T = TypeVar("T")
# a task, or the tasks of several clients that are trained at once
Tasks = ClientTask | Sequence[ClientTask]
Work = Callable[[Tasks], ClientReply | Sequence[ClientReply]]


def replies_of(done: ClientReply | Sequence[ClientReply]) -> Sequence[ClientReply]:
    """
    Args:
        done (`ClientReply` or `Sequence[ClientReply]`): The result of a task.

    Returns:
        `Sequence[ClientReply]`: The replies.
    """
    return [done] if isinstance(done, ClientReply) else done


class Runner:
    """Runs one client after the other in a single process."""

    is_main = True
    group = TrainingGroup()

    def run(self, tasks: Sequence[Tasks], work: Work) -> Iterator[ClientReply]:
        """
        Run the tasks. A reply is released once the next one is requested.

        Args:
            tasks (`Sequence[ClientTask]`): The tasks, or a sequence of tasks for each group of clients that are trained
                at once.
            work (`Callable[[ClientTask], ClientReply | Sequence[ClientReply]]`):
                Runs one task, or the tasks of one group. If it raises an error, the run ends in all processes.

        Yields:
            [`ClientReply`]: The replies.
        """
        for task in tasks:
            yield from replies_of(work(task))

    def at_server(self, replies: Iterable[ClientReply], close: Callable[[Iterable[ClientReply]], T]) -> T:
        """
        Pass the replies to the server in the process where it runs, and give the result to all processes.

        Args:
            replies (`Iterable[ClientReply]`): The replies, which are iterated over once.
            close (`Callable[[Iterable[ClientReply]], T]`): What the server does with them.

        Returns:
            What `close` returns.
        """
        return close(replies)

    def agree(self, value: T) -> T:
        """
        Args:
            value: A value that may differ between processes, such as a measured time.

        Returns:
            The value of the main process.
        """
        return value

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """
        Copy the tensors of the main process to all processes.

        Args:
            tensors (`Iterable[torch.Tensor]`): The tensors, which are overwritten.
        """

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """
        Returns:
            A context in which this process behaves as if it were the only one.
        """
        return contextlib.nullcontext()

    def wait(self) -> None:
        """Wait for all processes."""
