"""What may go wrong with a client, which costs its own contribution and not the round."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from transformers import TrainerCallback
from transformers.utils import logging

from peft_ravan.merging import ClientUpdate, MergeResult, UpdateError


if TYPE_CHECKING:
    from .rounds import Round


logger = logging.get_logger(__name__)


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


def updates_of(
    this_round: Round, make_update: Callable[[str], ClientUpdate], on_client_end: Callable[[str], None] | None = None
) -> Iterator[ClientUpdate]:
    """
    Ask one client after the other for its update. Nothing is kept of an update once the next is asked for.

    Args:
        this_round ([`Round`]): The round. Clients that fail are recorded there.
        make_update (`Callable[[str], ClientUpdate]`): Trains a client, by its name.
        on_client_end (`Callable[[str], None]`, *optional*): Is called when a client is done with, failed or not.

    Yields:
        [`~peft_ravan.merging.ClientUpdate`]: The updates of the clients that do not fail.
    """
    for client in this_round.clients:
        try:
            update = make_update(client)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # what they hold may be what memory ran out for
            this_round.fail(client, f"{type(error).__name__}: {error}", error)
            logger.warning(f"Round {this_round.number}: client {client!r} failed and is left out. {error}")
        else:
            yield update
            del update
        if on_client_end is not None:
            on_client_end(client)


def merge_of(this_round: Round, merge_updates: Callable[[], MergeResult]) -> MergeResult | None:
    """
    Merge the updates of a round, and record the clients whose updates were not fit to be merged.

    Args:
        this_round ([`Round`]): The round.
        merge_updates (`Callable[[], MergeResult]`): The merge, with `on_bad_update="drop"`.

    Returns:
        [`~peft_ravan.merging.MergeResult`]: What was merged, or `None` if no update was left.
    """
    try:
        result = merge_updates()
    except UpdateError as error:
        for client in [client for client in this_round.clients if client not in this_round.failures]:
            this_round.fail(client, str(error), error)
        return None
    for dropped in result.diagnostics["dropped"]:
        this_round.fail(dropped["client"], dropped["reason"])
    return result
