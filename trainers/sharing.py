"""Saving an adapter with its card and the record of its federation, and uploading it to the Hub."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, ModelCard
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from peft_ravan.sharing.adapter_files import CARD_FILE
from peft_ravan.sharing.card_metadata import check_card_data
from peft_ravan.sharing.federation_record import HISTORY_FILE, PLOT_FILE, FederationRecord, write_history
from peft_ravan.sharing.hub import Destination, push_folder
from peft_ravan.sharing.labels import label_names, write_label_names
from peft_ravan.sharing.model_card import make_model_card
from peft_ravan.sharing.reading import adapter_folder
from peft_ravan.sharing.saved_card import card_is_left_to_caller

from .records.reporting import federation_record


logger = logging.get_logger(__name__)


class SharingMixin:
    """
    Saves the adapter of a [`~transformers.Trainer`] with a card that describes how the federation trained it, and
    uploads both together with the record of the rounds, as Ravan and as its LoRA twin.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the adapter, its card, the names of the labels of a classifier, and the record of the federation:
        `rounds.jsonl` has a line for each round, and `federation.json` has the summary of the card. They are saved next to the adapter. As in PEFT, that is a
        subfolder of the adapter's name, unless it is named `"default"`.

        Args:
            output_dir (`str`, *optional*): The folder, by default `args.output_dir`.
        """
        output_dir = self.args.output_dir if output_dir is None else output_dir
        with contextlib.nullcontext() if self._last_run is None else self._last_run.on_original_base():
            folder = self._adapter_folder(output_dir)
            with card_is_left_to_caller(folder):
                super().save_model(output_dir, _internal_call=_internal_call)
            if self.args.should_save:
                record = self._federation_record()
                if record is not None:
                    record.save_facts(folder)
                if any("round" in record for record in self.state.log_history):
                    write_history(folder / HISTORY_FILE, self.state.log_history)
                write_label_names(folder, label_names(getattr(self.model, "config", None)))
                self._model_card(folder).save(folder / CARD_FILE)

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
        dataset_split: str | None = None,
    ) -> None:
        """
        Write the card of the adapter into `args.output_dir`, next to the saved adapter.

        The metadata include the results of the last evaluation if exactly one data set is named and the task is known.
        The Hub does not accept other results.

        Args:
            language (`str`, *optional*): The language of the model.
            license (`str`, *optional*): The license of the adapter.
            tags (`str` or `list[str]`, *optional*): Tags for the metadata.
            model_name (`str`, *optional*): The title.
            finetuned_from (`str`, *optional*): The base model on the Hub, by default that of the configuration.
            tasks (`str` or `list[str]`, *optional*): The task on the Hub, by default that of the model.
            dataset_tags (`str` or `list[str]`, *optional*): The data sets on the Hub that it was trained on.
            dataset (`str` or `list[str]`, *optional*): The display name of the data set.
            dataset_args (`str` or `list[str]`, *optional*): The configuration of the data set.
            dataset_split (`str`, *optional*): The split that the adapter was evaluated on, by default the one that
                `eval_dataset` says it is.

        Raises:
            ValueError: if `finetuned_from` or one of `dataset_tags` is not a valid name on the Hub, or if the Hub does not
                know the license.
        """
        if self.is_world_process_zero():
            split = dataset_split or getattr(self.eval_dataset, "split", None)
            card_data = {
                "language": language,
                "license": license,
                "tags": tags,
                "model_name": model_name,
                "base_model": finetuned_from,
                "task": _only(tasks),
                "datasets": dataset_tags,
                "dataset_name": _only(dataset),
                "dataset_config": _only(dataset_args),
                "dataset_split": str(split) if split is not None else None,
            }
            self._card_data = {key: value for key, value in card_data.items() if value is not None}
            folder = self._adapter_folder(self.args.output_dir)
            self._model_card(folder, **self._card_data).save(folder / CARD_FILE)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        with_base_model: bool = False,
        **kwargs,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Upload the adapter, its card, the record of the rounds with a plot (if matplotlib is installed), and the tokenizer
        or processor to `args.hub_model_id`. A Ravan adapter is uploaded as its LoRA twin at the root, and as it is in the
        folder `ravan`, which `args.hub_lora_twin` and `args.hub_ravan_at_root` change. Everything is uploaded in one
        commit, with clients identified by number and without checkpoints. See [`~peft_ravan.push_to_hub`].

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): The message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait until the upload has finished.
            token (`str`, *optional*): The token, by default `args.hub_token`.
            revision (`str`, *optional*): The branch, by default `args.hub_revision`, otherwise `main`.
            private (`bool`, *optional*): Whether the repository is private if it is created. By default
                `args.hub_private_repo`.
            with_base_model (`bool`, *optional*, defaults to `False`): Whether to upload the base model, too, as for
                [`~peft_ravan.push_to_hub`].
            **kwargs: As for `create_model_card`.

        Returns:
            [`~huggingface_hub.CommitInfo`]: The commit, or a future of it with `blocking=False`. `None` in all
            processes but the main one.

        Raises:
            UploadError: if there is no connection, or if the upload was interrupted. It can be repeated.
            ValueError: as for `create_model_card`, or if the base model is to be uploaded and is no folder. Nothing is
                created in that case.
        """
        check_card_data(
            {
                "license": kwargs.get("license"),
                "base_model": kwargs.get("finetuned_from"),
                "datasets": kwargs.get("dataset_tags"),
            }
        )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        name = self.hub_model_id.split("/")[-1]
        tags = [*_listed(kwargs.pop("tags", None)), *(getattr(self.model, "model_tags", None) or [])]
        self.create_model_card(**{"model_name": name, **kwargs, "tags": list(dict.fromkeys(tags))})
        self._draw_public_history(self._adapter_folder(self.args.output_dir) / PLOT_FILE)
        self._finish_current_push()
        destination = self._destination(commit_message, blocking, token, private, revision)
        options = {"with_base_model": with_base_model, **self._card_data}
        return self._push_folder(self.args.output_dir, destination, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        current = self.push_in_progress
        is_busy = current is not None and not current.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, round {self.state.global_step}"
        job = self._push_folder(checkpoint_folder, self._destination(message, blocking=False))
        job.add_done_callback(_warn_of_failure)
        self.push_in_progress = PushInProgress([*(current.jobs if is_busy else []), job])

    def _destination(
        self,
        commit_message: str,
        blocking: bool,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
    ) -> Destination:
        return Destination(
            self.hub_model_id,
            commit_message,
            private=self.args.hub_private_repo if private is None else private,
            token=self.args.hub_token if token is None else token,
            revision=self.args.hub_revision if revision is None else revision,
            blocking=blocking,
        )

    def _push_folder(
        self, folder: str | os.PathLike, destination: Destination, with_base_model: bool = False, **card_data
    ) -> CommitInfo | Future[CommitInfo]:
        model = self.accelerator.unwrap_model(self.model)
        return push_folder(
            folder,
            destination,
            twin_of=model if self.args.hub_lora_twin else None,
            adapter_name=model.active_adapter,
            ravan_at_root=self.args.hub_ravan_at_root,
            with_base_model=with_base_model,
            auto_class=type(model.get_base_model()).__name__,
            **card_data,
        )

    def _federation_record(self) -> FederationRecord | None:
        # a run returns to its best round only at the end
        is_best = self.args.load_best_model_at_end and not self.is_in_train and self.state.best_model_checkpoint
        best_round = self.state.best_global_step if is_best else None
        return federation_record(self.federation, self.state.log_history, best_round)

    def _adapter_folder(self, folder: str | os.PathLike) -> Path:
        return adapter_folder(folder, self.model.active_adapter)

    def _model_card(self, folder: str | os.PathLike | None = None, **card_data) -> ModelCard:
        model = self.accelerator.unwrap_model(self.model)
        return make_model_card(
            model.active_peft_config,
            self._federation_record(),
            auto_class=type(model.get_base_model()).__name__,
            folder=folder,
            **card_data,
        )


def _warn_of_failure(job: Future) -> None:
    # nobody waits for a push in the background, so its errors would go unnoticed
    if not job.cancelled() and job.exception() is not None:
        logger.warning(f"A push to the Hub failed, and training goes on. {job.exception()}")


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _only(value: str | list[str] | None) -> str | None:
    values = _listed(value)
    return values[0] if len(values) == 1 else None
