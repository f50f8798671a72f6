"""Output of commands: what already exists, and what of it may be replaced."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from peft_ravan.sharing.adapter_files import (
    ADAPTER_FILES,
    CARD_FILE,
    KNOWN_FILES,
    PROCESSING_FILES,
    RECORD_FILES,
    files_of,
    is_one_of,
    other_files,
)

from ..files import atomic_folder
from ..run_folder import RUN_FILE, find_checkpoints
from ..server.checkpoints import STATE_FILE, TENSORS_FILE


# number of files that an error message lists
_SHOWN = 5
_FILES_OF_A_CHECKPOINT = (*KNOWN_FILES, TRAINER_STATE_NAME, TRAINING_ARGS_NAME, STATE_FILE, TENSORS_FILE, RUN_FILE)


def check_is_free(path: str | os.PathLike, overwrite: bool) -> None:
    """
    Args:
        path (`str` or `os.PathLike`): The file to write.
        overwrite (`bool`): Whether it may be replaced.

    Raises:
        FileExistsError: if it exists and must not be replaced, or is a folder.
    """
    if Path(path).is_dir():
        raise FileExistsError(f"{str(path)!r} is a folder, and a file is to be written. Choose another name.")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(_exists(path))


@dataclass(frozen=True)
class OutputFolder:
    """
    The folder that a command writes an adapter to.

    Args:
        path (`str` or `os.PathLike`): The folder.
        overwrite (`bool`): Whether an existing adapter may be replaced.
        inputs (`tuple[str, ...]`): The folders of the adapters that are read, or their names on the Hub.
    """

    path: str | os.PathLike
    overwrite: bool = False
    inputs: tuple[str, ...] = ()

    def check(self) -> None:
        """
        Raises:
            FileExistsError: if there is something that must not be replaced: anything at all without `overwrite`; with it,
                anything other than a folder that contains only the files of an adapter.
            ValueError: if the folder is one of the inputs, the current folder or the home folder.
        """
        path, name = Path(self.path), str(self.path)
        for given in self.inputs:
            if path.exists() and os.path.exists(given) and path.samefile(given):
                raise ValueError(
                    f"{name!r} is the folder of {given!r}, which is read: the adapter would replace what it is made of. Choose "
                    "another place."
                )
        for place, words in ((Path.cwd(), "the folder you are in"), (Path.home(), "your home folder")):
            if path.exists() and place.exists() and path.samefile(place):
                raise ValueError(f"{name!r} is {words}. Choose a folder of its own for the adapter.")
        if path.is_symlink():
            raise FileExistsError(
                f"{name!r} is a link to {os.readlink(path)!r}, which would take its place. Give the folder itself."
            )
        if not path.exists():
            return
        if not path.is_dir():
            raise FileExistsError(f"{name!r} is a file, and an adapter is a folder. Choose another place.")
        if not self.overwrite:
            raise FileExistsError(_exists(path))
        if others := other_files(path):
            raise FileExistsError(
                f"{name!r} has more than an adapter in it: {_listed(others)}. --overwrite replaces an adapter and nothing "
                "else. Choose another place, or move these away."
            )

    @contextlib.contextmanager
    def write(self) -> Iterator[Path]:
        """
        Write to a temporary folder, and move it to its place when it is complete. The tokenizer of a replaced adapter
        is kept.

        Yields:
            `Path`: The folder to write into.
        """
        with atomic_folder(self.path) as aside:
            yield aside
            if os.path.isdir(self.path):
                _keep(Path(self.path), aside, PROCESSING_FILES)


def check_run_folder(output_dir: str | os.PathLike, overwrite: bool) -> None:
    """
    Args:
        output_dir (`str` or `os.PathLike`): The folder of a new run.
        overwrite (`bool`): Whether an earlier run may be replaced.

    Raises:
        FileExistsError: if it has files of an earlier run that must not be replaced, if its checkpoints contain other
            files, or if it is a file.
        ValueError: if its name is empty.
    """
    if not str(output_dir).strip():
        raise ValueError("`output_dir` is empty. Give the folder that the adapter is written to.")
    if os.path.lexists(output_dir) and not os.path.isdir(output_dir):
        raise FileExistsError(f"{str(output_dir)!r} is a file, and a run has a folder. Choose another `output_dir`.")
    found = _files_of_a_run(Path(output_dir))
    if found and not overwrite:
        raise FileExistsError(
            f"{str(output_dir)!r} has what this run would replace: {_listed(found)}. Choose another `output_dir`, go on from the "
            "last checkpoint with --resume_from_checkpoint true, or give --overwrite to replace an earlier run."
        )
    for checkpoint in find_checkpoints(output_dir):
        if others := other_files(checkpoint, _FILES_OF_A_CHECKPOINT):
            raise FileExistsError(
                f"{str(checkpoint)!r} has more than a checkpoint in it: {_listed(others)}. Move it away: --overwrite removes "
                "the checkpoints of an earlier run."
            )


def remove_run(output_dir: str | os.PathLike) -> None:
    """
    Remove the adapter and the checkpoints of an earlier run, as allowed by [`check_run_folder`]. Other files are kept.

    Args:
        output_dir (`str` or `os.PathLike`): The folder of the run.
    """
    for checkpoint in find_checkpoints(output_dir):
        shutil.rmtree(checkpoint)
    for name in _adapter_files_in(Path(output_dir)):
        os.unlink(os.path.join(output_dir, name))


def _files_of_a_run(folder: Path) -> list[str]:
    return [*_adapter_files_in(folder), *(path.name for path in reversed(find_checkpoints(folder)))]


def _adapter_files_in(folder: Path) -> list[str]:
    # Tokenizers are left out: they do not change between runs, and may have been copied there by hand. A run that
    # could not begin leaves an empty file, which does not count either.
    names = [name for name in (*ADAPTER_FILES, CARD_FILE, *RECORD_FILES) if os.path.lexists(folder / name)]
    return [name for name in names if os.path.islink(folder / name) or os.path.getsize(folder / name)]


def _keep(old: Path, new: Path, patterns: Iterable[str]) -> None:
    for path in files_of(old):
        if is_one_of(path, patterns) and not (new / path).exists():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(old / path, new / path)


def _exists(path: str | os.PathLike) -> str:
    return f"{str(path)!r} exists already. Choose another place, or give --overwrite to replace it."


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
