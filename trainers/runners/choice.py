"""Chooses the runner for the available processes."""

from __future__ import annotations

import atexit
import functools
import os

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from .one_by_one import Runner
from .over_processes import ProcessRunner
from .together import TogetherRunner


PARALLEL_MODES = ("clients", "data")


def make_runner(parallel: str) -> Runner:
    """
    Args:
        parallel (`str`): What is divided among several processes: `"clients"` or `"data"`.

    Returns:
        [`Runner`]: The runner for the available processes.

    Raises:
        ValueError: if the model is sharded over the processes, or if the processes are not connected.
    """
    state = PartialState()
    if not state.use_distributed:
        _check_alone()
        return Runner()
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if state.distributed_type in sharded:
        raise ValueError(
            f"A federation needs the whole model in each process, but {state.distributed_type.value} shards it. Launch the "
            "processes without it, as `accelerate launch --multi_gpu` does."
        )
    _forget_numbers_of_cpus()
    _leave_the_group_at_exit()
    return ProcessRunner() if parallel == "clients" else TogetherRunner()


@functools.cache  # register only once
def _leave_the_group_at_exit() -> None:
    # If a gloo thread is still releasing the tensors of the last exchange when the interpreter exits, it aborts the
    # process although all work is done ("terminate called without an active exception"). Leaving the group waits for
    # its threads, unless a wrapped model still holds the group. NCCL shuts down by itself, and leaving it after an
    # error could hang.
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
    # Accelerate numbers the CPU devices of processes. No tensor is ever on "cpu:0", so Accelerate would move the model
    # each time it is prepared, away from the tensors that are loaded and read.
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        if "device" in state and state["device"].type == "cpu":
            state["device"] = torch.device("cpu")
