"""Evaluating the clients of a federation one by one, each with what is personal to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import pandas as pd
from torch.utils.data import Dataset
from transformers import DefaultFlowCallback
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import has_length

from .checkpoints import preserved_random_state
from .client_budgets import choose_heads
from .data.client_eval_data import make_client_eval_datasets
from .faults import TimeoutCallback
from .records.callbacks import call_federated_event
from .records.client_metrics import TIMED, summarize_clients
from .resuming import Run
from .seeds import derive_seed


class ClientEvaluationMixin:
    """Evaluates the clients of a [`FederatedTrainer`], without a trace in its run."""

    # a run of the federation must be the same with and without it, so all that it changes is put back
    _RESTORED_ATTRIBUTES = (
        "callback_handler", "control", "is_in_train", "_objective", "_learning_rate_factor", "_log_sink",
    )  # fmt: skip

    last_client_metrics: pd.DataFrame | None = None
    _client_eval_datasets: Mapping[str, Dataset] | None = None

    def evaluate_clients(
        self,
        client_eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        personalization_steps: int | None = None,
    ) -> pd.DataFrame:
        """
        Evaluate each client on its own data, with its own personal parts, if it has any (`args.local_parameters`), those
        of its last round. A client that has not taken part yet has those that every client starts with.

        Nothing of the run changes: neither the adapter and the random state, nor what clients keep. The callbacks are
        told by `on_client_evaluate` only.

        Args:
            client_eval_dataset (`Dataset` or `Mapping[str, Dataset]`, *optional*):
                Client names to data sets, or one data set that is split as the training data of the clients is, see
                [`make_client_eval_datasets`]. By default that of the trainer, or its `eval_dataset`.
            ignore_keys (`list[str]`, *optional*):
                As for [`~transformers.Trainer.evaluate`].
            personalization_steps (`int`, *optional*):
                For how many steps each client trains the adapter on its training data before it is evaluated, at the
                learning rate of `args` and with the heads it can afford. By default `args.personalization_steps`.

        Returns:
            `pandas.DataFrame`: A row for each client, with the number of `examples` and a column for each metric: `loss`,
            and what `compute_metrics` gives. It is kept as `last_client_metrics`; [`summarize_clients`] sums it up.

        Raises:
            ValueError: if there is no data to evaluate clients on.
        """
        datasets = self._datasets_to_evaluate(client_eval_dataset)
        steps = self.args.personalization_steps if personalization_steps is None else personalization_steps
        run = Run(self._live_adapter(), round=self._round_of_the_model(), personal_patterns=self._personal_patterns)
        run.take_state()
        rows, callbacks = {}, self.callback_handler
        with self._aside(run):
            for client, dataset in datasets.items():
                self._load_client(run, client, steps)
                rows[client] = self._evaluate_client(dataset, ignore_keys)
                told = {"client": client, "metrics": rows[client], "num_clients": len(datasets)}
                call_federated_event(callbacks, "on_client_evaluate", self.args, self.state, self.control, **told)
        self.last_client_metrics = pd.DataFrame.from_dict(rows, orient="index").rename_axis("client")
        return self.last_client_metrics

    def _client_figures(self, ignore_keys: list[str] | None) -> dict[str, float]:
        """What the record of a round says of the clients."""
        return summarize_clients(self.evaluate_clients(ignore_keys=ignore_keys)) if self.args.eval_clients else {}

    def _datasets_to_evaluate(self, given: Dataset | Mapping[str, Dataset] | None = None) -> Mapping[str, Dataset]:
        if given is not None:
            return self._prepared_for_evaluation(
                make_client_eval_datasets(given, self.clients, self.args.partition_settings)
            )
        if self._client_eval_datasets is None:
            # as it was given: a preparation drops columns that the split may go by, and may pack clients together
            own = self._given_eval_dataset if self._eval_preparations else self.eval_dataset
            dataset = own if self.client_eval_dataset is None else self.client_eval_dataset
            if dataset is None or (self.client_eval_dataset is None and isinstance(dataset, Mapping)):
                raise ValueError(
                    "There is nothing to evaluate the clients on. Give the trainer a `client_eval_dataset`, or an "
                    "`eval_dataset` that is one data set, which is then split among the clients."
                )
            parts = make_client_eval_datasets(dataset, self.clients, self.args.partition_settings)
            self._client_eval_datasets = self._prepared_for_evaluation(parts)
        return self._client_eval_datasets

    @contextlib.contextmanager
    def _aside(self, run: Run) -> Iterator[None]:
        before = {name: getattr(self, name) for name in self._RESTORED_ATTRIBUTES}
        # which ends a training after its steps; nobody else is told of them
        self.callback_handler = CallbackHandler([DefaultFlowCallback()], self.model, self.processing_class, None, None)
        self._objective = None  # clients train for themselves here
        self.is_in_train = True  # or `fp16_full_eval` would cast the model for good
        try:
            with self._runner.alone(), run.adapter.preserved(), preserved_random_state():
                yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def _load_client(self, run: Run, client: str, steps: int) -> None:
        """Put what a client has into the model: the shared adapter and its own parts, and what it makes of them."""
        kept = self._store.load(client, before=run.round + 1) if run.personal_start else {}
        own = {name: kept.get(name, tensor) for name, tensor in run.personal_start.items()}
        run.adapter.load({**run.global_state, **own})
        if not steps:
            return
        self._learning_rate_factor = 1.0  # not that of the round, so that it is the same after the last one
        names = (f"{run.round} (personalization)", client)  # other draws than those of any round
        seed = self.args.federated_seed
        with self._as_client(client, derive_seed(seed, "client", *names), TimeoutCallback(None)):
            self.args.max_steps = steps  # of the client's arguments, which are a copy
            if self.client_budgets is not None:
                choose_heads(self, self._head_choice(client, derive_seed(seed, "heads", *names)))
            super().train()

    def _evaluate_client(self, dataset: Dataset, ignore_keys: list[str] | None) -> dict[str, float]:
        self._log_sink = {}
        metrics = self.evaluate(dataset, ignore_keys=ignore_keys)
        computed = {name: value for name, value in metrics.items() if not name.endswith(TIMED)}
        examples = {"examples": len(dataset)} if has_length(dataset) else {}
        return {**examples, **{name.removeprefix("eval_"): value for name, value in computed.items()}}

    def _round_of_the_model(self) -> int:
        """The round that the adapter in the model is from."""
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint and not self.is_in_train:
            return self.state.best_global_step
        return self.state.global_step
