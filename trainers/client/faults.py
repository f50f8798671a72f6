"""Faults of a client, which cost its own contribution but not the round."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from transformers import TrainerCallback

from peft_ravan.merging import ClientUpdate


# Called with the client, the round and the update before the upload, so that tests can inject faults: it may raise an
# error, wait, or return another update.
ClientFault = Callable[[str, int, ClientUpdate], ClientUpdate | None]


@dataclass(frozen=True)
class FaultSettings:
    """
    How failing clients are handled.

    Args:
        client_timeout (`float`, *optional*): The time limit of a client's local training, in seconds. By default none.
        max_round_attempts (`int`, *optional*, defaults to 3): How often a round is tried before the run ends.

    Raises:
        ValueError: if the time limit is not above 0, or the number of attempts is below 1.
    """

    client_timeout: float | None = None
    max_round_attempts: int = 3

    def __post_init__(self):
        if self.client_timeout is not None and not self.client_timeout > 0:
            raise ValueError(f"`client_timeout` must be above 0 seconds, got {self.client_timeout!r}.")
        if self.max_round_attempts < 1:
            raise ValueError(f"`max_round_attempts` must be 1 or more, got {self.max_round_attempts!r}.")


class ClientTimeoutError(RuntimeError):
    """A client took longer than `client_timeout`."""


class NothingTrainedError(RuntimeError):
    """A client did not do a single step."""


class TimeoutCallback(TrainerCallback):
    """
    Stops the local training of a client if it takes too long. The time is checked after every step, so a step that
    hangs is not interrupted.

    Args:
        seconds (`float`, *optional*):
            The limit, or `None` for no limit.
        agree (`Callable[[float], float]`, *optional*):
            Turns the time measured by this process into the one that all processes that train the client use.
    """

    def __init__(self, seconds: float | None, agree: Callable[[float], float] | None = None):
        self.seconds = seconds
        self.agree = agree or (lambda elapsed: elapsed)
        self.start_time = time.monotonic()

    def check(self) -> None:
        """
        Raises:
            ClientTimeoutError: if the time limit is exceeded.
        """
        if self.seconds is None:
            return
        elapsed = self.agree(time.monotonic() - self.start_time)
        if elapsed > self.seconds:
            raise ClientTimeoutError(
                f"It took {elapsed:.1f} s, longer than `client_timeout` of {self.seconds:g} s. Raise the limit, or let "
                "clients do fewer local steps."
            )

    def on_step_end(self, args, state, control, **kwargs):
        self.check()
