"""What a run tells of itself to people who did not see it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from peft_ravan.hub import FederationRecord, make_model_card
from peft_ravan.merging import get_merge_method, get_server_optimizer

from .history import HISTORY_FILE, write_history
from .participation import describe_participation
from .partition import describe_partition


if TYPE_CHECKING:
    from .arguments import FederatedArguments
    from .federated_trainer import FederatedTrainer


class SharingMixin:
    """Saves the adapter of a [`~transformers.Trainer`] with a card that tells how the federation trained it."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the adapter, its card, and the record of the rounds as JSON lines.

        Args:
            output_dir (`str`, *optional*): The folder, by default `args.output_dir`.
        """
        output_dir = self.args.output_dir if output_dir is None else output_dir
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.args.should_save:
            self._model_card().save(os.path.join(output_dir, "README.md"))
            if any("round" in record for record in self.state.log_history):
                write_history(os.path.join(output_dir, HISTORY_FILE), self.state.log_history)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Write the card of the adapter into `args.output_dir`. Of the arguments of [`~transformers.Trainer`] those that
        name a base model, tasks or arguments of data sets are not used: the adapter's configuration has the base model.

        Args:
            language (`str`, *optional*): The language of the model.
            license (`str`, *optional*): The license of the adapter.
            tags (`str` or `list[str]`, *optional*): Tags for the metadata.
            model_name (`str`, *optional*): The title.
            dataset_tags (`str` or `list[str]`, *optional*): The data sets on the Hub that it was trained on.
        """
        if self.is_world_process_zero():
            card = self._model_card(
                language=language, license=license, tags=tags, model_name=model_name, datasets=dataset_tags
            )
            card.save(os.path.join(self.args.output_dir, "README.md"))

    def _model_card(self, **card_data) -> ModelCard:
        model = self.accelerator.unwrap_model(self.model)
        return make_model_card(
            model.active_peft_config,
            federation_record(self),
            auto_class=type(model.get_base_model()).__name__,
            **card_data,
        )


def federation_record(trainer: FederatedTrainer) -> FederationRecord | None:
    """
    Sum up a federation for the adapter's card.

    Args:
        trainer ([`FederatedTrainer`]): The trainer.

    Returns:
        [`~peft_ravan.hub.FederationRecord`]: The facts and the rounds, or `None` if no round has been run.
    """
    history = [record for record in trainer.state.log_history if record.get("round")]
    if not history:
        return None
    args, method = trainer.args, get_merge_method(trainer.merge_method)
    given = isinstance(trainer.train_dataset, Mapping)
    steps = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    batch_size = args.train_batch_size * args.gradient_accumulation_steps
    skipped = sum(not record["clients"] for record in history)
    # with `eval_on_start` alone, round 0 has an evaluation and no clients
    opening = [r for r in trainer.state.log_history if r.get("round") == 0 and "clients" in r]
    uploaded = sum(record["upload_bytes"] for record in [*opening, *history])
    facts = {
        "Clients": len(trainer.clients),
        "Clients per round": describe_participation(args, len(trainer.clients)),
        "Data of the clients": "given by client" if given else describe_partition(args),
        "Rounds": f"{len(history)}, {skipped} of them skipped" if skipped else len(history),
        "Local training": f"{steps} of {batch_size} examples, {_optimizer(trainer)}",
        "Learning rate": f"{_learning_rates(trainer)}, {args.lr_scheduler_type.value} over the rounds",
        "Merge method": f"[{method.pretty_name}]({method.reference})",
        "Merge options": {**method.options, **(args.merge_options or {})} or "none",
        **_server_optimizer(args),
        **_client_budgets(trainer),
        **_privacy(trainer, history),
        **_common_bases(opening),
        "Uploaded": f"{uploaded / 1e6:.2f} MB by all clients",
        **({} if _is_secret(trainer) else {"Seed": args.federated_seed}),
    }
    rounds = [*opening, *history]
    if trainer.privacy is not None:  # losses of clients are not protected
        rounds = [{key: value for key, value in record.items() if key != "train_loss"} for record in rounds]
    return FederationRecord(len(trainer.clients), facts, rounds)


def _server_optimizer(args: FederatedArguments) -> dict[str, str]:
    if args.server_optimizer is None:
        return {}
    optimizer = get_server_optimizer(args.server_optimizer)
    options = {**optimizer.options, **(args.server_optimizer_options or {})}
    return {"Server optimizer": f"[{optimizer.pretty_name}]({optimizer.reference}), {options}"}


def _client_budgets(trainer: FederatedTrainer) -> dict[str, str]:
    if trainer.client_budgets is None:
        return {}
    args, shares = trainer.args, trainer.client_budgets.values()
    mean = sum(shares) / len(shares)
    spent = "at every target" if args.head_allocation == "layer" else "over all targets"
    return {
        "Heads a client trains": f"{min(shares):.0%} to {max(shares):.0%} (mean {mean:.0%}), by {args.head_selection}, {spent}"
    }


def _is_secret(trainer: FederatedTrainer) -> bool:
    """Whether the guarantee needs that nobody can work out who took part."""
    return trainer.privacy is not None and trainer.privacy.privacy.secret_sampling


def _privacy(trainer: FederatedTrainer, history: list[dict[str, Any]]) -> dict[str, str]:
    if trainer.privacy is None:
        return {}
    privacy, noisy = trainer.privacy.privacy, trainer.privacy.round
    counted = "takes part in secret" if _is_secret(trainer) else "takes part in every round"
    seed = "the operating system" if privacy.noise_seed is None else "a seed, which must be secret"
    return {
        "Differential privacy": f"ε = {trainer.privacy.epsilon(history):.3g} at δ = {privacy.delta:g}, for the data of one "
        f"client being replaced, if it {counted}",
        "Clipping and noise": f"norm {privacy.clip_norm:g} of a whole upload, noise multiplier "
        f"{noisy.noise_multiplier:.4g} from {seed}, uniform weights",
    }


def _common_bases(opening: list[dict[str, Any]]) -> dict[str, str]:
    if not opening:
        return {}
    [record] = opening
    up, down = (f"{record[name] / 1e6:.2f} MB" for name in ("upload_bytes", "download_bytes"))
    return {
        "Bases": f"from gradients of {len(record['clients'])} clients, in a round 0 with {up} of uploads and {down} of downloads"
    }


def _optimizer(trainer: FederatedTrainer) -> str:
    chosen = trainer.optimizer_cls_and_kwargs
    return trainer.args.optim.value if chosen is None else chosen[0].__name__


def _learning_rates(trainer: FederatedTrainer) -> str:
    _, kwargs = trainer.optimizer_cls_and_kwargs or (None, {})
    default = kwargs.get("lr", trainer.args.learning_rate)
    groups = [group for group in kwargs.get("params", []) if isinstance(group, dict)]
    rates = [group.get("lr", default) for group in groups] or [default]
    return " and ".join(f"{rate:g}" for rate in rates) + (" by parameter group" if len(rates) > 1 else "")
