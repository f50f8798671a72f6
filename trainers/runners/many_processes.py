"""What all runners for several processes have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .one_by_one import Runner


MAIN = 0

T = TypeVar("T")


class ManyProcesses(Runner):
    """A runner that works in one of several processes."""

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
