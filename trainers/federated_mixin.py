"""The rounds of a federation on one machine, for any Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
from peft import PeftModel, PeftType
from torch.utils.data import Dataset
from transformers import TrainerState, set_seed
from transformers import trainer as trainer_module
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.utils import logging

from peft_ravan.merging import ClientUpdate, MergeResult, ServerStep, get_merge_method, merge

from .arguments import FederatedArguments, FederatedArgumentsMixin
from .client_budgets import resolve_client_budgets
from .client_evaluation import ClientEvaluationMixin
from .client_runners import make_runner
from .clients import LiveAdapter, freeze, frozen_heap
from .data.checks import check_labels
from .data.partition import make_clients
from .data.partition_report import PartitionReportMixin
from .data.preparation import PreparationMixin, by_name, one_dataset
from .faults import ClientFault, RoundFailedError, check_for_a_mistake, merge_of, updates_of
from .federation import Federation
from .local_objective import ControlVariates
from .local_training import LocalTrainingMixin
from .participation import Availability
from .personal import check_patterns
from .private_rounds import PrivacyMixin, resolve_privacy
from .records.callbacks import FederatedProgressCallback
from .records.history import HistoryFileCallback, HistoryMixin
from .records.round_logs import RoundLogMixin
from .resuming import CheckpointingMixin, Run
from .round_zero import RoundZeroMixin
from .rounds import Round, is_due, learning_rate_factors, mean_train_loss
from .run_facts import run_facts
from .serialized import serialized_bytes
from .sharing import SharingMixin


logger = logging.get_logger(__name__)


class FederatedMixin(
    PreparationMixin,
    CheckpointingMixin,
    RoundZeroMixin,
    RoundLogMixin,
    PrivacyMixin,
    SharingMixin,
    PartitionReportMixin,
    ClientEvaluationMixin,
    HistoryMixin,
    LocalTrainingMixin,
):
    """
    The rounds of a federation, to be mixed over a [`~transformers.Trainer`], see [`federated`]. [`FederatedTrainer`] says
    what they are.

    A client's local training is the `train` of the trainer below, and so are its losses, data loaders, optimizers and
    evaluation. What that trainer logs while a client trains stays with the client.

    **Attributes**:
        - **client_attributes** (`tuple[str, ...]`) -- Names of attributes of the trainer below that change while a client
          trains, such as running sums of metrics. Each client has a copy of them, which is thrown away after its training.
          By default those of TRL's trainers; add to them those of your own.
    """

    client_attributes: ClassVar[tuple[str, ...]] = ("_metrics", "_total_train_tokens")
    arguments_class: ClassVar[type[FederatedArgumentsMixin]] = FederatedArgumentsMixin  # what `args` have to be

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
        self.clients = {}
        self.client_budgets: dict[str, float] | None = None
        if given is not None:
            adapter = self._live_adapter()  # raises if the model cannot be trained this way
            self.clients = self._prepared(clients)
            self.client_budgets = resolve_client_budgets(
                args.client_budgets,
                list(self.clients),
                args.federated_seed,
                self.model.active_peft_config,
                self.merge_method,
            )
            check_labels(self, given)
            args.participation.check(self._client_sizes(), availability)
            self._check_batches()
            self.privacy = resolve_privacy(args, len(self.clients), adapter, availability)
        self.availability = availability
        self.client_eval_dataset = client_eval_dataset
        if args.eval_clients and self.clients:
            self._datasets_to_evaluate()  # raises if there are none
        self.last_merge: MergeResult | None = None
        self.last_global_state: dict[str, torch.Tensor] | None = None
        self.client_fault = client_fault
        # that of notebooks needs epochs, which the rounds do not have
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
        return args

    def _check_parent(self) -> None:
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise ValueError(
                f"`optimizers` cannot be given to the {type(self).__name__}: every client starts with a fresh optimizer. "
                "Use `args.optim` or `optimizer_cls_and_kwargs`."
            )
        if self.train_dataset is not self._handed_dataset:
            raise ValueError(
                f"The {type(self).__name__} prepares its training set in a way that cannot be repeated for each client. "
                "Prepare the data before, or in a method `_prepare_dataset(dataset, ...)`, as the trainers of TRL do."
            )

    # ---- The run -----------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval=None
    ) -> TrainOutput:
        """
        Run the rounds. Afterwards the model holds the merged adapter, with every scaling at 1.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint to go on from, or `True` for the last complete one of the run that has begun last in
                `args.output_dir`.
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
            RoundFailedError: if in all attempts at a round too few clients succeeded. The model then holds the last
                merged adapter.
            RuntimeError: if in no round as many clients as `min_clients` were available.
        """
        if not self.clients:
            raise ValueError(f"The {type(self).__name__} needs a `train_dataset` to train.")
        if self.model_init is not None:
            self._init_model_again(trial)
        start_time = time.time()
        with self._locked_folder(trial):
            run = self._start_run(resume_from_checkpoint, trial)
            try:
                with frozen_heap():
                    self._run_rounds(run, ignore_keys_for_eval, trial)
                if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                    self._load_best_model()
                    run.take_state()
            finally:
                # also after an error: the model holds the last merged adapter, not that of a client
                run.load_global()
                self.last_global_state = run.global_state
                self._learning_rate_factor = None
                self.is_in_train = False
            return self._finish_run(start_time)

    def _run_rounds(self, run: Run, ignore_keys_for_eval: list[str] | None, trial: Any) -> None:
        self._open_run(run, trial)
        factors = learning_rate_factors(self.args, self.args.num_rounds)
        for round_number in range(run.round + 1, len(factors) + 1):
            self._stop_if_spent()
            if self._runner.agree(self.control.should_training_stop):
                break
            self._learning_rate_factor = factors[round_number - 1]
            self._run_round(run, round_number, ignore_keys_for_eval, trial)

    def _init_model_again(self, trial: Any) -> None:
        # as Trainer does, so that a second train() does not go on from the first
        set_seed(self.args.seed)
        self.model = self.call_model_init(trial)
        self._move_model_to_device(self.model, self.args.device)
        self.model_wrapped = self.callback_handler.model = self.model

    def _start_run(self, resume_from_checkpoint: str | bool | None, trial: Any) -> Run:
        self._runner.share(chain(self.model.parameters(), self.model.buffers()))  # what was drawn may differ
        run = Run(self._live_adapter(), personal_patterns=self._personal_patterns)
        run.take_state()
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
        self.state.epoch = None  # rounds are counted; an epoch means something to a client only
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        if run.round:
            self.control.should_training_stop |= was_stopped
        return run

    def _finish_run(self, start_time: float) -> TrainOutput:
        self._finish_current_push()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        records = [record for record in self.state.log_history if record.get("round")]
        train_loss = mean_train_loss(records, self.args.min_clients)
        metrics = {
            "train_runtime": time.time() - start_time,
            "train_loss": train_loss,
            **{
                name: sum(record.get(name, 0) for record in self.state.log_history)  # those of round 0, too
                for name in ("upload_bytes", "download_bytes")
            },
        }
        return TrainOutput(self.state.global_step, train_loss, metrics)

    # ---- A round -----------------------------------------------------------------

    def _run_round(self, run: Run, round_number: int, ignore_keys_for_eval: list[str] | None, trial: Any) -> None:
        start_time = time.perf_counter()
        this_round, result = self._train_and_merge(run, round_number)
        if result is not None:  # else the round is skipped
            self.last_merge = result
            run.global_state, run.server_state = result.state, result.server_state
        run.round = round_number
        run.load_global()
        round_seconds = time.perf_counter() - start_time

        self.state.global_step = round_number
        record = {**this_round.record(), **self._privacy_record(this_round), "round_seconds": round_seconds}
        is_best = False
        if is_due(self.args.eval_strategy, self.args.eval_steps, round_number, self.args.num_rounds):
            metrics = self._evaluate_quietly(ignore_keys_for_eval)
            is_best = self._determine_best_metric(metrics, trial)
            record.update(metrics)
        self.log(record)
        self._tell("on_round_end", record=record)
        is_save_due = is_due(
            self.args.save_strategy, self.args.save_steps, round_number, self.args.num_rounds, also_last=True
        )
        if is_save_due or (is_best and self.args.save_strategy == SaveStrategy.BEST):
            self._save_round(run, trial)

    def _train_and_merge(self, run: Run, round_number: int) -> tuple[Round, MergeResult | None]:
        """
        Train the clients of a round and merge what they upload, if need be several times, each with other clients. There
        is nothing to merge if too few clients are available.
        """
        sizes = self._client_sizes()
        this_round = Round(round_number, self.args.participation.sample(sizes, round_number, self.availability))
        while True:
            needed = self._needed_clients(this_round)
            self._tell("on_round_begin", clients=this_round.clients)
            result = self._merge(run, this_round) if this_round.clients else None
            counts = len(this_round.num_examples) >= needed
            self._settle(run, this_round, counts)
            if counts:
                return this_round, result
            if not any(record.get("clients") for record in self.state.log_history):
                check_for_a_mistake(this_round, len(self.clients))  # what works for some is no mistake of all
            if this_round.attempts == self.args.max_round_attempts:
                raise RoundFailedError(
                    f"Round {round_number}: fewer than {needed} clients (`min_successful_clients`) succeeded in each of "
                    f"{this_round.attempts} attempts. {this_round.failed()}"
                ) from this_round.first_error
            logger.warning(f"Round {round_number} is repeated with other clients. {this_round.failed()}")
            others = {client: size for client, size in sizes.items() if client not in this_round.failures}
            enough = len(others) >= max(needed, self.args.min_clients)
            clients = self.args.participation.sample(
                others if enough else sizes, round_number, self.availability, attempt=this_round.attempts
            )
            this_round = this_round.again(clients)

    def _merge(self, run: Run, this_round: Round) -> MergeResult | None:
        args = self.args
        control = ControlVariates(run.server_state, len(self.clients)) if args.scaffold else None
        this_round.download_bytes += serialized_bytes(run.global_state) * len(this_round.clients)
        # a client trains when the merge asks for its update: none is kept longer than the merge needs it
        updates = updates_of(
            this_round,
            self._runner.run(
                this_round.clients, lambda client: self._client_round(run, this_round.round_number, client, control)
            ),
            partial(self._receive, this_round, control),
            lambda client: self._tell("on_client_end", client=client, failure=this_round.failures.get(client)),
        )

        def merge_updates(updates: Iterable[ClientUpdate]) -> MergeResult:
            result = merge(
                run.global_state,
                updates,
                self.merge_method,
                config=self.model.active_peft_config,
                on_bad_update="drop",
                limits=args.update_limits if args.update_limits.is_set else None,
                server_step=ServerStep(
                    args.server_optimizer,
                    args.server_optimizer_options or {},
                    run.server_state,
                    this_round.round_number,
                ),
                mechanism=self._mechanism(this_round),
                **(args.merge_options or {}),
            )
            if control is None:
                return result
            dropped = {entry["client"] for entry in result.diagnostics["dropped"]}
            merged = [client for client in this_round.num_examples if client not in dropped]
            new_control = self._move_control(this_round, control, merged)
            return replace(result, server_state={**result.server_state, **new_control})

        return self._merge_updates(this_round, updates, merge_updates)

    def _merge_updates(
        self,
        this_round: Round,
        updates: Iterable[ClientUpdate],
        merge_updates: Callable[[Iterable[ClientUpdate]], MergeResult],
    ) -> MergeResult | None:
        """Merge the updates of a round. All processes then have the result, and the same record of the round."""

        def merged(updates: Iterable[ClientUpdate]) -> tuple[MergeResult | None, dict[str, Any]]:
            result = merge_of(this_round, lambda: merge_updates(updates))
            return result, {**vars(this_round), "first_error": None}  # errors cannot all be sent

        first_error = this_round.first_error
        result, recorded = self._runner.merge(updates, merged)
        first_error = first_error or this_round.first_error
        vars(this_round).update(recorded, first_error=first_error)
        return result

    @property
    def merge_method(self) -> str:
        """The name of the merge method: that of the arguments, or what suits the adapter."""
        if self.args.merge_method is not None:
            return self.args.merge_method
        return "ravan" if self.model.active_peft_config.peft_type == PeftType.RAVAN else "fedavg"

    @property
    def federation(self) -> Federation:
        """What the federation is made with."""
        return Federation(
            self.args,
            self.model,
            self.clients,
            self._client_sizes(),
            self.merge_method,
            self.client_budgets,
            self.privacy,
            self.optimizer_cls_and_kwargs,
            is_given_by_client=isinstance(self.train_dataset, Mapping),
            num_processes_sharing=self._runner.num_processes_sharing,
        )

    def _live_adapter(self) -> LiveAdapter:
        if isinstance(self.model, PeftModel):
            freeze(self.model, get_merge_method(self.merge_method).frozen_parts)
        return LiveAdapter(self.model)
