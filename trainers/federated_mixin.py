"""The rounds of a federation on one machine, for any Trainer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset
from transformers import TrainerState, set_seed
from transformers import trainer as trainer_module
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.utils import logging

from peft_ravan.merging import MergeResult

from .arguments import FederatedArguments, FederatedArgumentsMixin
from .client.batching import ClientBatch
from .client.faults import ClientFault
from .client.live_adapter import single_active_adapter
from .client.local_client import LocalClient
from .client.personal import check_patterns
from .client.settings import ClientSettings
from .client.task_head import check_task_head_rate
from .client_setup import client_settings, personal_patterns
from .data.checks import check_batches, check_labels
from .data.client_data import ClientData
from .data.partition import make_clients
from .data.preparation import PreparationMixin, by_name, one_dataset
from .exchange import ClientReply
from .federation import Federation
from .heap import frozen_heap
from .hyperparameter_search import take_trial
from .original_base import OriginalBase
from .parent_checks import check_parent
from .records.callbacks import FederatedProgressCallback
from .records.history import HistoryFileCallback
from .records.reports import ReportsMixin
from .resuming import CheckpointingMixin
from .round_zero import make_common_bases
from .run import Run
from .run_facts import run_facts
from .runners import make_runner
from .schedule import is_due, run_metrics
from .server.budgets import check_products
from .server.merging import MergeSettings
from .server.participation import Availability
from .server.privacy import PrivateRounds
from .server.private_rounds import check_privacy_of_adapter
from .server.server import Progress, Server
from .server.settings import ServerSettings
from .server.state import ServerState
from .server_setup import KnownClients, server_settings
from .sharing import SharingMixin


logger = logging.get_logger(__name__)


class FederatedMixin(PreparationMixin, CheckpointingMixin, SharingMixin, ReportsMixin):
    """
    The rounds of a federation, as a mixin for a [`~transformers.Trainer`], see [`federated`]. They are described in
    [`FederatedTrainer`].

    A client's local training is the `train` method of the base trainer, with its losses, data loaders, optimizers and
    evaluation. What the base trainer logs while a client trains is not reported.

    **Attributes**:
        - **client_attributes** (`tuple[str, ...]`) -- Names of attributes of the base trainer that change while a
          client trains, such as running sums of metrics. Each client gets a copy of them, which is discarded after its
          training. By default those of TRL's trainers. Add those of your own trainer.
    """

    client_attributes: ClassVar[tuple[str, ...]] = ClientSettings().attributes
    arguments_class: ClassVar[type[FederatedArgumentsMixin]] = FederatedArgumentsMixin  # the required type of `args`

    can_sum_securely: ClassVar[bool] = False  # on one machine, there is nobody to hide updates from

    privacy: PrivateRounds | None = None
    _last_run: Run | None = None

    def __init__(
        self,
        *trainer_args,
        client_fault: ClientFault | None = None,
        availability: Availability | None = None,
        client_eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        **kwargs,
    ):
        kwargs = {**by_name(type(self), FederatedMixin, trainer_args), **kwargs}
        kwargs["args"] = args = self._checked_arguments(kwargs.get("args"))
        given = kwargs.get("train_dataset")
        clients = {} if given is None else make_clients(given, args)  # before its columns are dropped
        if given is not None:
            kwargs["train_dataset"] = self._handed_dataset = one_dataset(given)
        self._given_eval_dataset = self._handed_eval_dataset = kwargs.get("eval_dataset")
        super().__init__(**kwargs)
        self._check_parent()
        self._runner = make_runner(args.parallel)
        self._handed_dataset = self._handed_eval_dataset = None
        self.train_dataset = given
        self.clients: Mapping[str, Dataset] = {}
        self.client_budgets: dict[str, float] | None = None
        self.availability, self.client_fault = availability, client_fault
        if given is not None:
            self._set_up_clients(clients, given)
        self.client_eval_dataset = client_eval_dataset
        if args.eval_clients and self.clients:
            self._datasets_to_evaluate()  # raises if there are none
        self.last_merge: MergeResult | None = None
        self.last_global_state: dict[str, torch.Tensor] | None = None
        # the progress bar for notebooks needs epochs, which rounds do not have
        if self.pop_callback(trainer_module.DEFAULT_PROGRESS_CALLBACK) is not None:
            self.add_callback(FederatedProgressCallback)
        self.add_callback(HistoryFileCallback)

    def _checked_arguments(self, args: Any) -> FederatedArgumentsMixin:
        is_own = self.arguments_class is not FederatedArgumentsMixin
        suitable = self.arguments_class if is_own else FederatedArguments
        if args is None:
            return suitable(output_dir="tmp_trainer")
        if not isinstance(args, self.arguments_class):
            raise TypeError(
                f"The {type(self).__name__} needs `{suitable.__name__}`, got {type(args).__name__}. They take everything "
                "that those of the trainer below take; `federated_arguments` makes them for a trainer of your own."
            )
        if args.secure_aggregation and not self.can_sum_securely:
            raise ValueError(
                "`secure_aggregation` hides the updates of clients from a server on another machine, and here all are in one "
                "process. Leave it out, or run the federation over Flower."
            )
        return args

    def _check_parent(self) -> None:
        check_parent(self, self._handed_dataset)

    def _set_up_clients(self, clients: Mapping[str, Dataset], given: Dataset | Mapping[str, Dataset]) -> None:
        args = self.args
        single_active_adapter(self.model)  # raises if the model cannot be trained this way
        adapter = self._local_client().adapter
        self.clients = self._prepared(clients)
        check_task_head_rate(self, args.task_head_learning_rate)
        check_labels(self, given)
        sizes = self._client_sizes()
        if not self._preparations:  # preparation may make more examples from few
            check_batches(max(sizes.values()), args.train_batch_size * self._runner.group.size, args)
        if args.privacy is not None:
            check_privacy_of_adapter(adapter.awaits_gradient, adapter.statistics)
        self._know_clients(sizes)

    def _know_clients(self, sizes: Mapping[str, int]) -> None:
        known = KnownClients.of(sizes, self.args, self.model.active_peft_config, self.availability)
        if known.has_partial_budgets:
            check_products(self._local_client().adapter.read(), self.model.active_peft_config)
        self.client_budgets, self.privacy = known.budgets, known.privacy

    # ---- Parts of a federation ---------------------------------------------------

    @property
    def merge_method(self) -> str:
        """The name of the merge method: the one in the arguments, or one that suits the adapter."""
        return self._merging.method

    @property
    def _merging(self) -> MergeSettings:
        return self.args.merging.of(self.model.active_peft_config)

    @property
    def federation(self) -> Federation:
        """The setup of the federation."""
        return Federation(
            self.args,
            self.model,
            self.clients,
            self._server_settings(),
            self.args.partition_settings,
            self.optimizer_cls_and_kwargs,
            is_given_by_client=isinstance(self.train_dataset, Mapping),
            num_processes_sharing=self._runner.group.size,
        )

    @property
    def last_server_state(self) -> ServerState | None:
        """The state of the server after the last round, as one value."""
        return None if self._last_run is None else self._last_run.server.state

    def _server_settings(self, sent_exactly: Sequence[str] = ()) -> ServerSettings:
        clients = KnownClients(self._client_sizes(), self.availability, self.client_budgets, self.privacy)
        return server_settings(clients, self.args, self.model.active_peft_config, sent_exactly)

    def _local_client(self) -> LocalClient:
        return LocalClient(
            self,
            self._store,
            settings=client_settings(self.args, self.model.active_peft_config, self.client_attributes),
            data=ClientData.of_clients(self.clients, self.args, self._runner.group.size),
            train=super().train,
            group=self._runner.group,
            fault=self.client_fault,
        )

    @property
    def _keeps_state(self) -> bool:
        return self.args.scaffold or bool(personal_patterns(self.args, self.model.active_peft_config))

    def _client_sizes(self) -> dict[str, int]:
        data = ClientData.of_clients(self.clients, self.args, self._runner.group.size)
        return {client: data.num_examples(client) for client in self.clients}

    # ---- The run -----------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval=None
    ) -> TrainOutput:
        """
        Run the rounds. Afterwards the model holds the merged adapter, with every scaling at 1. If the merge method changes
        base weights, it holds the original ones, and an adapter of a higher rank that has the same effect on them.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint to resume from, or `True` for the last complete checkpoint of the run that was started
                last in `args.output_dir`.
            trial (*optional*):
                As for [`~transformers.Trainer.train`].
            ignore_keys_for_eval (`list[str]`, *optional*):
                As for [`~transformers.Trainer.train`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: The number of rounds, the mean training loss over them and, in
            `metrics`, the bytes sent and the runtime.

        Raises:
            ValueError: if there is no training data, or nothing to resume from.
            CheckpointError: if the checkpoint is damaged or belongs to another federation.
            FolderInUseError: if another run is writing into `args.output_dir`.
            RoundFailedError: if too few clients succeeded in all attempts at a round. The model then holds the last
                merged adapter.
            RuntimeError: if there was no round in which `min_clients` clients were available.
        """
        if not self.clients:
            raise ValueError(f"The {type(self).__name__} needs a `train_dataset` to train.")
        if self.model_init is not None:
            self._init_model_again(trial)
        if trial is not None:
            take_trial(self, trial)
            self._know_clients(self._client_sizes())
        start_time = time.time()
        with self._locked_folder(trial):
            run = self._start_run(resume_from_checkpoint, trial)
            try:
                with frozen_heap():
                    self._run_rounds(run, ignore_keys_for_eval, trial)
                if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                    self._load_best_model(run)
                    run.take_global()
            finally:
                # also after an error, so that the model holds the last merged adapter and not that of a client
                run.finish()
                self.last_global_state = dict(run.server.state.global_state)
                self.is_in_train = False
            return self._finish_run(start_time)

    def _run_rounds(self, run: Run, ignore_keys_for_eval: list[str] | None, trial: Any) -> None:
        if run.round == 0:
            self._open_run(run, trial)
        for round_number in range(run.round + 1, self.args.num_rounds + 1):
            if self._is_over(run):
                break
            self._run_round(run, round_number, ignore_keys_for_eval, trial)

    def _is_over(self, run: Run) -> bool:
        """Whether the run ends before its last round: a callback has stopped it, or its privacy budget is spent."""
        if not self.control.should_training_stop and (reason := run.server.why_spent()) is not None:
            logger.warning(reason)
            self.control.should_training_stop = True
        return self._runner.agree(self.control.should_training_stop)

    def _init_model_again(self, trial: Any) -> None:
        # as Trainer does, so that a second train() does not continue from the first
        set_seed(self.args.seed)
        self.model = self.call_model_init(trial)
        self._move_model_to_device(self.model, self.args.device)
        self.model_wrapped = self.callback_handler.model = self.model

    def _start_run(self, resume_from_checkpoint: str | bool | None, trial: Any) -> Run:
        base_before = self._reopened_base()
        self._runner.share(chain(self.model.parameters(), self.model.buffers()))  # random initial values may differ
        client = self._local_client()
        server = Server(self._server_settings(client.adapter.sent_exactly), ServerState(client.take_start()))
        batch = ClientBatch.of(client, type(self)._local_client, self.args.client_batching)
        self._last_run = run = Run(server, client, OriginalBase.of(self.model, client.adapter, base_before), batch)
        check_patterns(run.state(), self.args.local_parameters or ())
        self.last_merge = None
        self.is_in_train = True
        self.state = TrainerState(stateful_callbacks=self._stateful_callbacks())
        if resume_from_checkpoint or self._saves_checkpoints:
            run.facts = run_facts(self.federation, run.state())
        if resume_from_checkpoint:
            self._load_checkpoint(resume_from_checkpoint, run, trial)
            self._restore_callbacks()
        self._claim_folder(run, trial)
        was_stopped = self.control.should_training_stop
        self.state.max_steps = self.args.num_rounds
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.compute_steps(self.args, self.args.num_rounds)
        self.state.epoch = None  # rounds are counted; epochs exist only for clients
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        if run.round:
            self.control.should_training_stop |= was_stopped
        return run

    def _reopened_base(self) -> OriginalBase | None:
        """What the last run started from, if this one also changes base weights and goes on with its result."""
        base = None if self._last_run is None else self._last_run.base
        if base is not None and self._merging.merge_method.changes_model:
            base.reopen(self.model)
        return base

    def _open_run(self, run: Run, trial: Any) -> None:
        """
        Do what comes before the first round, and is not repeated when a run is resumed after one. It gives at most one
        record.
        """
        if run.server.keep_from is None:  # else the run is resumed from its start, which is saved already
            self._save_start(run, trial)
        record = {}
        if run.client.adapter.awaits_gradient:
            record = make_common_bases(run, self._runner, self.model, self.args.bases)
        if self.args.eval_on_start:
            record.update(self._evaluate_quietly(None))
        if record:
            self.log({"round": 0, **record})

    def _finish_run(self, start_time: float) -> TrainOutput:
        self._finish_current_push()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        metrics = run_metrics(self.state.log_history, self.args.min_clients)
        return TrainOutput(
            self.state.global_step, metrics["train_loss"], {"train_runtime": time.time() - start_time, **metrics}
        )

    # ---- A round -----------------------------------------------------------------

    def _run_round(self, run: Run, round_number: int, ignore_keys_for_eval: list[str] | None, trial: Any) -> None:
        start_time, record = time.perf_counter(), None
        while record is None:  # too few clients succeeded, so other clients are asked
            record = self._attempt_round(run, round_number)
        record["round_seconds"] = time.perf_counter() - start_time
        self._end_round(run, record, ignore_keys_for_eval, trial)

    def _end_round(
        self, run: Run, record: dict[str, Any], ignore_keys_for_eval: list[str] | None = None, trial: Any = None
    ) -> None:
        """Do what comes after a round was closed: evaluate, log and save it."""
        args, round_number = self.args, run.round
        self.last_merge = run.server.last_merge
        run.load_result()
        self.state.global_step = round_number
        is_best, metrics = False, {}
        if is_due(args.eval_strategy, args.eval_steps, round_number, args.num_rounds):
            metrics = self._evaluate_round(run, ignore_keys_for_eval)
            is_best = self._determine_best_metric(metrics, trial)
            record.update(metrics)
        self.log(record)
        self._tell("on_round_end", record=record)
        if metrics:
            self._report_to_hp_search(trial, round_number, metrics)
        is_save_due = is_due(args.save_strategy, args.save_steps, round_number, args.num_rounds, also_last=True)
        if is_save_due or (is_best and args.save_strategy == SaveStrategy.BEST):
            self._save_round(run, trial)

    def _evaluate_round(self, run: Run, ignore_keys_for_eval: list[str] | None) -> dict[str, float]:
        metrics = self._evaluate_quietly(ignore_keys_for_eval)
        is_wanted = (self.args.average_rounds or 1) > 1 if self.args.eval_last is None else self.args.eval_last
        if is_wanted and run.server.settings.average_rounds != 1:
            run.load_global()
            metrics.update(self._evaluate_quietly(ignore_keys_for_eval, "eval_last"))
            run.load_result()
        return metrics

    def _attempt_round(self, run: Run, round_number: int) -> dict[str, Any] | None:
        tasks = run.server.open(round_number)
        self._tell("on_round_begin", clients=[task.client for task in tasks])
        replies = self._told(run.replies(self._runner, tasks))

        def close(replies: Iterable[ClientReply]) -> tuple[dict[str, Any] | None, Progress]:
            return run.server.close(round_number, replies), run.server.progress

        record, run.server.progress = self._runner.at_server(replies, close)
        return record

    def _told(self, replies: Iterable[ClientReply]) -> Iterator[ClientReply]:
        for reply in replies:
            client, failure = reply.client, reply.failure
            yield reply
            del reply
            self._tell("on_client_end", client=client, failure=failure)
