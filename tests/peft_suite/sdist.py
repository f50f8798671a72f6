"""PEFT's tests, which are part of its source distribution but not of its wheel."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest


CACHE = Path(__file__).parents[2] / ".cache" / "peft_suite"


class NoSourceDistribution(Exception):
    """Raised when the tests of PEFT cannot be obtained. The message says why."""


def leave_out(error: NoSourceDistribution) -> NoReturn:
    """
    Skip PEFT's tests because they cannot be obtained. CI fails instead, since a skip would go unnoticed there.

    Args:
        error (`NoSourceDistribution`): The reason.
    """
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"PEFT's tests were not run, which they have to be where CI is set: {error}", pytrace=False)
    pytest.skip(str(error))


def _download(version: str, folder: Path) -> Path:
    # No build isolation: pip builds the metadata of the archive, for which the setuptools that torch needs is
    # sufficient.
    options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), f"peft=={version}"]
    result = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob("peft-*.tar.gz"))
    if result.returncode or not archives:
        reason = result.stderr.strip().splitlines()[-1:] or ["pip says no more"]
        raise NoSourceDistribution(f"the source distribution of peft {version} could not be downloaded: {reason[0]}")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    tree = folder / archive.name.removesuffix(".tar.gz")
    if not (tree / "tests" / "testing_common.py").exists():
        raise NoSourceDistribution(f"{archive.name} does not contain PEFT's tests")
    # The tests import each other relatively, but the archive does not include this file.
    (tree / "tests" / "__init__.py").touch()
    return tree


def peft_source_tree() -> Path:
    """
    Returns:
        `Path`: The unpacked source distribution of the installed version of PEFT. Downloaded once, then cached.

    Raises:
        NoSourceDistribution: if it cannot be downloaded or has no tests.
    """
    version = importlib.metadata.version("peft")
    cached = CACHE / f"peft-{version}"
    if cached.exists():
        return cached
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        tree = _unpack(_download(version, Path(folder)), Path(folder))
        try:
            tree.rename(cached)
        except OSError:
            # another process was faster
            if not cached.exists():
                raise
    return cached
