"""
Where the clients of a round are run: one after the other in this process, shared out over the processes of a launcher, or
one after the other by all processes together. A round asks for their results and does not know where they come from.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list
from transformers.utils import logging

from peft_ravan.merging import ClientUpdate

from .personal import ClientStoreError


logger = logging.get_logger(__name__)

PARALLEL_MODES = ("clients", "data")
MAIN = 0

T = TypeVar("T")


@dataclass
class ClientResult:
    """
    What comes back from a client.

    Args:
        client (`str`): The name of the client.
        update ([`~peft_ravan.merging.ClientUpdate`], *optional*):
            What it uploads, or `None` if it has failed, or if another process merges it.
        train_loss (`float`): Its mean local training loss.
        learning_rate (`float`, *optional*): Its learning rate, if it has trained.
        control_bytes (`int`): The size of the change of its control variate, which it uploads with SCAFFOLD.
        failure (`str`, *optional*): Why it has failed.
        error (`Exception`, *optional*): The error, in the process in which it was raised.
        ends_run (`bool`): Whether it has failed by a fault that is not its own, so that the run cannot go on.
    """

    client: str
    update: ClientUpdate | None = None
    train_loss: float = 0.0
    learning_rate: float | None = None
    control_bytes: int = 0
    failure: str | None = None
    error: Exception | None = None
    ends_run: bool = False


ClientWork = Callable[[str], ClientResult]


def attempt(work: ClientWork, client: str) -> ClientResult:
    """
    Args:
        work (`Callable[[str], ClientResult]`): Trains a client, by its name.
        client (`str`): The name.

    Returns:
        [`ClientResult`]: Its result, with the reason if it fails.
    """
    try:
        return work(client)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # what they hold may be what memory ran out for
        ends_run = isinstance(error, ClientStoreError)
        return ClientResult(client, failure=f"{type(error).__name__}: {error}", error=error, ends_run=ends_run)


class ClientRunner:
    """Runs one client after the other, in the one process that there is."""

    is_main = True

    def run(self, clients: Sequence[str], work: ClientWork) -> Iterator[ClientResult]:
        """
        Run clients. Nothing is kept of a result once the next is asked for.

        Args:
            clients (`Sequence[str]`): Their names.
            work (`Callable[[str], ClientResult]`): Trains one of them.

        Yields:
            [`ClientResult`]: Their results, in the order of the clients.
        """
        for client in clients:
            yield attempt(work, client)

    def merge(self, updates: Iterable[ClientUpdate], merge_updates: Callable[[Iterable[ClientUpdate]], T]) -> T:
        """
        Merge where the updates are, and let all processes have what comes out.

        Args:
            updates (`Iterable[ClientUpdate]`): The updates, which are asked for once.
            merge_updates (`Callable`): The merge.

        Returns:
            What the merge returns.
        """
        return merge_updates(updates)

    def agree(self, value: T) -> T:
        """
        Args:
            value: A value that processes may have differently, such as a measured time.

        Returns:
            That of the main process.
        """
        return value

    def agree_on_time(self, seconds: float) -> float:
        """
        Args:
            seconds (`float`): What a client has taken so far, by the clock of this process.

        Returns:
            `float`: What all processes that train the client take for it.
        """
        return seconds

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """
        Give all processes the tensors of the main process.

        Args:
            tensors (`Iterable[torch.Tensor]`): The tensors, which are written into.
        """

    @property
    def num_processes_sharing(self) -> int:
        """How many processes train a client together."""
        return 1

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """
        Returns:
            A context in which this process does by itself what one process would.
        """
        return contextlib.nullcontext()

    def wait(self) -> None:
        """Wait for all processes."""


class _ManyProcesses(ClientRunner):
    """What all ways to use several processes have in common."""

    def __init__(self):
        self.state = PartialState()

    @property
    def is_main(self) -> bool:
        return self.state.process_index == MAIN

    def agree(self, value: T) -> T:
        return broadcast_object_list([value], from_process=MAIN)[0]

    @torch.no_grad()
    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            torch.distributed.broadcast(sent, src=MAIN)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.copy_(sent)

    def wait(self) -> None:
        self.state.wait_for_everyone()


class DataParallelRunner(_ManyProcesses):
    """Runs one client after the other, each by all processes together, as Trainer trains with several processes."""

    @property
    def num_processes_sharing(self) -> int:
        return self.state.num_processes

    def agree_on_time(self, seconds: float) -> float:
        return self.agree(seconds)

    def merge(self, updates: Iterable[ClientUpdate], merge_updates: Callable[[Iterable[ClientUpdate]], T]) -> T:
        # all have all updates; nobody may go on from a merge that differs in the last bit
        return self.agree(merge_updates(updates))


class ProcessRunner(_ManyProcesses):
    """
    Shares clients out over processes, each of which trains its own as if it were the only one. In turns, each process
    trains one client; then the results go to the main process in the order of the clients, which merges them. So a process
    holds one update at a time, and what comes out does not depend on how many processes there are.
    """

    def run(self, clients: Sequence[str], work: ClientWork) -> Iterator[ClientResult]:
        count, mine = self.state.num_processes, self.state.process_index
        for start in range(0, len(clients), count):
            turn = clients[start : start + count]
            own = None
            if mine < len(turn):
                with self.alone():
                    own = attempt(work, turn[mine])
            for owner in range(len(turn)):
                yield self._to_main(own if mine == owner else None, owner)

    def _to_main(self, result: ClientResult | None, owner: int) -> ClientResult:
        """All processes learn how the client of one of them did, and the main process has its update."""
        mine, error = self.state.process_index, None
        if mine == owner:
            error, result.error = result.error, None  # errors cannot all be sent
        if owner != MAIN and mine in (owner, MAIN):
            result = self._sent(result, owner)
        told = broadcast_object_list([self._told(result)], from_process=MAIN)[0]
        if mine != MAIN:
            result = told
        result.error = error
        return result

    def _sent(self, result: ClientResult | None, owner: int) -> ClientResult:
        parcel = [result]
        if self.state.process_index == owner:
            torch.distributed.send_object_list(parcel, dst=MAIN)
        else:
            torch.distributed.recv_object_list(parcel, src=owner)
        return parcel[0]

    def _told(self, result: ClientResult | None) -> ClientResult | None:
        return (
            None if result is None else ClientResult(result.client, failure=result.failure, ends_run=result.ends_run)
        )

    def merge(self, updates: Iterable[ClientUpdate], merge_updates: Callable[[Iterable[ClientUpdate]], T]) -> T:
        merged = merge_updates(updates) if self.is_main else None
        for _ in updates:  # all take part in each upload, also in those that the merge has not asked for
            pass
        return self.agree(merged)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with one_process():
            yield


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """
    Let Accelerate and Trainer think for a while that this process is the only one: then models are not wrapped, data is not
    sharded, and nobody waits for others.
    """
    only = {
        "distributed_type": DistributedType.NO,
        "num_processes": 1,
        "process_index": 0,
        "local_process_index": 0,
    }
    states = [PartialState._shared_state, AcceleratorState._shared_state]
    before = [{name: state[name] for name in only if name in state} for state in states]
    for state, own in zip(states, before, strict=True):
        state.update({name: only[name] for name in own})
    try:
        yield
    finally:
        for state, own in zip(states, before, strict=True):
            state.update(own)


def make_runner(parallel: str) -> ClientRunner:
    """
    Args:
        parallel (`str`): What several processes share: `"clients"` or `"data"`.

    Returns:
        [`ClientRunner`]: What suits the processes that there are.

    Raises:
        ValueError: if the model is sharded over them, or if they do not know of each other.
    """
    state = PartialState()
    if not state.use_distributed:
        _check_alone()
        return ClientRunner()
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if state.distributed_type in sharded:
        raise ValueError(
            f"A federation needs the whole model in each process, but {state.distributed_type.value} shards it. Launch the "
            "processes without it, as `accelerate launch --multi_gpu` does."
        )
    _forget_numbers_of_cpus()
    _leave_the_group_at_exit()
    return ProcessRunner() if parallel == "clients" else DataParallelRunner()


@functools.cache  # once is enough
def _leave_the_group_at_exit() -> None:
    # A thread of gloo that is still letting go of the tensors of the last exchange when the interpreter ends would abort a
    # process that has done all its work ("terminate called without an active exception"). To leave the group waits for its
    # threads, unless a wrapped model holds on to it. NCCL ends by itself; to leave it after an error might wait for others.
    def leave() -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == torch.distributed.Backend.GLOO:
            torch.distributed.destroy_process_group()

    atexit.register(leave)


def _check_alone() -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        raise ValueError(
            f"A launcher has started {launched} processes, but Accelerate takes each of them for the only one, so all would "
            "write into the same folder. Without an accelerator use `use_cpu=True` in the arguments."
        )


def _forget_numbers_of_cpus() -> None:
    # Accelerate numbers the CPUs of processes. No tensor is ever on "cpu:0", so it would move the model each time it is
    # prepared, away from the tensors that are loaded and read.
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        if "device" in state and state["device"].type == "cpu":
            state["device"] = torch.device("cpu")
