"""Processes that work together, as started by a launcher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def _own_clock(seconds: float) -> float:
    return seconds


@dataclass(frozen=True)
class TrainingGroup:
    """
    The processes that train one client together.

    Args:
        size (`int`, *optional*, defaults to 1): How many there are.
        is_main (`bool`, *optional*, defaults to `True`): Whether this process saves what the client keeps.
        agree_on_time (`Callable[[float], float]`, *optional*):
            Turns the seconds measured by this process into the value that all processes use.
    """

    size: int = 1
    is_main: bool = True
    agree_on_time: Callable[[float], float] = _own_clock


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """
    Let Accelerate and Trainer assume within a context that this process is the only one: models are not wrapped, data
    are not sharded, and no process waits for others.
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
