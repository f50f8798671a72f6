"""Saving a federation after a round, and going on from there."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints
from transformers.utils import logging

from peft_ravan.gradient_bases import awaits_gradient
from peft_ravan.reading import bases_fingerprint, different_bases
from peft_ravan.state import is_basis

from .checkpoints import (
    CheckpointError,
    FederationState,
    atomic_folder,
    checkpoint_round,
    find_checkpoints,
    read_federation_state,
    restore_random_state,
    write_federation_state,
)
from .clients import LiveAdapter
from .personal import split_state


logger = logging.get_logger(__name__)

# what a run may change when it goes on, but not without a word
_COMPARED_ARGUMENTS = (
    "federated_seed", "clients_per_round", "privacy", "merge_options", "server_optimizer", "server_optimizer_options", "learning_rate",
    "lr_scheduler_type", "num_rounds", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps",
)  # fmt: skip
_WITHOUT_ROOM = "Checkpoints of earlier rounds are complete: make room, and resume with `resume_from_checkpoint=True`"


@dataclass
class Run:
    """
    A run of a federation between two rounds.

    Args:
        adapter ([`LiveAdapter`]): The adapter in the model.
        global_state (`dict[str, torch.Tensor]`): What was merged last.
        server_state (`dict[str, torch.Tensor]`): What server optimizers and merge methods remember.
        round (`int`): The last round that was run.
        personal_patterns (`tuple[str, ...]`): Which tensors stay with their clients, as regular expressions.
        personal_start (`dict[str, torch.Tensor]`): What a client that takes part for the first time has of them.
        oldest_checkpoint (`int`, *optional*): The first round after which the run can be taken up again.
    """

    adapter: LiveAdapter
    global_state: dict[str, torch.Tensor] = field(default_factory=dict)
    server_state: dict[str, torch.Tensor] = field(default_factory=dict)
    round: int = 0
    personal_patterns: tuple[str, ...] = ()
    personal_start: dict[str, torch.Tensor] = field(default_factory=dict)
    oldest_checkpoint: int | None = None

    def take_state(self) -> None:
        """Make the adapter that is in the model the global one."""
        self.personal_start, self.global_state = split_state(self.adapter.read(), self.personal_patterns)

    def state(self) -> dict[str, torch.Tensor]:
        """The global adapter. Personal parts are those that clients start with."""
        return {**self.global_state, **self.personal_start}

    def load_global(self) -> None:
        """Put the global adapter into the model."""
        self.adapter.load(self.state())


class CheckpointingMixin:
    """Lets a federation be saved after a round, and go on from there as if it had not been interrupted."""

    def _save_start(self, run: Run, trial: Any) -> None:
        """So that a run that is killed before its first round is saved can be resumed as any other."""
        if self.args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH) and not self.args.save_only_model:
            self._write_checkpoint(run, trial)
            run.oldest_checkpoint = run.round

    def _save_round(self, run: Run, trial: Any) -> None:
        run_dir = self._get_output_dir(trial=trial)
        best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if self.state.best_global_step == run.round or os.path.exists(best):
            self.state.best_model_checkpoint = best
        folder = self._write_checkpoint(run, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(folder)
        if self._runner.is_main:
            rotate_checkpoints(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        self._runner.wait()
        run.oldest_checkpoint = checkpoint_round(find_checkpoints(run_dir)[-1])
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _write_checkpoint(self, run: Run, trial: Any) -> str:
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{run.round}")
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=self._stateful_callbacks()).stateful_callbacks
        if self._runner.is_main:
            with atomic_folder(folder, _WITHOUT_ROOM) as aside:
                self.save_model(str(aside), _internal_call=True)
                self.state.save_to_json(str(aside / TRAINER_STATE_NAME))
                if not self.args.save_only_model:
                    write_federation_state(aside, FederationState(run.round, self._facts(run), run.server_state))
        self._runner.wait()
        return folder

    def _stateful_callbacks(self) -> list[ExportableState]:
        callbacks = [*self.callback_handler.callbacks, self.control]
        return [callback for callback in callbacks if isinstance(callback, ExportableState)]

    def _facts(self, run: Run) -> dict[str, Any]:
        """What tells this federation from others, as JSON keeps it."""
        config, arguments = self.model.active_peft_config.to_dict(), self.args.to_dict()
        facts = {
            "adapter": {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in sorted(run.state().items())},
            "peft_type": config["peft_type"],
            "clients": len(self.clients),
            "clients_digest": _digest(self._client_sizes()),
            "merge_method": self.merge_method,
            "arguments": {name: arguments[name] for name in _COMPARED_ARGUMENTS},
        }
        return json.loads(json.dumps(facts, default=str))

    def _load_checkpoint(self, resume_from_checkpoint: str | bool, run: Run, trial: Any) -> None:
        folder, saved = self._choose_checkpoint(resume_from_checkpoint, trial)
        self._check_facts(folder, saved, run)
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        bases = self._check_bases(folder, tensors)
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        for own, saved_basis in bases:
            own.copy_(saved_basis)
        run.adapter.load_checkpoint(tensors)
        run.take_state()
        run.server_state, run.round = dict(saved.server_state), saved.round
        # clients keep what any checkpoint may need, not only this one
        run.oldest_checkpoint = min(map(checkpoint_round, find_checkpoints(folder.parent)), default=saved.round)
        self.state = state
        restore_random_state(folder)
        logger.info(f"Going on after round {saved.round}, from {folder}.")

    def _choose_checkpoint(self, resume_from_checkpoint: str | bool, trial: Any) -> tuple[Path, FederationState]:
        if not isinstance(resume_from_checkpoint, bool):
            return Path(resume_from_checkpoint), read_federation_state(resume_from_checkpoint)
        run_dir = self._get_output_dir(trial=trial)
        for folder in find_checkpoints(run_dir):
            try:
                return folder, read_federation_state(folder)
            except CheckpointError as error:
                logger.warning(f"{error} The one before is used.")
        raise ValueError(
            f"There is no complete checkpoint in {run_dir} to resume from. Start without `resume_from_checkpoint`."
        )

    def _check_facts(self, folder: Path, saved: FederationState, run: Run) -> None:
        facts = self._facts(run)
        for name in ("peft_type", "adapter", "clients", "clients_digest"):
            if saved.facts.get(name) != facts[name]:
                found = (
                    ""
                    if name in ("adapter", "clients_digest")
                    else f" ({saved.facts.get(name)!r}, not {facts[name]!r})"
                )
                what = {"adapter": "shapes of the adapter", "clients_digest": "names or sizes of clients"}.get(
                    name, name
                )
                raise CheckpointError(
                    f"{folder} belongs to another federation: other {what}{found}. Give the model, the data and the "
                    "arguments that it was written with, or start without `resume_from_checkpoint`."
                )
        now = {"merge_method": facts["merge_method"], **facts["arguments"]}
        then = {"merge_method": saved.facts.get("merge_method"), **saved.facts.get("arguments", {})}
        changed = [
            f"{name} ({then.get(name)!r}, now {value!r})" for name, value in now.items() if then.get(name) != value
        ]
        if changed:
            logger.warning(
                f"The run goes on with other arguments than {folder} was written with, and will differ from one that was "
                f"not interrupted: {', '.join(changed)}."
            )

    def _check_bases(self, folder: Path, tensors: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The bases of the model and those that have to be written into them: none, unless they come from a round 0."""
        frozen = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        bases = {name: tensor for name, tensor in frozen.items() if is_basis(name)}
        if awaits_gradient(self.model, self.model.active_adapter):
            return _saved_bases(folder, tensors, bases)
        now, then = bases_fingerprint(frozen), bases_fingerprint(tensors)
        different = [name for name in different_bases(now, then) if name in now and name in then]
        if different:
            raise CheckpointError(
                f"{folder} belongs to another federation: the bases in {different[0]!r} are not those of the model. Use "
                "the `init_bases` and the `projection_seed` that it was written with."
            )
        return []

    def _restore_callbacks(self) -> None:
        # Trainer does so on request; here a run that goes on is to be the run that was interrupted
        before, self.args.restore_callback_states_from_checkpoint = (
            self.args.restore_callback_states_from_checkpoint, True,
        )  # fmt: skip
        try:
            self._load_callback_state()
        finally:
            self.args.restore_callback_states_from_checkpoint = before


def _saved_bases(
    folder: Path, tensors: dict[str, torch.Tensor], bases: dict[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    for name in bases:
        if name not in tensors:
            raise CheckpointError(
                f"{folder} cannot be resumed: the bases in {name!r} were made from gradients, and are not in the "
                "checkpoint. Start without `resume_from_checkpoint`, with `save_projection=True`."
            )
    return [(tensor, tensors[name]) for name, tensor in bases.items()]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
