"""The record of a federation: its facts and rounds, stored in files, and the part of them that can be made public."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


FACTS_FILE = "federation.json"
HISTORY_FILE = "rounds.jsonl"
PLOT_FILE = "rounds.png"
VERSIONED_PACKAGES = ("peft-ravan", "peft", "transformers", "accelerate", "datasets", "torch")
# limits for known entries that are read from files; other entries of a record, such as metrics, may be anything
_MAX_ROUND, _MAX_COUNT = 2**31, 2**63
# with differential privacy, these are measured on the clients' data without noise, or reveal who took part
_NOT_PROTECTED = (
    "clients", "failed_clients", "num_examples", "heads_trained", "train_loss", "attempts", "update_cosine"
)  # fmt: skip


@dataclass(frozen=True)
class FederationRecord:
    """
    How a federation trained an adapter, for its model card.

    Args:
        num_clients (`int`, *optional*):
            The number of clients, if known.
        facts (`Mapping[str, Any]`):
            Facts about the federation, by display name, in the order to show them.
        history (`Sequence[Mapping[str, Any]]`):
            The records of the rounds, as returned by [`public_history`].
        versions (`Mapping[str, str]`):
            The versions of the packages used for training, if known.
        best_round (`int`, *optional*):
            The round that the adapter was taken from, if it is not the last one.
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
            [`FederationRecord`]: The record from its `federation.json` and `rounds.jsonl`, or `None` if it has
            neither.

        Raises:
            ValueError: if one of the files is invalid. The message names it.
        """
        folder = Path(folder)
        facts, history = {"num_clients": None}, []
        if not any((folder / name).is_file() for name in (FACTS_FILE, HISTORY_FILE)):
            return None
        if (folder / FACTS_FILE).is_file():
            facts = _read_facts(folder / FACTS_FILE)
        if (folder / HISTORY_FILE).is_file():
            history = public_history(read_history(folder))
        return cls(history=history, **facts)

    def save_facts(self, folder: str | os.PathLike) -> None:
        """
        Write everything except the history into `federation.json`.

        Args:
            folder (`str` or `os.PathLike`): The folder of the adapter.
        """
        facts = {name: getattr(self, name) for name in ("num_clients", "facts", "versions", "best_round")}
        replace_file(Path(folder, FACTS_FILE), json.dumps(_json_safe(facts), indent=2, default=str) + "\n")


def current_versions() -> dict[str, str]:
    """
    Returns:
        `dict[str, str]`: The installed versions of the packages that matter for training.
    """
    return dict(_installed_versions())


@functools.cache  # to find them takes longer than a small client trains
def _installed_versions() -> tuple[tuple[str, str], ...]:
    return tuple((name, importlib.metadata.version(name)) for name in VERSIONED_PACKAGES)


def public_history(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    The part of a run's records that can be made public.

    Clients are numbered in the order in which they appear. The reasons for their failures are left out, because these
    are error messages, which may contain anything. For a run with differential privacy, whatever the noise does not
    protect is left out, too: who took part or failed, the numbers of examples and heads, training losses, the
    similarity of updates, and figures of the clients' evaluations on their own data. The number of uploads merged in a round is kept as `num_clients`.

    Args:
        records (`Iterable[Mapping[str, Any]]`): Records, as in `trainer.state.log_history`, or as returned by this
            function.

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
        `str`: One line of JSON for each. NaN and infinity, which JSON does not support, become `null`.
    """
    return "".join(json.dumps(_json_safe(record), allow_nan=False, default=str) + "\n" for record in records)


def _json_safe(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy or torch
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _json_safe(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_history(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """
    Write the records of a run as JSON lines. The file is written under another name and then renamed, so it is never
    incomplete.

    Args:
        path (`str` or `os.PathLike`): The file. An existing file is replaced.
        records (`Iterable[Mapping[str, Any]]`): The records.
    """
    replace_file(Path(path), history_lines(records))


def replace_file(path: Path, text: str) -> None:
    """
    Write a file under another name and then rename it, so that it is never incomplete. A link is replaced, not
    followed.

    Args:
        path (`Path`): The file.
        text (`str`): The new contents.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.incomplete")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def read_history(path: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Read the records of a run. If the run was killed while writing the last line, that line is skipped.

    Args:
        path (`str` or `os.PathLike`): The file, or the folder of a run or an adapter that contains it.

    Returns:
        `list[dict[str, Any]]`: The records, as in `trainer.state.log_history`.

    Raises:
        ValueError: if a line is not a record. The message names the file and the line.
    """
    path = Path(path)
    path = path / HISTORY_FILE if path.is_dir() else path
    text = _read_text(path)
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [_parse_record(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """
    Args:
        path (`Path`): A file.

    Returns:
        `dict[str, Any]`: The JSON object in it.

    Raises:
        ValueError: if there is no JSON object in it. The message names the file.
    """
    return _parse_object(str(path), _read_text(path))


def _parse_object(source: str, text: str) -> dict[str, Any]:
    """Parse a JSON object. Errors name its source."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} must be a JSON object, got {type(value).__name__}.")
    return value


def _read_facts(path: Path) -> dict[str, Any]:
    """
    The fields of a [`FederationRecord`] in the file. Unknown fields are ignored, since later versions may add some.
    """
    given = read_object(path)
    _check(str(path), "num_clients", given.get("num_clients"), "a number of clients or null", _is_count, None)
    _check(str(path), "best_round", given.get("best_round"), "the number of a round or null", _is_round, None)
    for name in ("facts", "versions"):
        _check(str(path), name, given.get(name, {}), "an object", lambda value: isinstance(value, dict))
    known = ("num_clients", "facts", "versions", "best_round")
    return {"num_clients": None, **{name: given[name] for name in known if name in given}}


def _parse_record(source: str, text: str) -> dict[str, Any]:
    record = _parse_object(source, text)
    for name, is_valid, what in (
        ("round", _is_round, "the number of a round"),
        ("clients", _are_names, "a list of names"),
        ("failed_clients", _are_failures, 'a list of objects with the name of a "client"'),
        ("num_clients", _is_count, "a number of clients"),
        ("num_examples", _is_count, "a number of examples"),
        ("upload_bytes", _is_count, "a number of bytes"),
        ("download_bytes", _is_count, "a number of bytes"),
    ):
        if "round" in record and name in record:
            _check(source, name, record[name], what, is_valid)
    return record


def _check(source: str, name: str, value: Any, what: str, is_valid: Callable[[Any], bool], *also: Any) -> None:
    if not is_valid(value) and not any(value is other for other in also):
        shown = repr(value)
        raise ValueError(
            f"{source}: `{name}` must be {what}, got {shown if len(shown) <= 80 else shown[:77] + '...'}."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_COUNT


def _is_round(value: Any) -> bool:
    return _is_count(value) and value < _MAX_ROUND


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_failures(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(f, dict) and isinstance(f.get("client"), str) for f in value)


def as_number(value: Any) -> float | None:
    """
    Args:
        value (`Any`): An entry of a record. It may come from a file.

    Returns:
        `float`: Its value, if it is a number that can be formatted with decimals.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
