"""What may go wrong with a client, which costs its own contribution and not the round."""

from __future__ import annotations

import time
from collections.abc import Callable

from transformers import TrainerCallback

from peft_ravan.merging import ClientUpdate


# Called with the client, the round and its update before the upload, so that tests can inject faults: it may raise, take
# its time, or return another update.
ClientFault = Callable[[str, int, ClientUpdate], ClientUpdate | None]


class ClientTimeoutError(RuntimeError):
    """A client took longer than `client_timeout`."""


class RoundFailedError(RuntimeError):
    """Too few clients of a round succeeded, in all its attempts."""


class TimeoutCallback(TrainerCallback):
    """
    Ends the local training of a client that takes too long. It looks at the clock after every step: a step that hangs is
    not interrupted.

    Args:
        seconds (`float`, *optional*): The limit, or `None` for none.
    """

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self.start_time = time.monotonic()

    def check(self) -> None:
        """
        Raises:
            ClientTimeoutError: if the time is over.
        """
        elapsed = time.monotonic() - self.start_time
        if self.seconds is not None and elapsed > self.seconds:
            raise ClientTimeoutError(
                f"It took {elapsed:.1f} s, longer than `client_timeout` of {self.seconds:g} s. Raise the limit, or let "
                "clients do fewer local steps."
            )

    def on_step_end(self, args, state, control, **kwargs):
        self.check()
