"""Runs of a benchmark that are saved one by one, so that it can be stopped and continued."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar


Cell = TypeVar("Cell")


def run_cells(cells: Iterable[Cell], run: Callable[[Cell], Any], path: Path) -> list[dict]:
    """
    Run the cells that are not in the file yet, and append each to it when it has finished.

    Args:
        cells (`Iterable[Cell]`): The cells, which are dataclasses.
        run (`Callable[[Cell], Any]`): Runs a cell and returns its accuracy, or accuracies.
        path (`Path`): The file, with one JSON object per line.

    Returns:
        `list[dict]`: The fields of all finished cells, each with its `accuracy`.
    """
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for cell in cells:
        if any(all(record[field.name] == getattr(cell, field.name) for field in fields(cell)) for record in records):
            continue
        records.append({**asdict(cell), "accuracy": run(cell)})
        with path.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
        print(json.dumps(records[-1]), flush=True)
    return records
