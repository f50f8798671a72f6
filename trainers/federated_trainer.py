"""A Trainer that runs the rounds of a federation on one machine."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput, has_length
from transformers.training_args import ParallelMode

from peft_ravan.merging import ClientUpdate, MergeResult, get_merge_method, merge

from .arguments import FederatedArguments
from .callbacks import FederatedProgressCallback, LocalCallbackHandler, call_federated_event
from .client_budgets import choose_heads, count_trained_heads, resolve_client_budgets
from .clients import LiveAdapter, freeze, frozen_heap, local_arguments
from .partition import make_clients
from .reporting import SharingMixin
from .rounds import Round, derive_seed, is_due, learning_rate_factors, sample_clients, serialized_bytes


# what a client's local training replaces, and what is put back after it
_OF_THE_FEDERATION = (
    "args",
    "callback_handler",
    "control",
    "model_init",
    "optimizer_cls_and_kwargs",
    "state",
    "train_dataset",
)


class FederatedTrainer(SharingMixin, Trainer):
    """
    A [`~transformers.Trainer`] that trains an adapter over simulated clients.

    It takes what `Trainer` takes. In each round some clients train, one after the other, each from the global adapter and
    with a fresh optimizer; what they train is uploaded (the products s*H of a Ravan adapter, or the matrices of another,
    and the task head, never bases or the base model) and merged into the next global adapter. A client's local steps are
    those of `Trainer.train`, so gradient accumulation, mixed precision, clipping and callbacks work as they do there.

    Args:
        model ([`~peft.PeftModel`]):
            The model with the adapter to train.
        args ([`FederatedArguments`], *optional*):
            The arguments.
        train_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            One training set, which is split among clients as `args.partition` says, or the data set of each client by
            its name.
        **kwargs:
            As for [`~transformers.Trainer`]. Each client needs an optimizer of its own, so choose it by `args.optim` or
            `optimizer_cls_and_kwargs`, not by `optimizers`.

    **Attributes**:
        - **clients** (`dict[str, Dataset]`) -- The data set of each client.
        - **client_budgets** (`dict[str, float]`) -- The share of the heads that each client can train, or `None`.
        - **state.log_history** (`list[dict]`) -- One record a round: `round` (from 1), `clients`, `num_examples`,
          `train_loss`, the metrics of the evaluation, `upload_bytes` and `download_bytes` (of all clients, counted from
          the serialised tensors), `round_seconds` (without the evaluation), `learning_rate` and, with `client_budgets`,
          `heads_trained` (the number of heads of each client).
        - **last_merge** ([`~peft_ravan.merging.MergeResult`]) -- The last merge, with its diagnostics.

    Raises:
        TypeError: if `args` are not [`FederatedArguments`], or the model has no adapter.
        ValueError: if the data cannot be split, `client_budgets` do not suit the adapter, the clients or the merge
            method, or `optimizers` are given.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_ravan import RavanConfig
        >>> from peft_ravan.trainers import FederatedArguments, FederatedTrainer

        >>> model = get_peft_model(model, RavanConfig(task_type="SEQ_CLS"))
        >>> args = FederatedArguments("out", num_clients=20, clients_per_round=5, num_rounds=30, max_steps=10)
        >>> trainer = FederatedTrainer(model, args, train_dataset=dataset)
        >>> trainer.train()
        ```
    """

    def __init__(self, model=None, args: FederatedArguments | None = None, *trainer_args, **kwargs):
        if args is None:
            args = FederatedArguments(output_dir="tmp_trainer")
        if not isinstance(args, FederatedArguments):
            raise TypeError(
                f"The FederatedTrainer needs `FederatedArguments`, got {type(args).__name__}. They take everything that "
                "`TrainingArguments` take."
            )
        super().__init__(model, args, *trainer_args, **kwargs)
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise ValueError(
                "`optimizers` cannot be given to the FederatedTrainer: every client starts with a fresh optimizer. Use "
                "`args.optim` or `optimizer_cls_and_kwargs`."
            )
        if args.parallel_mode == ParallelMode.DISTRIBUTED:
            raise ValueError(
                "The FederatedTrainer runs in one process for now. Start it without a distributed launcher."
            )
        self.clients = {}
        self.client_budgets: dict[str, float] | None = None
        if self.train_dataset is not None:
            self._live_adapter()  # raises if the model cannot be trained this way
            self.clients = make_clients(self.train_dataset, args)
            self.client_budgets = resolve_client_budgets(self)
        self.last_merge: MergeResult | None = None
        self._learning_rate_factor: float | None = None  # set while a client trains
        self._log_sink: dict[str, Any] | None = None  # set while logs belong to a round's record
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(FederatedProgressCallback)

    # ---- The run -----------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval=None
    ) -> TrainOutput:
        """
        Run the rounds. Afterwards the model holds the merged adapter, with every scaling at 1.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Not supported yet.
            trial (*optional*):
                As for [`~transformers.Trainer.train`].
            ignore_keys_for_eval (`list[str]`, *optional*):
                As for [`~transformers.Trainer.train`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: The number of rounds, the mean training loss over them and, in
            `metrics`, the bytes sent and the runtime.

        Raises:
            ValueError: if there is no training data, or `resume_from_checkpoint` is given.
            UpdateError: if what a client uploads cannot be merged, for example because its training diverged. The model
                then holds the last merged adapter.
        """
        if resume_from_checkpoint:
            raise ValueError("`resume_from_checkpoint` is not supported by the FederatedTrainer yet.")
        if not self.clients:
            raise ValueError("The FederatedTrainer needs a `train_dataset` to train.")
        if self.model_init is not None:
            self._init_model_again(trial)

        start_time = time.time()
        adapter = self._live_adapter()
        global_state = adapter.read()
        self.last_merge = None
        self._start_run()
        try:
            with frozen_heap():
                for number, factor in enumerate(learning_rate_factors(self.args), start=1):
                    self._learning_rate_factor = factor
                    global_state = self._run_round(number, adapter, global_state, ignore_keys_for_eval, trial)
                    if self.control.should_training_stop:
                        break
        finally:
            # also after an error: the model holds the last merged adapter, not that of a client
            adapter.load(global_state if self.last_merge is None else self.last_merge.state)
            self._learning_rate_factor = None
            self.is_in_train = False
        return self._finish_run(start_time)

    def _init_model_again(self, trial: Any) -> None:
        # as Trainer does, so that a second train() does not go on from the first
        set_seed(self.args.seed)
        self.model = self.call_model_init(trial)
        self._move_model_to_device(self.model, self.args.device)
        self.model_wrapped = self.callback_handler.model = self.model

    def _start_run(self) -> None:
        self.is_in_train = True
        self.state = TrainerState(
            max_steps=self.args.num_rounds,
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            stateful_callbacks=[
                callback
                for callback in [*self.callback_handler.callbacks, self.control]
                if isinstance(callback, ExportableState)
            ],
        )
        self.state.compute_steps(self.args, self.args.num_rounds)
        self.state.epoch = None  # rounds are counted; an epoch means something to a client only
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        if self.args.eval_on_start:
            self.log({"round": 0, **self._evaluate_quietly(None)})

    def _finish_run(self, start_time: float) -> TrainOutput:
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        records = [record for record in self.state.log_history if record.get("round")]
        train_loss = sum(record["train_loss"] for record in records) / len(records)
        metrics = {
            "train_runtime": time.time() - start_time,
            "train_loss": train_loss,
            "upload_bytes": sum(record["upload_bytes"] for record in records),
            "download_bytes": sum(record["download_bytes"] for record in records),
        }
        return TrainOutput(self.state.global_step, train_loss, metrics)

    # ---- A round -----------------------------------------------------------------

    def _run_round(
        self,
        number: int,
        adapter: LiveAdapter,
        global_state: dict[str, torch.Tensor],
        ignore_keys_for_eval: list[str] | None,
        trial: Any,
    ) -> dict[str, torch.Tensor]:
        start_time = time.perf_counter()
        this_round = Round(number, sample_clients(list(self.clients), self.args, number))
        self._tell("on_round_begin", clients=this_round.clients)
        this_round.download_bytes = serialized_bytes(global_state) * len(this_round.clients)
        for client in this_round.clients:
            adapter.load(global_state)
            train_loss, this_round.learning_rate = self._train_client(client, number)
            update = ClientUpdate(adapter.read(), self._num_examples(client), client, adapter.trained_heads())
            this_round.add(update, train_loss)
            self._tell("on_client_end", client=client)

        self.last_merge = self._merge(global_state, this_round.updates)
        adapter.load(self.last_merge.state)
        round_seconds = time.perf_counter() - start_time

        self.state.global_step = number
        record = {**this_round.record(), "round_seconds": round_seconds}
        if self.client_budgets is not None:
            record["heads_trained"] = count_trained_heads(this_round.updates)
        if is_due(self.args.eval_strategy, self.args.eval_steps, number, self.args.num_rounds):
            record.update(self._evaluate_quietly(ignore_keys_for_eval))
        self.log(record)
        self._tell("on_round_end", record=record)
        if is_due(self.args.save_strategy, self.args.save_steps, number, self.args.num_rounds, also_last=True):
            self._save_round(trial)
        return self.last_merge.state

    def _live_adapter(self) -> LiveAdapter:
        if isinstance(self.model, PeftModel):
            freeze(self.model, get_merge_method(self.merge_method).frozen_parts)
        return LiveAdapter(self.model)

    def _merge(self, global_state: dict[str, torch.Tensor], updates: list[ClientUpdate]) -> MergeResult:
        args = self.args
        return merge(
            global_state,
            updates,
            self.merge_method,
            config=self.model.active_peft_config,
            server_optimizer=args.server_optimizer,
            server_options=args.server_optimizer_options,
            server_state=None if self.last_merge is None else self.last_merge.server_state,
            **(args.merge_options or {}),
        )

    @property
    def merge_method(self) -> str:
        """The name of the merge method: that of the arguments, or what suits the adapter."""
        if self.args.merge_method is not None:
            return self.args.merge_method
        return "ravan" if self.model.active_peft_config.peft_type == PeftType.RAVAN else "fedavg"

    def _num_examples(self, client: str) -> int:
        dataset = self.clients[client]
        if has_length(dataset):
            return len(dataset)
        return self.args.max_steps * self.args.gradient_accumulation_steps * self.args.train_batch_size

    def _evaluate_quietly(self, ignore_keys: list[str] | None) -> dict[str, float]:
        """Evaluate without a log record of its own: the metrics become part of the record of the round."""
        self._log_sink = {}
        try:
            self.evaluate(ignore_keys=ignore_keys)
            return self._log_sink
        finally:
            self._log_sink = None

    def _save_round(self, trial: Any) -> None:
        # optimizer and scheduler live no longer than a client's training, so there are none to save
        args, self.args = self.args, copy.copy(self.args)
        self.args.save_only_model = True
        try:
            self._save_checkpoint(self.model, trial)
        finally:
            self.args = args
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

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
            self._log_sink.update(logs)
            return
        # the loggers of report_to take numbers only; the history has the names, too
        names = {key: value for key, value in logs.items() if isinstance(value, list)}
        super().log({key: value for key, value in logs.items() if key not in names}, start_time)
        self.state.log_history[-1].update(names)

    # ---- A client ----------------------------------------------------------------

    def _train_client(self, client: str, round_number: int) -> tuple[float, float]:
        """Train the model as it is on the data of a client. Returns the mean training loss and the learning rate."""
        with self._as_client(client, round_number):
            try:
                if self.client_budgets is not None:
                    choose_heads(self, client, round_number)
                output = super().train()
                return output.training_loss, self.lr_scheduler.get_last_lr()[0]
            except Exception as error:
                if hasattr(error, "add_note"):  # Python 3.11 and later
                    error.add_note(f"This happened in round {round_number}, while client {client!r} trained.")
                raise

    @contextlib.contextmanager
    def _as_client(self, client: str, round_number: int) -> Iterator[None]:
        """Make this trainer that of one client: its data, its seed, and nothing that belongs to the federation."""
        federation = {name: getattr(self, name) for name in _OF_THE_FEDERATION}
        self.args = local_arguments(self.args, derive_seed(self.args.federated_seed, "client", round_number, client))
        self.callback_handler = LocalCallbackHandler(
            self.callback_handler.callbacks, self.model, self.processing_class, None, None
        )
        self.control = TrainerControl()
        self.model_init = None
        self.train_dataset = self.clients[client]
        if self.optimizer_cls_and_kwargs is not None:
            # Trainer takes parameter groups out of the dict, which would leave the next client without them
            optimizer_cls, kwargs = self.optimizer_cls_and_kwargs
            self.optimizer_cls_and_kwargs = (optimizer_cls, dict(kwargs))
        self.optimizer = self.lr_scheduler = None
        self._log_sink = {}
        set_seed(self.args.seed)
        try:
            yield
        finally:
            for name, value in federation.items():
                setattr(self, name, value)
            self.optimizer = self.lr_scheduler = self._log_sink = None
            self.is_in_train = True  # of the federation, which the local training has set to False

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """
        The parameters that weight decay is applied to: as for [`~transformers.Trainer`], without Ravan's scalings.

        Args:
            model (`torch.nn.Module`): The model.

        Returns:
            `list[str]`: The names of the parameters.
        """
        return [name for name in super().get_decay_parameter_names(model) if ".ravan_s." not in name]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """
        Set up the scheduler, which is constant while a client trains.

        Args:
            num_training_steps (`int`): The number of training steps to do.
            optimizer (`torch.optim.Optimizer`, *optional*): The optimizer, by default that of the trainer.

        Returns:
            `torch.optim.lr_scheduler.LRScheduler`: The scheduler.
        """
        factor = self._learning_rate_factor
        if factor is None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, lambda step: factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler
