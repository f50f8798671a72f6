"""The local training of one client, by the trainer that runs the federation."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerControl, set_seed
from transformers.trainer_utils import has_length

from peft_ravan.merging import ClientUpdate, UpdateError, get_merge_method, plain_update
from peft_ravan.merging.entries import is_finite

from .callbacks import LocalCallbackHandler
from .client_budgets import choose_heads
from .client_runners import ClientResult, DataParallelRunner, one_process
from .clients import local_arguments
from .faults import TimeoutCallback
from .local_objective import SCAFFOLD_PREFIX, ControlVariates, GradientCorrection, control_change
from .partition import ClientParts
from .personal import ClientStore, split_state
from .preparation import given_clients
from .resuming import Run
from .rounds import Round, derive_seed, serialized_bytes


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


def _of_scaffold(kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefixed = {name: tensor for name, tensor in kept.items() if name.startswith(SCAFFOLD_PREFIX)}
    return {name.removeprefix(SCAFFOLD_PREFIX): tensor for name, tensor in prefixed.items()}


class LocalTrainingMixin:
    """
    Lets a [`~transformers.Trainer`] train as one of its clients: with the client's data and seed, and the learning rate
    of the round.
    """

    _learning_rate_factor: float | None = None  # set while a federation runs
    _gradient_correction: GradientCorrection | None = None  # set while a client trains

    def _client_round(self, run: Run, number: int, client: str, control: ControlVariates | None) -> ClientResult:
        """Load the adapter that a client starts from, train it, and read what the client uploads."""
        timeout = self._timeout()
        kept = self._store.load(client, before=number) if self._keeps_state else {}
        own = {name: kept.get(name, tensor) for name, tensor in run.personal_start.items()}
        run.adapter.load({**run.global_state, **own})
        old_control, own_control, change = _of_scaffold(kept), {}, None
        self._gradient_correction = None
        if self.args.proximal_mu or control is not None:
            server_control = None if control is None else control.server
            self._gradient_correction = GradientCorrection(
                self.model, self.args.proximal_mu, server_control, old_control
            )
        with torch.enable_grad():  # the merge that asks for updates needs no gradients
            train_loss, learning_rate = self._train_client(client, number, timeout)
        heads = run.adapter.trained_heads()
        own, shared = split_state(run.adapter.read(), run.personal_patterns)
        update = ClientUpdate(shared, self._num_examples(client), client, heads)
        update = self._before_upload(update, number, timeout)
        if control is not None:
            own_control = self._gradient_correction.new_client_control()
            change = control_change(old_control, own_control)
        kept = {**own, **{f"{SCAFFOLD_PREFIX}{name}": tensor for name, tensor in own_control.items()}}
        finite = all(map(is_finite, [*kept.values(), *update.state.values()]))  # else the merge refuses the update
        if finite and self._keeps_state and self._is_keeper:
            keep_from = number - 1 if run.oldest_checkpoint is None else run.oldest_checkpoint
            self._store.save(client, number, kept, keep_from)
        return ClientResult(client, update, train_loss, learning_rate, change, finite)

    def _receive(self, this_round: Round, control: ControlVariates | None, result: ClientResult) -> None:
        """Record what a client has uploaded, as the server."""
        if result.learning_rate is not None:
            this_round.learning_rate = result.learning_rate
        if not result.is_finite:
            return
        if control is not None:
            control.add(result.control_change)
            this_round.upload_bytes += serialized_bytes(result.control_change)
            this_round.download_bytes += serialized_bytes(control.server)
        counted = self.args.update_limits.counted(result.update.num_examples)
        update = replace(result.update, num_examples=counted)
        this_round.add(update, result.train_loss, count_heads=self.client_budgets is not None)

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
        if self._gradient_correction is not None:
            optimizer.register_step_pre_hook(self._gradient_correction)
        return optimizer

    def _train_client(self, client: str, round_number: int, timeout: TimeoutCallback) -> tuple[float, float]:
        """Train the model as it is on the data of a client. Returns the mean training loss and the learning rate."""
        with self._as_client(client, round_number, timeout):
            try:
                if self.client_budgets is not None:
                    with one_process():  # all processes that train a client choose the same
                        choose_heads(self, client, round_number)
                output = super().train()
                return output.training_loss, self.lr_scheduler.get_last_lr()[0]
            except Exception as error:
                if hasattr(error, "add_note"):  # Python 3.11 and later
                    error.add_note(f"This happened in round {round_number}, while client {client!r} trained.")
                raise

    @contextlib.contextmanager
    def _as_client(self, client: str, round_number: int | str, timeout: TimeoutCallback) -> Iterator[None]:
        """Make this trainer that of one client: its data, its seed, and nothing that belongs to the federation."""
        train_dataset = self.clients[client]  # which may have to be prepared, and not be fit for it
        own = [name for name in self.client_attributes if hasattr(self, name)]
        federation = {name: getattr(self, name) for name in (*_OF_THE_FEDERATION, *own)}
        for name in own:
            setattr(self, name, copy.deepcopy(federation[name]))
        self.args = local_arguments(self.args, derive_seed(self.args.federated_seed, "client", round_number, client))
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
        together = self.args.world_size if isinstance(self._runner, DataParallelRunner) else 1
        return self.args.max_steps * self.args.gradient_accumulation_steps * self.args.train_batch_size * together

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
