"""The model card of an adapter."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig


TEMPLATE_PATH = Path(__file__).parent / "model_card_template.md"
VERSIONED_PACKAGES = ("peft-ravan", "peft", "transformers", "accelerate", "datasets", "torch")
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclass(frozen=True)
class FederationRecord:
    """
    How an adapter was trained by a federation, for its card.

    Args:
        num_clients (`int`):
            The number of clients.
        facts (`Mapping[str, Any]`):
            What to tell of the federation, by the names that people shall read, in this order.
        history (`Sequence[Mapping[str, Any]]`):
            The records of the rounds, as in `trainer.state.log_history`.
    """

    num_clients: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()


def make_model_card(
    config: PeftConfig,
    federation: FederationRecord | None = None,
    auto_class: str | None = None,
    **card_data,
) -> ModelCard:
    """
    Make the model card of an adapter from `model_card_template.md`.

    Args:
        config ([`~peft.PeftConfig`]):
            The configuration of the adapter.
        federation ([`FederationRecord`], *optional*):
            How it was trained, if by a federation.
        auto_class (`str`, *optional*):
            The class of transformers that loads the base model. By default chosen by the task of the configuration.
        **card_data:
            Metadata for the Hub, as [`~huggingface_hub.ModelCardData`] takes it: `license`, `language`, `tags`,
            `datasets`, `model_name`, ...

    Returns:
        [`~huggingface_hub.ModelCard`]: The card.
    """
    method = config.peft_type.value
    base_model = config.base_model_name_or_path or None
    tags = [method.lower(), "peft-ravan", *(["federated-learning"] if federation else []), *_listed(card_data, "tags")]
    model_name = card_data.pop("model_name", None) or f"{method.capitalize()} adapter"
    data = ModelCardData(
        base_model=base_model, library_name="peft", tags=list(dict.fromkeys(tags)), **_without_none(card_data)
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE_PATH),
        model_name=model_name,
        method=method,
        base_model=base_model,
        datasets=card_data.get("datasets"),
        auto_class=auto_class or AUTO_CLASSES.get(config.task_type, "AutoModel"),
        num_clients=federation.num_clients if federation else None,
        federation=dict(federation.facts) if federation else None,
        rounds=_rounds_table(federation.history) if federation else None,
        adapter_config=json.dumps(_without_none(config.to_dict()), indent=2, default=_json_default, sort_keys=True),
        versions={name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES},
    )


def _listed(card_data: dict[str, Any], key: str) -> list[str]:
    value = card_data.pop(key, None) or []
    return [value] if isinstance(value, str) else list(value)


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _json_default(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _rounds_table(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    # an evaluation before the first round is no round; one in which clients made the bases is
    records = [record for record in history if record.get("round") or ("round" in record and "clients" in record)]
    if not records:
        return None
    metrics = [
        key
        for key in dict.fromkeys(key for record in records for key in record)
        if key.startswith("eval_")
        and not key.endswith(("_runtime", "_per_second", "_preparation_time"))
        # of the many figures of the clients, those that the mean over all examples hides
        and (not key.startswith("eval_clients_") or key.startswith("eval_clients_worst_decile_"))
    ]
    # a private federation does not tell the losses of its clients; a round in which nobody took part has none
    losses = ["train_loss"] if any("train_loss" in record for record in records) else []
    metrics = [*losses, *metrics]
    rows = [
        [
            record["round"],
            len(record["clients"]),
            *(f"{record[key]:.4f}" if key in record else "" for key in metrics),
            f"{record['upload_bytes'] / 1e6:.3f}",
        ]
        for record in records
    ]
    return {"columns": ["round", "clients", *metrics, "upload (MB)"], "rows": rows}
