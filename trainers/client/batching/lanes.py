"""
Runs the trainings of several clients in turns. Each one runs in a thread of its own, of which only one runs at a time, up
to a point where it asks for something and waits for the answer.
"""

from __future__ import annotations

import contextvars
import random
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from accelerate.state import GradientState


T = TypeVar("T")


class ProcessState:
    """
    What a training uses of the whole process: the random generators of Python, NumPy and torch, and Accelerate's state of
    the gradients.
    """

    def __init__(self):
        self.take()

    def take(self) -> None:
        """Take the current state of the process."""
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        # Accelerate changes its lists in place
        self._gradients = {
            name: list(value) if isinstance(value, list) else value
            for name, value in GradientState._shared_state.items()
        }

    def restore(self) -> None:
        """Give the process this state."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self._gradients)


class Stopped(BaseException):  # not an `Exception`, so that no training takes it for a failure of its client
    """Raised in a lane whose result is no longer needed."""


class Lane(Generic[T]):
    """
    A function that runs in a thread, until it asks for something, has returned or has failed.

    Args:
        work (`Callable[[Lane], T]`): The function.
        device (`torch.device`): The device that it uses.

    **Attributes**:
        - **request** (`Any`) -- What it has asked for, or `None`.
        - **is_done** (`bool`) -- Whether it has returned or failed.
        - **state** ([`ProcessState`]) -- The state of the process in its last turn.
    """

    def __init__(self, work: Callable[[Lane], T], device: torch.device):
        self.request: Any = None
        self.is_done = False
        self.state = ProcessState()
        self._work, self._device = work, device
        self._answer: Any = None
        self._result: T | None = None
        self._error: BaseException | None = None
        self._is_stopped = False
        # a semaphore would take longer; each is released by the other thread
        self._turn, self._turn_is_over = threading.Lock(), threading.Lock()
        self._turn.acquire(), self._turn_is_over.acquire()
        # a thread of its own has none of the context variables of the one that starts it
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._main,), daemon=True)
        self._thread.start()

    def resume(self, answer: Any = None) -> None:
        """
        Let it run until it asks for something or is done.

        Args:
            answer (*optional*): The answer to its request. An `Exception` is raised where it has asked.
        """
        self._answer, self.request = answer, None
        self.state.restore()
        self._turn.release()
        self._turn_is_over.acquire()
        self.state.take()

    def ask(self, request: Any) -> Any:
        """
        Wait for an answer, in the thread of the lane.

        Args:
            request: What is asked for.

        Returns:
            The answer.
        """
        self.request = request
        self._turn_is_over.release()
        self._turn.acquire()
        if self._is_stopped:
            raise Stopped
        answer, self._answer = self._answer, None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def result(self) -> T:
        """
        Returns:
            What the function has returned. If it has failed, its error is raised.
        """
        if self._error is not None:
            raise self._error
        return self._result

    def stop(self) -> None:
        """End the thread, if it has not ended yet."""
        self._is_stopped = True
        if self._turn.locked():
            self._turn.release()
        self._thread.join()

    def _main(self) -> None:
        self._turn.acquire()
        try:
            if not self._is_stopped:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)  # of each thread
                self._result = self._work(self)
        except BaseException as error:
            self._error = error
        self.is_done = True
        self._turn_is_over.release()
