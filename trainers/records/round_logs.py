"""What is logged in a federation: one record a round, whatever the trainer below logs while it trains and evaluates."""

from __future__ import annotations

from typing import Any

from .callbacks import LocalCallbackHandler, call_federated_event


class RoundLogMixin:
    """Lets a [`~transformers.Trainer`] log one record a round, and tell callbacks of rounds and clients."""

    _log_sink: dict[str, Any] | None = None  # set while logs belong to a round's record

    def _evaluate_quietly(self, ignore_keys: list[str] | None) -> dict[str, float]:
        """Evaluate without a log record of its own: the metrics become part of the record of the round."""
        self._log_sink = {}
        # where processes have trained alone, each evaluates all, as one would: the figures and the callbacks are those of one
        try:
            with self._runner.alone():
                self.evaluate(ignore_keys=ignore_keys)
                self._log_sink.update(self._client_figures(ignore_keys))
            return self._runner.agree(self._log_sink)
        finally:
            self._log_sink = None

    def _tell(self, event: str, **kwargs) -> None:
        call_federated_event(self.callback_handler, event, self.args, self.state, self.control, **kwargs)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """
        Log a record. While a client trains or a round is evaluated, what is logged goes into the record of the round, or
        nowhere.

        Args:
            logs (`dict[str, Any]`): The record.
            start_time (`float`, *optional*): As for [`~transformers.Trainer.log`].
        """
        if self._log_sink is not None:
            self._log_sink.update(self._logged_aside(logs, start_time))
            return
        # the loggers of report_to take numbers only; the history has the names, too
        names = {key: value for key, value in logs.items() if isinstance(value, list)}
        is_round = "round" in logs and "train_loss" in logs
        if is_round:
            # as Trainer calls that of a step: `train_loss` is to W&B and trackio that of a finished run, without a step
            names["train_loss"], logs = logs["train_loss"], {**logs, "loss": logs["train_loss"]}
        # the same dict, if it can be: what the trainer below adds to it is part of what `evaluate` returns
        super().log({k: v for k, v in logs.items() if k not in names} if names else logs, start_time)
        self.state.log_history[-1].update(names)
        if is_round:
            del self.state.log_history[-1]["loss"]

    def _logged_aside(self, logs: dict[str, Any], start_time: float | None) -> dict[str, Any]:
        """Let the trainer below complete a record, such as with metrics of its own, which goes nowhere else."""
        handler, history = self.callback_handler, self.state.log_history
        self.callback_handler, self.state.log_history = LocalCallbackHandler.of(handler), []
        try:
            super().log(logs, start_time)
            [record] = self.state.log_history
        finally:
            self.callback_handler, self.state.log_history = handler, history
        return {key: value for key, value in record.items() if key not in ("epoch", "step")}
