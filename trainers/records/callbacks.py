"""Callbacks of a federation: their events, and the progress bars over rounds and clients."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers import trainer as trainer_module
from transformers.trainer_callback import CallbackHandler
from transformers.utils import is_in_notebook


# Only these events of a client's local training reach the callbacks. The others belong to the federation as a whole,
# so that a logger starts once and logs once per round.
LOCAL_EVENTS = frozenset(
    {
        "on_epoch_begin",
        "on_step_begin",
        "on_pre_optimizer_step",
        "on_optimizer_step",
        "on_substep_end",
        "on_step_end",
        "on_epoch_end",
    }
)


class FederatedCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] with additional events for rounds and clients. The events of epochs and steps
    come from the clients' local training. All other events are those of the federation, whose steps are rounds.
    """

    def on_round_begin(self, args, state, control, clients: list[str], **kwargs):
        """Called at the beginning of a round, with the names of its clients."""

    def on_client_end(self, args, state, control, client: str, failure: str | None = None, **kwargs):
        """Called when a client has trained or failed, with its name and the reason of the failure, if any."""

    def on_client_evaluate(
        self, args, state, control, client: str, metrics: dict[str, float], num_clients: int, **kwargs
    ):
        """Called when a client has been evaluated, with its name, its metrics and the total number of clients."""

    def on_round_end(self, args, state, control, record: dict[str, Any], **kwargs):
        """Called at the end of a round, with its record in the history."""


def call_federated_event(handler: CallbackHandler, event: str, args, state, control, **kwargs) -> None:
    """
    Call an event of the federation on the callbacks that implement it.

    Args:
        handler ([`~transformers.trainer_callback.CallbackHandler`]): The handler of the trainer.
        event (`str`): The name of a method of [`FederatedCallback`].
        args, state, control: As for every callback.
        **kwargs: The arguments of the event.
    """
    for callback in handler.callbacks:
        if hasattr(callback, event):
            getattr(callback, event)(args, state, control, model=handler.model, **kwargs)


class LocalCallbackHandler(CallbackHandler):
    """The handler during a client's local training, which lets only [`LOCAL_EVENTS`] through."""

    @classmethod
    def of(cls, handler: CallbackHandler, *callbacks: TrainerCallback) -> LocalCallbackHandler:
        """
        Args:
            handler ([`~transformers.trainer_callback.CallbackHandler`]): The handler of the federation.
            *callbacks ([`~transformers.TrainerCallback`]): Callbacks of the client.

        Returns:
            [`LocalCallbackHandler`]: A handler with the callbacks of both.
        """
        own = [callback for callback in handler.callbacks if not _is_bar_over_steps(callback)]
        return cls([*own, *callbacks], handler.model, handler.processing_class, None, None)

    def call_event(self, event, args, state, control, **kwargs):
        if event not in LOCAL_EVENTS:
            return control
        return super().call_event(event, args, state, control, **kwargs)


def _is_bar_over_steps(callback: TrainerCallback) -> bool:
    """Whether a callback shows a progress bar over steps. It would not have received the event that begins the run."""
    bars = (ProgressCallback, trainer_module.DEFAULT_PROGRESS_CALLBACK)
    return isinstance(callback, bars) and not isinstance(callback, FederatedCallback)


class FederatedProgressCallback(ProgressCallback, FederatedCallback):
    """
    A progress bar over rounds, with the remaining time and the latest metrics. Below it is a second bar over the
    clients of the round, or over batches or clients during an evaluation. If the output is not interactive, such as a
    log file, only the bar over rounds is shown, and it is updated at most every
    [`FederatedProgressCallback.LOG_SECONDS`] seconds.
    """

    # shown next to the bar if they are in the record
    SHOWN = ("train_loss", "eval_loss", "eval_accuracy")
    LOG_SECONDS = 30

    def __init__(self):
        super().__init__()
        self.client_bar = None
        self.is_watched = is_in_notebook() or sys.stderr.isatty()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="Rounds",
                unit="round",
                dynamic_ncols=True,
                mininterval=0.1 if self.is_watched else self.LOG_SECONDS,
            )

    def on_step_end(self, args, state, control, **kwargs):
        # the steps of a client are too short to be shown
        pass

    def on_round_begin(self, args, state, control, clients, **kwargs):
        self._open_client_bar(state, "Clients", len(clients))

    def on_client_end(self, args, state, control, client, **kwargs):
        self._count_client()

    def on_prediction_step(self, args, state, control, **kwargs):
        self._close_client_bar()  # the clients of the round are done when it is evaluated
        if self.is_watched:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_client_evaluate(self, args, state, control, client, metrics, num_clients, **kwargs):
        if self.client_bar is None:
            self._open_client_bar(state, "Evaluation of clients", num_clients)
        self._count_client()
        if self.client_bar is not None and self.client_bar.n == num_clients:
            self._close_client_bar()

    def on_round_end(self, args, state, control, record, **kwargs):
        self._close_client_bar()
        if self.training_bar is not None:
            shown = {key: f"{record[key]:.4g}" for key in self.SHOWN if key in record}
            self.training_bar.set_postfix(shown, refresh=False)
            self.training_bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        # the bar shows the record of a round; everything else is shown as in Trainer
        if logs is not None and "round" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        self._close_client_bar()
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def _open_client_bar(self, state, description: str, total: int) -> None:
        self._close_client_bar()  # it may be left over from a failed attempt at the round
        if state.is_world_process_zero and self.is_watched:
            self.client_bar = tqdm(total=total, desc=description, unit="client", leave=False, dynamic_ncols=True)

    def _count_client(self) -> None:
        if self.client_bar is not None:
            self.client_bar.update(1)

    def _close_client_bar(self) -> None:
        if self.client_bar is not None:
            self.client_bar.close()
            self.client_bar = None
