"""The pytest plugin that makes PEFT's tests run on Ravan. It is loaded in a separate process."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import sys
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_ravan  # noqa: F401  # registers the method

from . import rows
from .offline_models import build_hub_cache


REPORT_VARIABLE = "PEFT_SUITE_REPORT"
STEP_VARIABLE = "PEFT_SUITE_STEP"


class _AlreadyLoaded(dict):
    """PEFT's tests contact the Hub for a name they have not seen yet, so this claims to have seen all."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 0


def _stub_diffusers() -> None:
    # PEFT's tests need it for type checks only, apart from those of image models
    if importlib.util.find_spec("diffusers") is not None:
        return
    module = types.ModuleType("diffusers")
    module.__spec__ = importlib.machinery.ModuleSpec("diffusers", loader=None)
    module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = module


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    _stub_diffusers()
    hub_cache = Path(os.environ["HF_HUB_CACHE"])
    if not hub_cache.exists():
        build_hub_cache(hub_cache)
    sys.path.insert(0, str(config.rootpath))
    importlib.import_module("tests.testing_utils")._HUB_MODEL_ACCESSES = _AlreadyLoaded()


def _module_name(node: pytest.Item) -> str:
    return node.module.__name__.rpartition(".")[2]


def _values(row: Any) -> tuple:
    if hasattr(row, "values") and hasattr(row, "marks"):
        return tuple(row.values)
    return tuple(row) if isinstance(row, (tuple, list)) else (row,)


def _ravan_rows(module: types.ModuleType, argvalues: Any) -> list | None:
    """The rows for Ravan that replace those of a matrix, or `None` if the matrix does not list methods."""
    module_name = module.__name__.rpartition(".")[2]
    for (matrix_module, matrix), ravan_rows in rows.MATRICES.items():
        if matrix_module == module_name and argvalues is getattr(module, matrix):
            return ravan_rows
    if not isinstance(argvalues, (list, tuple)):
        return None
    translated = []
    for row in map(_values, argvalues):
        values = tuple(map(rows.translate_value, row))
        if any(map(rows.is_ravan, values)):
            translated.append(values if len(values) > 1 else values[0])
    return translated or None


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    markers = metafunc.definition.own_markers
    for index, marker in enumerate(markers):
        if marker.name != "parametrize":
            continue
        argnames, argvalues = marker.args[:2]
        ravan_rows = _ravan_rows(metafunc.module, argvalues)
        if ravan_rows is not None:
            options = {name: value for name, value in marker.kwargs.items() if name != "ids" or callable(value)}
            markers[index] = pytest.mark.parametrize(argnames, ravan_rows, **options).mark


def _has_ravan_row(item: pytest.Item) -> bool:
    parameters = getattr(item, "callspec", None)
    return parameters is not None and any(map(rows.is_ravan, parameters.params.values()))


def _in_place_of_lora(item: pytest.Item) -> bool:
    return item.originalname in rows.TESTS_IN_PLACE_OF_LORA.get(_module_name(item), ())


def _listed(table: dict[str, str], item: pytest.Item) -> str | None:
    """The reason given for a test in a table of test names, with or without parameters."""
    prefix = f"{_module_name(item)}::"
    return table.get(prefix + item.name) or table.get(prefix + item.originalname)


def _check_names(items: list[pytest.Item]) -> None:
    """Check that all names exist: after an update of PEFT, an outdated name would silently have no effect."""
    modules = {_module_name(item) for item in items}
    known = {f"{_module_name(item)}::{name}" for item in items for name in (item.name, item.originalname)}
    wanted = {f"{module}::{name}" for module, names in rows.TESTS_IN_PLACE_OF_LORA.items() for name in names}
    wanted |= rows.NOT_APPLICABLE.keys() | rows.KNOWN_FAILURES.keys()
    missing = sorted(name for name in wanted - known if name.split("::")[0] in modules)
    if missing:
        raise pytest.UsageError(f"rows.py names tests that this version of PEFT does not have: {missing}")


def _every_few(items: list[pytest.Item], step: int) -> list[pytest.Item]:
    """All tests, each with one in `step` of its rows, and the next test with the rows after those."""
    by_test: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        by_test[_module_name(item), item.originalname].append(item)
    return [
        item for number, rows in enumerate(by_test.values()) for item in rows[number % min(step, len(rows)) :: step]
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _check_names(items)
    selected = [item for item in items if _has_ravan_row(item) or _in_place_of_lora(item)]
    selected = _every_few(selected, int(os.environ.get(STEP_VARIABLE, 1)))
    config.hook.pytest_deselected(items=list(set(items) - set(selected)))
    items[:] = selected
    for item in items:
        if reason := _listed(rows.NOT_APPLICABLE, item):
            item.add_marker(pytest.mark.skip(reason=reason))
        if reason := _listed(rows.KNOWN_FAILURES, item):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    torch.manual_seed(0)
    stand_ins = rows.STAND_INS_WITHOUT_ROWS if _in_place_of_lora(item) else rows.STAND_INS_WITH_ROWS
    with pytest.MonkeyPatch.context() as patch:
        for module_name, names in stand_ins.items():
            module = sys.modules.get(f"tests.{module_name}") or sys.modules.get(module_name)
            for name, value in names.items() if module else ():
                patch.setattr(module, name, value)
        return (yield)


class _Report:
    """Writes the outcome of every test to a file for the parent process."""

    def __init__(self, path: Path):
        self.path = path
        self.outcomes: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        outcome, reason = report.outcome, ""
        if hasattr(report, "wasxfail"):
            outcome, reason = "known failure", report.wasxfail
        elif report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            reason = report.longreprtext
        self.outcomes[report.nodeid] = {"outcome": outcome, "reason": reason}

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.outcomes))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if path := os.environ.get(REPORT_VARIABLE):
        config.pluginmanager.register(_Report(Path(path)))
