"""The model card of an adapter."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .adapter_files import CARD_FILE, RAVAN_FOLDER, TWIN_FOLDER, ravan_folder
from .card_metadata import check_card_data, kept_metadata, listed, name_on_hub, without_none
from .card_usage import Usage
from .federation_record import (
    HISTORY_FILE,
    PLOT_FILE,
    FederationRecord,
    as_number,
    current_versions,
    read_object,
)
from .labels import read_label_names
from .markdown_text import plain_text, table_cell
from .reading import checked_folder, read_config


TEMPLATE_PATH = Path(__file__).parent / "model_card_template.md"
# for each task type of a configuration: the class of transformers that loads the base model, and the task on the Hub
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
TASKS = {
    "SEQ_CLS": "text-classification",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "CAUSAL_LM": "text-generation",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_CLASSIFIERS = re.compile(r"For(Image|Audio)Classification$")  # PEFT has no task type for these
# saved task heads with one row per label
_HEADS_WITH_LABELS = re.compile(r"\.(classifier|score|classifier\.out_proj)\.weight$")
# evaluation figures that describe the machine
_TIMED = ("_runtime", "_per_second", "_preparation_time")
_TOKENIZER, _IMAGE_PROCESSOR = "tokenizer_config.json", "preprocessor_config.json"
# what users say about the data of the evaluation
_ABOUT_RESULTS = ("dataset_name", "dataset_config", "dataset_split")


def make_model_card(
    config: PeftConfig,
    federation: FederationRecord | None = None,
    auto_class: str | None = None,
    *,
    folder: str | os.PathLike | None = None,
    repo_id: str | None = None,
    **card_data,
) -> ModelCard:
    """
    Make the model card of an adapter from `model_card_template.md`.

    Args:
        config ([`~peft.PeftConfig`]):
            The configuration of the adapter.
        federation ([`~peft_ravan.sharing.federation_record.FederationRecord`], *optional*):
            How it was trained, if it was trained by a federation.
        auto_class (`str`, *optional*):
            The class of transformers that loads the base model. By default it is chosen by the task type of the
            configuration.
        folder (`str` or `os.PathLike`, *optional*):
            The folder with the adapter's files. The card then contains their SHA-256, the plot of the rounds, the names
            of the labels, and how to load the other form of the adapter, Ravan in `ravan/` or its LoRA twin in `lora/`.
        repo_id (`str`, *optional*):
            The repository on the Hub to load the adapter from.
        **card_data:
            Metadata for the Hub, as accepted by [`~huggingface_hub.ModelCardData`]: `license`, `language`, `tags`,
            `datasets`, `model_name` (by default that of the repository), ... In addition `base_model`, by default the
            one in the configuration, `ravan_adapter`, the repository of the Ravan adapter that a LoRA adapter is the twin
            of, and for the evaluation results `task`, `dataset_name`, `dataset_config` and `dataset_split`. The metadata
            include the results if the task and one dataset are known, and the adapter was evaluated after the round that
            it comes from.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card. It does not contain the path of a base model in a local folder.

    Raises:
        ValueError: if `base_model`, `ravan_adapter` or one of `datasets` is not a name on the Hub, or if the Hub does
            not know the license.
    """
    check_card_data(card_data)
    auto_class = auto_class or _auto_class(config)
    folder = Path(folder) if folder is not None else None
    facts = _CardFacts(config, federation, auto_class, folder, repo_id, card_data)
    usage = facts.usage()
    rounds = _rounds_table(federation.history) if federation else None
    return ModelCard.from_template(
        facts.metadata(),
        template_path=str(TEMPLATE_PATH),
        title=plain_text(facts.title),
        method=facts.method,
        is_ravan=facts.is_ravan,
        rank_of_twin=config.r if facts.ravan_folder else None,
        # it takes language models, and only LoRA's tensors
        loads_in_vllm=config.task_type == "CAUSAL_LM" and not getattr(config, "modules_to_save", None),
        base_model=facts.base_model,
        repo_id=repo_id,
        has_local_base_model=facts.has_local_base_model,
        datasets=facts.datasets,
        ravan_folder=facts.ravan_folder,
        twin_folder=facts.twin_folder,
        ravan_adapter=card_data.get("ravan_adapter"),
        code=usage.code(ravan=facts.is_ravan),
        code_of_ravan=usage.code(ravan=True, subfolder=facts.ravan_folder, is_trainable=True),
        code_of_twin=usage.code(subfolder=facts.twin_folder),
        is_federated=federation is not None,
        num_clients=federation.num_clients if federation else None,
        is_merged=federation is not None and "Merged from" in federation.facts,
        facts={table_cell(name): table_cell(value) for name, value in federation.facts.items()} if federation else {},
        adapter_round=federation.adapter_round if federation else None,
        evaluated_round=facts.evaluation[0],
        metrics={table_cell(name): f"{value:.4f}" for name, value in facts.evaluation[1].items()},
        has_results_in_metadata=bool(facts.eval_results()),
        rounds=rounds,
        plot=PLOT_FILE if facts.has(PLOT_FILE) else None,
        history_file=HISTORY_FILE if facts.has(HISTORY_FILE) else None,
        adapter_config=_config_json(facts.trained_config, facts.base_model),
        weights=facts.weights(),
        versions={table_cell(name): table_cell(value) for name, value in federation.versions.items()}
        if federation
        else None,
        versions_now=current_versions(),
    )


def card_of_folder(
    folder: str | os.PathLike, *, repo_id: str | None = None, auto_class: str | None = None, **card_data
) -> ModelCard:
    """
    Make the model card of a saved adapter from its files: the configuration, the weights, the names of the labels,
    `federation.json`, `rounds.jsonl` and `rounds.png` of a federation, and the other form of the adapter in `ravan/` or
    `lora/`. License, language, datasets and tags are kept from an existing card.

    Args:
        folder (`str` or `os.PathLike`): The folder of the adapter. Nothing is written to it.
        repo_id (`str`, *optional*): As for [`make_model_card`].
        auto_class (`str`, *optional*): As for [`make_model_card`].
        **card_data: As for [`make_model_card`].

    Returns:
        [`~huggingface_hub.ModelCard`]: The card.

    Raises:
        FileNotFoundError: if a file of the adapter is missing from the folder.
        ValueError: as for [`make_model_card`], or if a file is invalid. The message names it.
    """
    folder = checked_folder(folder)
    return make_model_card(
        read_config(folder),
        FederationRecord.from_folder(folder),
        auto_class,
        folder=folder,
        repo_id=repo_id,
        **{**kept_metadata(folder / CARD_FILE), **without_none(card_data)},
    )


@dataclass(frozen=True)
class _CardFacts:
    """The facts that the parts of a card share."""

    config: PeftConfig
    federation: FederationRecord | None
    auto_class: str
    folder: Path | None
    repo_id: str | None
    card_data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return self.config.peft_type.value

    @property
    def is_ravan(self) -> bool:
        return self.method == "RAVAN"

    @property
    def ravan_folder(self) -> str | None:
        """Where the Ravan adapter is, if the folder itself has its LoRA twin."""
        has_both = self.folder is not None and ravan_folder(self.folder) != self.folder
        return RAVAN_FOLDER if has_both else None

    @property
    def twin_folder(self) -> str | None:
        """Where the LoRA twin is, if the folder itself has the Ravan adapter."""
        return TWIN_FOLDER if self.is_ravan and self.has(f"{TWIN_FOLDER}/{CONFIG_NAME}") else None

    @cached_property
    def trained_config(self) -> PeftConfig:
        """The configuration of the adapter that was trained, rather than of its twin."""
        return read_config(self.folder / RAVAN_FOLDER) if self.ravan_folder else self.config

    @property
    def title(self) -> str:
        of_repo = self.repo_id.split("/")[-1] if self.repo_id else None
        method = self.trained_config.peft_type.value
        return self.card_data.get("model_name") or of_repo or f"{method.capitalize()} adapter"

    @property
    def base_model(self) -> str | None:
        return self.card_data.get("base_model") or name_on_hub(self.config.base_model_name_or_path)

    @property
    def has_local_base_model(self) -> bool:
        return self.base_model is None and bool(self.config.base_model_name_or_path)

    @property
    def datasets(self) -> list[str]:
        return listed(self.card_data.get("datasets"))

    @property
    def task(self) -> str | None:
        given = self.card_data.get("task") or self.card_data.get("pipeline_tag")
        of_class = _CLASSIFIERS.search(self.auto_class)
        by_default = TASKS.get(self.config.task_type) or (of_class and f"{of_class[1].lower()}-classification")
        return given or by_default or None

    @cached_property
    def evaluation(self) -> tuple[int | None, dict[str, float]]:
        """The last evaluation up to the round that the adapter comes from: its round, and its metrics."""
        for record in reversed(self.federation.history if self.federation else ()):
            values = {name.removeprefix("eval_"): as_number(record[name]) for name in _metrics_of([record])}
            values = {name: value for name, value in values.items() if value is not None}
            if values and record["round"] <= self.federation.adapter_round:
                return record["round"], values
        return None, {}

    def has(self, name: str) -> bool:
        return self.folder is not None and (self.folder / name).is_file()

    def metadata(self) -> ModelCardData:
        own = ("model_name", "base_model", "datasets", "tags", "task", *_ABOUT_RESULTS)
        methods = [config.peft_type.value.lower() for config in (self.trained_config, self.config)]
        tags = [*methods, "peft-ravan", *(["federated-learning"] if self.federation else [])]
        given = {key: value for key, value in without_none(self.card_data).items() if key not in own}
        results = self.eval_results()
        return ModelCardData(
            **{
                "base_model": self.base_model,
                "library_name": "peft",
                "pipeline_tag": self.task,
                "tags": list(dict.fromkeys([*tags, *listed(self.card_data.get("tags"))])),
                "datasets": self.datasets or None,
                # only needed with results, which contain the name of the model
                **({"model_name": self.title, "eval_results": results} if results else {}),
                **given,
            }
        )

    def eval_results(self) -> list[EvalResult]:
        """The evaluation of this adapter in the form that the Hub accepts, which needs a task and one dataset."""
        evaluated_round, metrics = self.evaluation
        # the Hub compares models by their metrics, and a loss depends on how it was computed
        metrics = {name: value for name, value in metrics.items() if name != "loss" and not name.endswith("_loss")}
        if self.task is None or len(self.datasets) != 1 or not metrics:
            return []
        if evaluated_round != self.federation.adapter_round:
            return []
        [dataset] = self.datasets
        return [
            EvalResult(
                task_type=self.task,
                dataset_type=dataset,
                dataset_name=self.card_data.get("dataset_name") or dataset,
                dataset_config=self.card_data.get("dataset_config"),
                dataset_split=self.card_data.get("dataset_split"),
                metric_type=name,
                metric_value=value,
            )
            for name, value in metrics.items()
        ]

    def weights(self) -> dict[str, tuple[str, str]]:
        """For each form of the adapter, the size and the SHA-256 of its weights."""
        names = [SAFETENSORS_WEIGHTS_NAME]
        names += [f"{part}/{SAFETENSORS_WEIGHTS_NAME}" for part in (self.ravan_folder, self.twin_folder) if part]
        paths = {name: self.folder / name for name in names if self.has(name)}
        return {name: (f"{path.stat().st_size / 1e6:,.2f} MB", _sha256(path)) for name, path in paths.items()}

    def usage(self) -> Usage:
        labels = read_label_names(self.folder) if self.folder is not None else None
        return Usage(
            adapter=self.repo_id or "path/to/this/adapter",
            is_on_hub=self.repo_id is not None,
            auto_class=self.auto_class,
            task=self.task,
            base_model=self.base_model,
            labels=labels,
            num_labels=self.num_labels(),
            processing=self._processing(),
            image_mode=self._image_mode(),
        )

    def _processing(self) -> str | None:
        """Where the tokenizer or the image processor is: beside the adapter, or otherwise with the base model."""
        is_beside = self.has(_IMAGE_PROCESSOR if self.task == "image-classification" else _TOKENIZER)
        return (self.repo_id or "path/to/this/adapter") if is_beside else self.base_model

    def _image_mode(self) -> str:
        """Image processors do not convert images to the channels that they normalize."""
        if self.task != "image-classification" or not self.has(_IMAGE_PROCESSOR):
            return "RGB"
        mean = read_object(self.folder / _IMAGE_PROCESSOR).get("image_mean")
        return "L" if isinstance(mean, list) and len(mean) == 1 else "RGB"

    def num_labels(self) -> int | None:
        """The number of labels of the saved task head. Without it, the base model would get a head of another size."""
        is_classifier = self.config.task_type in ("SEQ_CLS", "TOKEN_CLS") or _CLASSIFIERS.search(self.auto_class)
        if not is_classifier or not self.has(SAFETENSORS_WEIGHTS_NAME):
            return None
        path = self.folder / SAFETENSORS_WEIGHTS_NAME
        try:
            with safe_open(path, framework="pt") as file:
                heads = [name for name in file.keys() if _HEADS_WITH_LABELS.search(name)]  # noqa: SIM118, not a dict
                shapes = [file.get_slice(name).get_shape() for name in heads]
        except SafetensorError as error:
            raise ValueError(f"{path} is cut off, or is not a safetensors file: {error}") from error
        return shapes[0][0] if len(shapes) == 1 and shapes[0] else None


def _auto_class(config: PeftConfig) -> str:
    mapping = config.auto_mapping or {}
    if config.task_type in AUTO_CLASSES or not str(mapping.get("parent_library")).startswith("transformers."):
        return AUTO_CLASSES.get(config.task_type, "AutoModel")
    name = mapping.get("base_model_class")
    # the name becomes part of code that people copy
    return name if isinstance(name, str) and name.isidentifier() else "AutoModel"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _config_json(config: PeftConfig, base_model: str | None) -> str:
    values = {**config.to_dict(), "base_model_name_or_path": base_model}
    return json.dumps(without_none(values), indent=2, default=_json_default, sort_keys=True)


def _json_default(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)


def _metrics_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        key
        for key in dict.fromkeys(key for record in records for key in record)
        if key.startswith("eval_")
        and not key.endswith(_TIMED)
        # of the many figures of the clients, only those that the mean over all examples hides
        and (not key.startswith("eval_clients_") or key.startswith("eval_clients_worst_decile_"))
    ]


def _rounds_table(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    # an evaluation before the first round is not a round, but round 0, in which clients make the bases, is
    records = [record for record in history if record.get("round") or ("round" in record and "clients" in record)]
    if not records:
        return None
    measured = [*(["train_loss"] if any("train_loss" in r for r in records) else []), *_metrics_of(records)]
    rows = [
        [
            record["round"],
            len(record["clients"]) if "clients" in record else record.get("num_clients", ""),
            # a round without clients has no loss
            *("" if value is None else f"{value:.4f}" for value in (as_number(record.get(key)) for key in measured)),
            f"{record['upload_bytes'] / 1e6:.3f}" if "upload_bytes" in record else "",
        ]
        for record in records
    ]
    return {"columns": ["round", "clients", *map(table_cell, measured), "upload (MB)"], "rows": rows}
