"""The record of a federation: its facts and its rounds, in files, and what of them can be shown to everybody."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


FACTS_FILE = "federation.json"
HISTORY_FILE = "rounds.jsonl"
PLOT_FILE = "rounds.png"
VERSIONED_PACKAGES = ("peft-ravan", "peft", "transformers", "accelerate", "datasets", "torch")
# of a run with differential privacy: what is measured on the clients' data without noise, or tells who took part
_NOT_PROTECTED = ("clients", "failed_clients", "num_examples", "heads_trained", "train_loss", "attempts")


@dataclass(frozen=True)
class FederationRecord:
    """
    How an adapter was trained by a federation, for its card.

    Args:
        num_clients (`int`, *optional*):
            The number of clients, if it is known.
        facts (`Mapping[str, Any]`):
            What to tell of the federation, by the names that people shall read, in this order.
        history (`Sequence[Mapping[str, Any]]`):
            The records of the rounds, as [`public_history`] gives them.
        versions (`Mapping[str, str]`):
            The versions of the packages that it was trained with, if they are known.
        best_round (`int`, *optional*):
            The round whose adapter was taken, if it is not the last one.
    """

    num_clients: int | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    best_round: int | None = None

    @property
    def adapter_round(self) -> int | None:
        """The round that the adapter comes from."""
        return self.best_round or max((record["round"] for record in self.history), default=None)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> FederationRecord | None:
        """
        Args:
            folder (`str` or `os.PathLike`): The folder of an adapter.

        Returns:
            [`FederationRecord`]: What its `federation.json` and `rounds.jsonl` say, or `None` if it has neither.
        """
        folder = Path(folder)
        facts, history = {"num_clients": None}, []
        if not any((folder / name).is_file() for name in (FACTS_FILE, HISTORY_FILE)):
            return None
        if (folder / FACTS_FILE).is_file():
            facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        if (folder / HISTORY_FILE).is_file():
            history = public_history(read_history(folder))
        return cls(history=history, **facts)

    def save_facts(self, folder: str | os.PathLike) -> None:
        """
        Write what is not in the history into `federation.json`.

        Args:
            folder (`str` or `os.PathLike`): The folder of the adapter.
        """
        facts = {name: getattr(self, name) for name in ("num_clients", "facts", "versions", "best_round")}
        replace_file(Path(folder, FACTS_FILE), json.dumps(_json_safe(facts), indent=2, default=str) + "\n")


def current_versions() -> dict[str, str]:
    """
    Returns:
        `dict[str, str]`: The versions of the packages that matter to training, as they are installed now.
    """
    return {name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES}


def public_history(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    What can be shown to everybody of the records of a run.

    Clients are numbered in the order in which they appear, and the reasons of their failures are left out: these are
    messages of errors, which may say anything. Of a run with differential privacy, what the noise does not protect is left
    out, too: who took part or failed, the numbers of examples and heads, training losses, and figures of evaluations of
    the clients on their own data. How many uploads were merged in a round stays, as `num_clients`.

    Args:
        records (`Iterable[Mapping[str, Any]]`): Records, as in `trainer.state.log_history`, or those that this has given.

    Returns:
        `list[dict[str, Any]]`: The records of rounds.
    """
    records = [record for record in records if "round" in record]
    names: dict[str, str] = {}
    for record in records:
        for client in (*record.get("clients", ()), *(f["client"] for f in record.get("failed_clients", ()))):
            names.setdefault(client, f"client {len(names) + 1}")
    is_private = any("epsilon" in record for record in records)
    return [_public_record(record, names, is_private) for record in records]


def _public_record(record: Mapping[str, Any], names: Mapping[str, str], is_private: bool) -> dict[str, Any]:
    public = {**record}
    if "clients" in record:
        public["clients"] = [names[client] for client in record["clients"]]
    if "failed_clients" in record:
        public["failed_clients"] = [{"client": names[failure["client"]]} for failure in record["failed_clients"]]
    if not is_private:
        return public
    if "clients" in record:
        public["num_clients"] = len(record["clients"])
    return {
        name: value
        for name, value in public.items()
        if name not in _NOT_PROTECTED and not name.startswith("eval_clients_")
    }


def history_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """
    Args:
        records (`Iterable[Mapping[str, Any]]`): Records, as in `trainer.state.log_history`.

    Returns:
        `str`: A line of JSON for each. NaN and infinity, which JSON does not have, are `null`.
    """
    return "".join(json.dumps(_json_safe(record), allow_nan=False, default=str) + "\n" for record in records)


def _json_safe(value: Any) -> Any:
    if hasattr(value, "tolist"):  # of numpy or torch
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _json_safe(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_history(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """
    Write the records of a run as JSON lines. There is never half a file: it is written aside and then renamed.

    Args:
        path (`str` or `os.PathLike`): The file. One that exists is replaced.
        records (`Iterable[Mapping[str, Any]]`): The records.
    """
    replace_file(Path(path), history_lines(records))


def replace_file(path: Path, text: str) -> None:
    """
    Write a file aside and put it in its place, so that there is never half of it. A link is replaced, and not followed.

    Args:
        path (`Path`): The file.
        text (`str`): What is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.incomplete")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def read_history(path: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Read the records of a run. A last line that a killed run has not written to its end is left out.

    Args:
        path (`str` or `os.PathLike`): The file, or the folder of a run or an adapter that has it.

    Returns:
        `list[dict[str, Any]]`: The records, as in `trainer.state.log_history`.
    """
    path = Path(path)
    text = (path / HISTORY_FILE if path.is_dir() else path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
