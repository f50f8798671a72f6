"""
Round 0: the clients make the common bases of an adapter with `init_bases="gradient_svd"`, before anything is trained.

Some clients warm up the task head, since a head with random weights gives gradients that say little. With the mean of
their heads, each uploads a sketch of its mean gradient; the bases come from the mean of the sketches. Both means are
plain weighted ones: a server that adds up securely would do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict
from torch import nn

from peft_ravan.merging import ClientUpdate, UpdateLimits, merge
from peft_ravan.tuner.gradient_bases import (
    awaits_gradient,
    make_sketches,
    set_bases_from_sketches,
    sketch_gradients,
    sketch_state,
    sketches_from_state,
)
from peft_ravan.tuner.state import CORE_NAME, SCALING_NAME, is_basis, is_core

from .client_runners import ClientResult, one_process
from .clients import frozen_for_now
from .faults import RoundFailedError, TimeoutCallback, updates_of
from .participation import Participation
from .rounds import Round
from .seeds import derive_seed
from .serialized import serialized_bytes


if TYPE_CHECKING:
    from .resuming import Run


# What a client does while the trainer is that of the client: what it uploads, and its mean loss.
BasesWork = Callable[[str, TimeoutCallback], tuple[dict[str, torch.Tensor], float]]


def sample_bases_clients(
    sizes: Mapping[str, int], participation: Participation, bases_clients: int | None
) -> list[str]:
    """
    Draw the clients of round 0.

    Args:
        sizes (`Mapping[str, int]`): The names of all clients, and how many examples each has.
        participation ([`Participation`]): Who takes part in other rounds.
        bases_clients (`int`, *optional*): How many take part. By default as many as in other rounds.

    Returns:
        `list[str]`: The names of the clients, drawn with the weights of a round but from a seed of their own.
    """
    of_bases = replace(
        participation,
        clients_per_round=bases_clients or participation.clients_per_round,
        seed=derive_seed(participation.seed, "bases"),
    )
    return of_bases.sample(sizes, 0)


class RoundZeroMixin:
    """Lets a federation make its common bases from the clients' gradients."""

    def _open_run(self, run: Run, trial: Any) -> None:
        """
        What comes before the first round, and is not repeated when a run goes on after one: one record, if there is
        anything.
        """
        if run.round:
            return
        if run.oldest_checkpoint is None:  # else the run goes on from its start, which is saved
            self._save_start(run, trial)
        record = self._make_bases(run) if awaits_gradient(self.model, run.adapter.adapter_name) else {}
        if self.args.eval_on_start:
            record.update(self._evaluate_quietly(None))
        if record:
            self.log({"round": 0, **record})

    def _make_bases(self, run: Run) -> dict[str, Any]:
        """Run round 0. Neither the bases nor the global state has changed if it fails."""
        start_time = time.perf_counter()
        adapter_name = run.adapter.adapter_name
        rank = self.args.bases_rank
        no_gradient = sketch_state(
            make_sketches(self.model, adapter_name, rank)
        )  # raises for an adapter that was trained
        this_round = Round(
            0, sample_bases_clients(self._client_sizes(), self.args.participation, self.args.bases_clients)
        )
        # not that of the first round, which is 0 if the schedule starts with a warm-up
        self._learning_rate_factor = 1.0
        head = {name: tensor for name, tensor in run.global_state.items() if not is_core(name)}
        if head and self.args.bases_warmup_steps:
            head = self._mean_upload(this_round, head, head, partial(self._warm_up_head, run))
        # who has not managed to warm up is not asked again
        this_round.clients = [client for client in this_round.clients if client not in this_round.failures]
        run.adapter.load({**run.global_state, **run.personal_start, **head})
        state = self._mean_upload(this_round, no_gradient, head, self._sketch_gradient)
        sketches = sketches_from_state(self.model, state, adapter_name, rank)
        set_bases_from_sketches(self.model, sketches, adapter_name)
        self._runner.share(tensor for name, tensor in self.model.named_buffers() if ".ravan_" in name)
        run.global_state = {**run.global_state, **head}
        this_round.download_bytes += _bases_bytes(self.model, adapter_name) * len(self.clients)
        return {**this_round.record(), "round_seconds": time.perf_counter() - start_time}

    def _mean_upload(
        self, this_round: Round, like: dict[str, torch.Tensor], sent: dict[str, torch.Tensor], work: BasesWork
    ) -> dict[str, torch.Tensor]:
        """The mean of what the clients make of what is sent to them; `like` has its names and shapes."""
        if sent:
            this_round.download_bytes += serialized_bytes(sent) * len(this_round.clients)
        receive = partial(self._receive, this_round, None)
        updates = updates_of(this_round, self._runner.run(this_round.clients, partial(self._upload, work)), receive)
        result = self._merge_updates(
            this_round,
            updates,
            lambda updates: merge(like, updates, "fedavg", on_bad_update="drop", limits=self._limits_of_round_zero()),
        )
        needed = min(self.args.min_successful_clients, len(this_round.clients))
        if len(this_round.num_examples) < max(1, needed):
            raise RoundFailedError(
                f"Round 0, which makes the bases: fewer than {needed} clients (`min_successful_clients`) succeeded. "
                f"{this_round.failed()} Let more clients take part (`bases_clients`), or make the bases before with "
                "`initialize_bases_from_gradient`."
            ) from this_round.first_error
        return result.state

    def _limits_of_round_zero(self) -> UpdateLimits:
        limits = self.args.update_limits
        # a number is of changes of the adapter, and means nothing for a gradient; a multiple of the median does
        return limits if limits.needs_all_updates else replace(limits, max_update_norm=None)

    def _upload(self, work: BasesWork, client: str) -> ClientResult:
        timeout = self._timeout()
        seed = derive_seed(self.args.federated_seed, "client", 0, client)
        with torch.enable_grad(), self._as_client(client, seed, timeout):
            state, loss = work(client, timeout)
            learning_rate = None if self.lr_scheduler is None else self.lr_scheduler.get_last_lr()[0]
        update = self._before_upload(ClientUpdate(state, self._num_examples(client), client), 0, timeout)
        return ClientResult(client, update, loss, learning_rate)

    def _warm_up_head(self, run: Run, client: str, timeout: TimeoutCallback) -> tuple[dict[str, torch.Tensor], float]:
        head = {name for name in run.global_state if not is_core(name)}
        run.load_global()
        self.args.max_steps = self.args.bases_warmup_steps  # of the client's arguments, which are a copy
        with frozen_for_now(self.model, (f".{CORE_NAME}.", f".{SCALING_NAME}.")):
            loss = self._train_locally().training_loss
        return {name: tensor for name, tensor in run.adapter.read().items() if name in head}, loss

    def _sketch_gradient(self, client: str, timeout: TimeoutCallback) -> tuple[dict[str, torch.Tensor], float]:
        losses = []

        def batches() -> Iterator[Mapping[str, Any]]:
            for inputs in islice(self.get_train_dataloader(), self.args.bases_batches):
                timeout.check()
                yield self._prepare_inputs(inputs)

        def compute_loss(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
            # accelerate puts autocast into the model's forward only when the first client trains
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                loss = self.compute_loss(model, inputs)
            losses.append(loss.item())
            return loss

        with one_process():  # also where several train a client together
            sketches = sketch_gradients(
                self.model, batches(), self.model.active_adapter, compute_loss, self.args.bases_rank
            )
        return sketch_state(sketches), sum(losses) / len(losses)


def _bases_bytes(model: nn.Module, adapter_name: str) -> int:
    checkpoint = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return serialized_bytes({name: tensor.contiguous() for name, tensor in checkpoint.items() if is_basis(name)})
