"""Folders that are written atomically, so that there is never an incomplete one, and digests of files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import safetensors


class CheckpointError(ValueError):
    """A checkpoint is damaged, or belongs to another federation. The message names it and says why."""


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, way_out: str = "Make room, and try again") -> Iterator[Path]:
    """
    Write a folder under a temporary name, and move it into place when it is complete.

    Args:
        path (`str` or `os.PathLike`): The folder. An existing one is replaced.
        way_out (`str`, *optional*): Advice for the error message, for example if the disk is full.

    Yields:
        `Path`: The folder to write into.

    Raises:
        OSError: if it could not be written. The target is then left as it was.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            old = path.with_name(f".{path.name}.replaced")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
            os.replace(aside, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(aside, path)
        _sync(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        errno, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
        raise OSError(errno or 0, f"The folder could not be written ({reason}). {way_out}", str(path)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    # if a rename reached the disk before the contents, a power failure would leave empty files
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems do not sync folders
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """
    Args:
        path (`Path`): A file.

    Returns:
        `str`: Its SHA-256.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
