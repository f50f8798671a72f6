"""What may go wrong with a client, which costs its own contribution and not the round."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from transformers import TrainerCallback

from peft_ravan.merging import ClientUpdate


# Called with the client, the round and its update before the upload, so that tests can inject faults: it may raise, take
# its time, or return another update.
ClientFault = Callable[[str, int, ClientUpdate], ClientUpdate | None]


@dataclass(frozen=True)
class FaultSettings:
    """
    What is done about clients that fail.

    Args:
        client_timeout (`float`, *optional*): The seconds after which a client's local training is given up. By default never.
        max_round_attempts (`int`, *optional*, defaults to 3): How often a round is tried before the run ends.

    Raises:
        ValueError: if the seconds are not above 0, or the attempts not 1 or more.
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
    Ends the local training of a client that takes too long. It looks at the clock after every step: a step that hangs is
    not interrupted.

    Args:
        seconds (`float`, *optional*):
            The limit, or `None` for none.
        agree (`Callable[[float], float]`, *optional*):
            Makes of the time by the clock of this process what all processes that train the client take for it.
    """

    def __init__(self, seconds: float | None, agree: Callable[[float], float] | None = None):
        self.seconds = seconds
        self.agree = agree or (lambda elapsed: elapsed)
        self.start_time = time.monotonic()

    def check(self) -> None:
        """
        Raises:
            ClientTimeoutError: if the time is over.
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
