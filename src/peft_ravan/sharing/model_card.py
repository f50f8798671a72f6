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
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .adapter_files import CARD_FILE, TWIN_FOLDER
from .federation_record import HISTORY_FILE, PLOT_FILE, FederationRecord, as_number, current_versions
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
# kept from the existing card when a card is made again
_LISTED_METADATA = ("language", "datasets", "tags")
_KEPT_METADATA = ("license", "license_name", "license_link", *_LISTED_METADATA, "pipeline_tag")


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
            The folder with the adapter's files. The card then contains their SHA-256, the plot of the rounds and, if
            there is a LoRA twin, how to load it.
        repo_id (`str`, *optional*):
            The repository on the Hub to load the adapter from.
        **card_data:
            Metadata for the Hub, as accepted by [`~huggingface_hub.ModelCardData`]: `license`, `language`, `tags`,
            `datasets`, `model_name`, ... In addition `base_model`, by default the one in the configuration, and for
            the evaluation results `task`, `dataset_name` and `dataset_config`. The metadata include the results if the
            task and one dataset are known, and the adapter was evaluated after the round that it comes from.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card. It does not contain the path of a base model in a local folder.

    Raises:
        ValueError: if `base_model` or one of `datasets` is not a name on the Hub.
    """
    auto_class = auto_class or _auto_class(config)
    facts = _CardFacts(config, federation, auto_class, Path(folder) if folder is not None else None, card_data)
    rounds = _rounds_table(federation.history) if federation else None
    return ModelCard.from_template(
        facts.metadata(),
        template_path=str(TEMPLATE_PATH),
        title=plain_text(facts.title),
        method=facts.method,
        base_model=facts.base_model,
        has_local_base_model=facts.has_local_base_model,
        datasets=facts.datasets,
        auto_class=auto_class,
        num_labels=facts.num_labels(),
        adapter_path=repo_id or "path/to/this/adapter",
        twin_folder=TWIN_FOLDER if facts.has(f"{TWIN_FOLDER}/{CONFIG_NAME}") else None,
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
        adapter_config=_config_json(config, facts.base_model),
        checksums=facts.checksums(),
        versions={table_cell(name): table_cell(value) for name, value in federation.versions.items()}
        if federation
        else None,
        versions_now=current_versions(),
    )


def card_of_folder(
    folder: str | os.PathLike, *, repo_id: str | None = None, auto_class: str | None = None, **card_data
) -> ModelCard:
    """
    Make the model card of a saved adapter from its files: the configuration, the weights, `federation.json`, `rounds.jsonl`
    and `rounds.png` of a federation, and the LoRA twin in `lora/`. License, language, datasets and tags are kept from
    an existing card.

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
        **{**kept_metadata(folder / CARD_FILE), **_without_none(card_data)},
    )


def name_on_hub(name: str | None) -> str | None:
    """
    Args:
        name (`str`, *optional*): The name or path of a model, as in a configuration.

    Returns:
        `str`: The name, if it is a name on the Hub and not a folder on this machine.
    """
    if not isinstance(name, str) or not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


@dataclass(frozen=True)
class _CardFacts:
    """The facts that the parts of a card share."""

    config: PeftConfig
    federation: FederationRecord | None
    auto_class: str
    folder: Path | None
    card_data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for key in ("base_model", "datasets"):
            for name in _listed(self.card_data.get(key)):
                if name_on_hub(name) is None:
                    raise ValueError(
                        f"`{key}` goes into the metadata of the card and must be a name on the Hub, got {name!r}. Leave "
                        "it out if it is not there; the card then says that it is not known."
                    )

    @property
    def method(self) -> str:
        return self.config.peft_type.value

    @property
    def title(self) -> str:
        return self.card_data.get("model_name") or f"{self.method.capitalize()} adapter"

    @property
    def base_model(self) -> str | None:
        return self.card_data.get("base_model") or name_on_hub(self.config.base_model_name_or_path)

    @property
    def has_local_base_model(self) -> bool:
        return self.base_model is None and bool(self.config.base_model_name_or_path)

    @property
    def datasets(self) -> list[str]:
        return _listed(self.card_data.get("datasets"))

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
        own = ("model_name", "base_model", "datasets", "tags", "task", "dataset_name", "dataset_config")
        tags = [self.method.lower(), "peft-ravan", *(["federated-learning"] if self.federation else [])]
        given = {key: value for key, value in _without_none(self.card_data).items() if key not in own}
        results = self.eval_results()
        return ModelCardData(
            **{
                "base_model": self.base_model,
                "library_name": "peft",
                "pipeline_tag": self.task,
                "tags": list(dict.fromkeys([*tags, *_listed(self.card_data.get("tags"))])),
                "datasets": self.datasets or None,
                # only needed with results, which contain the name of the model
                **({"model_name": self.title, "eval_results": results} if results else {}),
                **given,
            }
        )

    def eval_results(self) -> list[EvalResult]:
        """The evaluation of this adapter in the form that the Hub accepts, which needs a task and one dataset."""
        evaluated_round, metrics = self.evaluation
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
                metric_type=name,
                metric_value=value,
            )
            for name, value in metrics.items()
        ]

    def checksums(self) -> dict[str, str]:
        """The SHA-256 of the weights."""
        names = (SAFETENSORS_WEIGHTS_NAME, f"{TWIN_FOLDER}/{SAFETENSORS_WEIGHTS_NAME}")
        return {name: _sha256(self.folder / name) for name in names if self.has(name)}

    def num_labels(self) -> int | None:
        """The number of labels of the saved task head. Without it, the base model would get a head of another size."""
        if self.config.task_type not in ("SEQ_CLS", "TOKEN_CLS") or not self.has(SAFETENSORS_WEIGHTS_NAME):
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


def kept_metadata(path: Path) -> dict[str, Any]:
    """
    Args:
        path (`Path`): A card. It need not exist.

    Returns:
        `dict[str, Any]`: The metadata that a new card keeps.

    Raises:
        ValueError: if its metadata cannot be read, or the Hub would not accept them. The message names the file.
    """
    if not path.is_file():
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    # parsing YAML can fail in many ways, and so can the class that takes the metadata as arguments
    except Exception as error:
        raise ValueError(f"The metadata of {path} cannot be read: {error}") from error
    kept = {key: data[key] for key in _KEPT_METADATA if data.get(key) is not None}
    for key, value in kept.items():
        is_list = (
            key in _LISTED_METADATA and isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        )
        if not isinstance(value, str) and not is_list:
            what = "a text or a list of texts" if key in _LISTED_METADATA else "a text"
            raise ValueError(f"The metadata of {path}: `{key}` must be {what}, got {value!r:.80}.")
    # PEFT's cards repeat the base model in the tags, even if it is a local path
    kept["tags"] = [tag for tag in _listed(kept.get("tags")) if not tag.startswith("base_model:")]
    kept["datasets"] = [name for name in _listed(kept.get("datasets")) if name_on_hub(name)]
    return kept


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _config_json(config: PeftConfig, base_model: str | None) -> str:
    values = {**config.to_dict(), "base_model_name_or_path": base_model}
    return json.dumps(_without_none(values), indent=2, default=_json_default, sort_keys=True)


def _json_default(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


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
