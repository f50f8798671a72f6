"""The local training of one client, by the trainer that runs the federation."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerControl, set_seed
from transformers.trainer_utils import TrainOutput, has_length

from peft_ravan.merging import ClientUpdate, UpdateError, get_merge_method, plain_update
from peft_ravan.merging.entries import is_finite

from .client_budgets import choose_heads
from .client_runners import ClientResult, DataParallelRunner, one_process
from .clients import frozen_for_now, local_arguments
from .data.partition import ClientParts
from .data.preparation import PreparedClients, given_clients
from .exchange import HeadChoice
from .faults import NothingTrainedError, TimeoutCallback
from .local_objective import SCAFFOLD_PREFIX, ControlVariates, GradientCorrection, control_change, of_scaffold
from .personal import ClientStore, of_parts, split_state
from .records.callbacks import LocalCallbackHandler
from .resuming import Run
from .rounds import Round
from .seeds import derive_seed
from .serialized import serialized_bytes


# what a client's local training replaces, and what is put back after it
_RESTORED_ATTRIBUTES = (
    "args",
    "callback_handler",
    "control",
    "model_init",
    "optimizer_cls_and_kwargs",
    "state",
    "train_dataset",
)


def _check_finite(kept: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in kept.items():
        if not is_finite(tensor):
            raise ValueError(
                f"{name!r}, which stays with the client, has entries that are NaN or infinite. Its training diverged: lower "
                "its learning rate, or leave the client out."
            )


class LocalTrainingMixin:
    """
    Lets a [`~transformers.Trainer`] train as one of its clients: with the client's data and seed, and the learning rate
    of the round.
    """

    _learning_rate_factor: float | None = None  # set while a federation runs
    # set while a client trains, if it has a term of its own
    _objective: Callable[..., GradientCorrection] | None = None
    _gradient_correction: GradientCorrection | None = None  # what became of it

    def _client_round(self, run: Run, round_number: int, client: str, control: ControlVariates | None) -> ClientResult:
        """Load the adapter that a client starts from, train it, and read what the client uploads."""
        timeout = self._timeout()
        kept = self._store.load(client, before=round_number) if self._keeps_state else {}
        own = {name: kept.get(name, tensor) for name, tensor in run.personal_start.items()}
        run.adapter.load({**run.global_state, **own})
        frozen = get_merge_method(self.merge_method).frozen_in(round_number)
        resting_control, old_control = of_parts(of_scaffold(kept), frozen)
        own_control, control_bytes = {}, 0
        with (
            torch.enable_grad(),  # the merge itself needs no gradients
            frozen_for_now(self.model, frozen),
            self._with_objective(control, old_control),
        ):
            train_loss, learning_rate = self._train_client(client, round_number, timeout)
            if control is not None:
                new_control = self._gradient_correction.new_client_control()
                control_bytes = serialized_bytes(control_change(old_control, new_control))
                own_control = {**resting_control, **new_control}
        heads = run.adapter.trained_heads()
        own, shared = split_state(run.adapter.read(), run.personal_patterns)
        _, trained = of_parts(shared, frozen)
        update = ClientUpdate(trained, self._num_examples(client), client, heads)
        update = self._before_upload(update, round_number, timeout)
        if self._keeps_state and self._is_keeper:
            kept = {**own, **{f"{SCAFFOLD_PREFIX}{name}": tensor for name, tensor in own_control.items()}}
            _check_finite(kept)
            self._store.set_aside(client, round_number, kept)
        return ClientResult(client, update, train_loss, learning_rate, control_bytes)

    @contextlib.contextmanager
    def _with_objective(
        self, control: ControlVariates | None, client_control: Mapping[str, torch.Tensor]
    ) -> Iterator[None]:
        """What FedProx and SCAFFOLD add to the gradients of the client that trains."""
        if self.args.proximal_mu or control is not None:
            self._objective = partial(
                GradientCorrection,
                proximal_mu=self.args.proximal_mu,
                server_control=None if control is None else control.server,
                client_control=client_control,
            )
        try:
            yield
        finally:
            self._objective = self._gradient_correction = None

    def _receive(self, this_round: Round, control: ControlVariates | None, result: ClientResult) -> None:
        """Record what a client has uploaded, as the server."""
        if result.learning_rate is not None:
            this_round.learning_rate = result.learning_rate
        if control is not None:
            this_round.upload_bytes += result.control_bytes
            this_round.download_bytes += serialized_bytes(control.server)
        counted = self.args.update_limits.counted(result.update.num_examples)
        update = replace(result.update, num_examples=counted)
        this_round.add(update, result.train_loss, count_heads=self.client_budgets is not None)

    def _move_control(
        self, this_round: Round, control: ControlVariates, merged: Iterable[str]
    ) -> dict[str, torch.Tensor]:
        """
        SCAFFOLD's c after a round, as the server remembers it. A merge that takes one update after the other refuses some
        of them later than they come, so what was uploaded besides is read again, of those that it has merged.
        """
        # the main process is the one whose c counts, and who alone knows that all is written
        for client in merged if self._runner.is_main else ():
            old = self._store.load(client, before=this_round.round_number)
            new = self._store.load_aside(client, this_round.round_number)
            control.add(control_change(of_scaffold(old), of_scaffold(new)))
        return control.server_state()

    def _settle(self, run: Run, this_round: Round, counts: bool) -> None:
        """Let clients have what they have set aside, if this attempt at the round counts and their updates were merged."""
        if not (self._keeps_state and this_round.clients):
            return
        if self._runner.is_main:
            keep_from = this_round.round_number - 1 if run.oldest_checkpoint is None else run.oldest_checkpoint
            for client in this_round.clients:
                if counts and client in this_round.num_examples:
                    run.client_states[client] = self._store.commit(client, this_round.round_number, keep_from)
                else:
                    self._store.discard(client, this_round.round_number)
        self._runner.wait()  # others may train these clients next

    @property
    def _is_keeper(self) -> bool:
        """Whether this process writes down what the client that it trains keeps: one does, of those that train it."""
        return not isinstance(self._runner, DataParallelRunner) or self._runner.is_main

    def _timeout(self) -> TimeoutCallback:
        return TimeoutCallback(self.args.client_timeout, self._runner.agree_on_time)

    def _before_upload(self, update: ClientUpdate, round_number: int, timeout: TimeoutCallback) -> ClientUpdate:
        client = update.client_id
        if self.client_fault is not None:
            given = self.client_fault(client, round_number, update)
            update = update if given is None else given
        timeout.check()
        # read here, where it costs no more than this client
        update = plain_update(update, f"client {client!r}")
        if update.client_id != client:
            raise UpdateError(f"client {client!r}: its update has the name of {update.client_id!r}.")
        return update

    @property
    def _keeps_state(self) -> bool:
        return self.args.scaffold or bool(self._personal_patterns)

    @property
    def _personal_patterns(self) -> tuple[str, ...]:
        parts = get_merge_method(self.merge_method).personal_parts
        return (*(self.args.local_parameters or ()), *map(re.escape, parts))

    @property
    def _store(self) -> ClientStore:
        return ClientStore(self.args.output_dir)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """
        Set up the optimizer, with what FedProx and SCAFFOLD add to the gradients of a client.

        Returns:
            `torch.optim.Optimizer`: The optimizer.
        """
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._objective is not None:
            self._gradient_correction = self._objective(self.model)  # with the heads that the client has chosen
            optimizer.register_step_pre_hook(self._gradient_correction)
        return optimizer

    def _train_client(self, client: str, round_number: int, timeout: TimeoutCallback) -> tuple[float, float]:
        """Train the model as it is on the data of a client. Returns the mean training loss and the learning rate."""
        seed = self.args.federated_seed
        with self._as_client(client, derive_seed(seed, "client", round_number, client), timeout):
            try:
                if self.client_budgets is not None:
                    with one_process():  # all processes that train a client choose the same
                        choose_heads(self, self._head_choice(client, derive_seed(seed, "heads", round_number, client)))
                output = self._train_locally()
                return output.training_loss, self.lr_scheduler.get_last_lr()[0]
            except Exception as error:
                if hasattr(error, "add_note"):  # Python 3.11 and later
                    error.add_note(f"This happened in round {round_number}, while client {client!r} trained.")
                raise

    def _head_choice(self, client: str, seed: int) -> HeadChoice:
        return HeadChoice(self.client_budgets[client], self.args.head_selection, self.args.head_allocation, seed)

    def _train_locally(self) -> TrainOutput:
        """The training of the trainer below, which may say nothing if there was nothing to train on."""
        dataset, needed = self.train_dataset, self._full_batch
        if self.args.dataloader_drop_last and has_length(dataset) and len(dataset) < needed:
            raise NothingTrainedError(
                f"It has {len(dataset)} examples, and `dataloader_drop_last=True` leaves out batches of fewer than {needed}. "
                "Use smaller batches, or leave the client out."
            )
        output = super().train()
        if self.state.global_step == 0:
            raise NothingTrainedError("It has done no step: its data gave no batch. Leave the client out.")
        return output

    @property
    def _full_batch(self) -> int:
        """The examples of a batch that is full."""
        together = self.args.world_size if isinstance(self._runner, DataParallelRunner) else 1
        return self.args.train_batch_size * together

    def _check_batches(self) -> None:
        """
        Raises:
            ValueError: if no client has enough examples for one batch, where smaller ones are left out.
        """
        most = max(self._client_sizes().values())
        # preparation may make more examples of few
        if (
            self.args.dataloader_drop_last
            and most < self._full_batch
            and not isinstance(self.clients, PreparedClients)
        ):
            raise ValueError(
                f"Clients would train nothing: none has more than {most} examples, and `dataloader_drop_last=True` leaves out "
                f"batches of fewer than {self._full_batch}. Use smaller batches, fewer clients, or "
                "`dataloader_drop_last=False`."
            )

    @contextlib.contextmanager
    def _as_client(self, client: str, seed: int, timeout: TimeoutCallback) -> Iterator[None]:
        """Make this trainer that of one client: its data, its seed, and nothing that belongs to the federation."""
        train_dataset = self.clients[client]  # which may have to be prepared, and not be fit for it
        own = [name for name in self.client_attributes if hasattr(self, name)]
        federation = {name: getattr(self, name) for name in (*_RESTORED_ATTRIBUTES, *own)}
        for name in own:
            setattr(self, name, copy.deepcopy(federation[name]))
        self.args = local_arguments(self.args, seed)
        self.callback_handler = LocalCallbackHandler.of(self.callback_handler, timeout)
        self.control = TrainerControl()
        self.model_init = None
        self.train_dataset = train_dataset
        if self.optimizer_cls_and_kwargs is not None:
            # Trainer takes parameter groups out of the dict, which would leave the next client without them
            optimizer_cls, kwargs = self.optimizer_cls_and_kwargs
            self.optimizer_cls_and_kwargs = (optimizer_cls, dict(kwargs))
        self.optimizer = self.lr_scheduler = None
        if isinstance(self._runner, DataParallelRunner):
            # a wrapper for several processes knows the parameters that the last client has trained
            self.model_wrapped = self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        self._log_sink = {}
        set_seed(self.args.seed)
        try:
            yield
        finally:
            for name, value in federation.items():
                setattr(self, name, value)
            self.optimizer = self.lr_scheduler = self._log_sink = None
            self.is_in_train = True  # of the federation, which the local training has set to False

    def _client_sizes(self) -> dict[str, int]:
        return {client: self._num_examples(client) for client in self.clients}

    def _num_examples(self, client: str) -> int:
        clients = given_clients(self.clients)
        if isinstance(clients, ClientParts):
            return clients.num_examples(client)
        dataset = clients[client]
        if has_length(dataset):
            return len(dataset)
        return self.args.max_steps * self.args.gradient_accumulation_steps * self._full_batch

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """
        The operations of a training step, for the state of the trainer. That of a client is thrown away after its
        training, and to count the parameters of a model in each step takes as long as a small step.

        Args:
            inputs (`dict[str, Any]`): The batch.

        Returns:
            `int`: The number of operations; 0 while a client trains.
        """
        return super().floating_point_ops(inputs) if self._learning_rate_factor is None else 0

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
