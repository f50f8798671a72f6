"""What may go wrong with a client, which costs its own contribution and not the round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from transformers import TrainerCallback
from transformers.utils import logging

from peft_ravan.merging import ClientUpdate, MergeResult, UpdateError

from .personal import ClientStoreError


if TYPE_CHECKING:
    from .client_runners import ClientResult
    from .rounds import Round


logger = logging.get_logger(__name__)


# Called with the client, the round and its update before the upload, so that tests can inject faults: it may raise, take
# its time, or return another update.
ClientFault = Callable[[str, int, ClientUpdate], ClientUpdate | None]


class ClientTimeoutError(RuntimeError):
    """A client took longer than `client_timeout`."""


class NothingTrainedError(RuntimeError):
    """A client did not do a single step."""


class RoundFailedError(RuntimeError):
    """Too few clients of a round succeeded, in all its attempts."""


# errors that come back whoever trains, unless the data of some clients differs from that of others
_MISTAKES = {"AttributeError", "IndexError", "KeyError", "NotImplementedError", "TypeError", "ValueError"}


def check_for_a_mistake(this_round: Round, num_clients: int) -> None:
    """
    Tell a mistake in the data, the model or the arguments from faults of clients, which others may not have.

    Args:
        this_round ([`Round`]): A round that has failed, in a run in which no client has succeeded yet.
        num_clients (`int`): How many clients there are.

    Raises:
        RoundFailedError: if all clients that have tried, two at least if there are as many, had an error of the same kind, of
            those that do not pass.
    """
    failures = list(this_round.failures.values())
    kinds = {reason.partition(":")[0] for reason in failures}
    if this_round.num_examples or len(failures) < min(2, num_clients) or len(kinds) != 1 or not kinds <= _MISTAKES:
        return
    raise RoundFailedError(
        f"Round {this_round.round_number}: all {len(failures)} clients that have tried failed with the same error, as others "
        f"would, so the round is not repeated. Look into the data, the model and the arguments. {failures[0]}"
    ) from this_round.first_error


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


def updates_of(
    this_round: Round,
    results: Iterable[ClientResult],
    receive: Callable[[ClientResult], None],
    on_client_end: Callable[[str], None] | None = None,
) -> Iterator[ClientUpdate]:
    """
    The updates of the clients that do not fail. Nothing is kept of one once the next is asked for.

    Args:
        this_round ([`Round`]): The round. Clients that fail are recorded there.
        results (`Iterable[ClientResult]`): What comes back from the clients.
        receive (`Callable[[ClientResult], None]`): Records the result of a client that has not failed.
        on_client_end (`Callable[[str], None]`, *optional*): Is called when a client is done with, failed or not.

    Yields:
        [`~peft_ravan.merging.ClientUpdate`]: The updates.

    Raises:
        ClientStoreError: if what a client keeps could not be written or read, in all processes.
    """
    for result in results:
        client = result.client
        if result.ends_run:
            raise result.error or ClientStoreError(result.failure)
        if result.failure is not None:
            this_round.fail(client, result.failure, result.error)
            logger.warning(
                f"Round {this_round.round_number}: client {client!r} failed and is left out. {result.failure}"
            )
        elif result.update is not None:
            receive(result)
            yield result.update
        del result
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
    this_round.clipped = [clipped["client"] for clipped in result.diagnostics.get("clipped", ())]
    return result
