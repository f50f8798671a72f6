"""Jobs that run in processes of their own, and write a line into rounds.jsonl at the end of each round."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


RUN_SECONDS = 1800
POLL_SECONDS = 0.005


def round_ends(
    start: Callable[[], subprocess.Popen], out: Path, watch: Callable[[int, int], None] | None = None
) -> list[float]:
    """
    Args:
        start (`Callable[[], subprocess.Popen]`): Starts the process.
        out (`Path`): The folder of its rounds.jsonl.
        watch (`Callable[[int, int], None]`, *optional*):
            What is called again and again, with the id of the process and the number of lines so far.

    Returns:
        `list[float]`: The seconds from the start of the process until each line, without that of round 0.
    """
    path, ends = out / "rounds.jsonl", []
    started = time.perf_counter()
    process = start()
    try:
        while True:
            has_ended = process.poll() is not None
            lines = path.read_text().splitlines() if path.is_file() else []
            ends += [time.perf_counter() - started] * (len(lines) - len(ends))
            if watch is not None:
                watch(process.pid, len(lines))
            if has_ended or time.perf_counter() - started > RUN_SECONDS:
                break
            time.sleep(POLL_SECONDS)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    return ends[1:] if lines and json.loads(lines[0])["round"] == 0 else ends


def new_folder(folder: Path) -> Path:
    """An empty folder for the files of one run."""
    path = folder.absolute() / "run"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def lines_of_code(path: Path, without: str | None = None) -> int:
    """
    Args:
        path (`Path`): A file with Python code.
        without (`str`, *optional*): Lines that end with this are not counted.

    Returns:
        `int`: Lines of statements, as a formatter sets them: without comments, docstrings and blank lines.
    """
    source = path.read_text()
    used: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        is_docstring = isinstance(node, ast.Expr) and isinstance(getattr(node, "value", None), ast.Constant)
        if isinstance(node, ast.stmt) and not is_docstring:
            end = node.end_lineno if not isinstance(body, list) else body[0].lineno - 1
            used.update(range(node.lineno, end + 1))
    lines = [line.strip() for line in source.splitlines()]
    return sum(bool(lines[number - 1]) and not (without and lines[number - 1].endswith(without)) for number in used)
