"""Runs of a benchmark that are saved one by one, so that it can be stopped and continued."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar


Cell = TypeVar("Cell")


def run_cells(
    cells: Iterable[Cell],
    run: Callable[[Cell], Any],
    path: Path,
    measured: str = "accuracy",
    show: Callable[[dict], str] = json.dumps,
) -> list[dict]:
    """
    Run the cells that are not in the file yet, and append each to it when it has finished.

    Args:
        cells (`Iterable[Cell]`): The cells, which are dataclasses.
        run (`Callable[[Cell], Any]`): Runs a cell and returns what was measured.
        path (`Path`): The file, with one JSON object per line.
        measured (`str`, *optional*, defaults to `"accuracy"`): The name of what was measured.
        show (`Callable[[dict], str]`, *optional*): What is printed of a cell that has finished. By default all.

    Returns:
        `list[dict]`: The fields of all finished cells, each with what was measured.
    """
    records = finished_cells(path)
    for cell in cells:
        if any(is_of(record, cell) for record in records):
            continue
        records.append({**asdict(cell), measured: run(cell)})
        with path.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
        print(show(records[-1]), flush=True)
    return records


def finished_cells(path: Path) -> list[dict]:
    """
    Args:
        path (`Path`): The file of [`run_cells`], which need not exist.

    Returns:
        `list[dict]`: What it has returned so far.
    """
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def is_of(record: Mapping[str, Any], cell: Cell) -> bool:
    """
    Args:
        record (`dict`): A finished cell.
        cell (`Cell`): A cell.

    Returns:
        `bool`: Whether it is the same one.
    """
    return all(record[field.name] == getattr(cell, field.name) for field in fields(cell))
