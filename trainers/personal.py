"""What stays with a client between its rounds: personal parts of the adapter, and control variates."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .checkpoints import file_digest


FOLDER = "client_states"
_VERSION = re.compile(r"round-(\d+)\.(safetensors|aside)")


State = dict[str, torch.Tensor]


class ClientStoreError(OSError):
    """What clients keep could not be written or read: a fault of this machine, and not of a client."""


def split_state(state: Mapping[str, torch.Tensor], patterns: Sequence[str]) -> tuple[State, State]:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`): Checkpoint names to tensors.
        patterns (`Sequence[str]`): Regular expressions, which are searched for in the names.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: What stays with its client, and what is shared.
    """
    personal = {name: tensor for name, tensor in state.items() if any(re.search(p, name) for p in patterns)}
    return personal, {name: tensor for name, tensor in state.items() if name not in personal}


def check_patterns(state: Mapping[str, torch.Tensor], patterns: Sequence[str]) -> None:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`): Checkpoint names to tensors.
        patterns (`Sequence[str]`): Regular expressions.

    Raises:
        ValueError: if one of them is found in no name, or nothing is left to share.
    """
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in state):
            raise ValueError(
                f"`local_parameters`: {pattern!r} is in none of the names of what clients train, such as "
                f"{next(iter(state))!r}."
            )
    if not split_state(state, patterns)[1]:
        raise ValueError("`local_parameters` name all that clients train, so there is nothing to share.")


class ClientStore:
    """
    Keeps tensors of clients on disk, a file for each client and round, so that memory does not grow with the number of
    clients, and a run that goes on from a checkpoint finds what its clients had then.

    What counts is what was merged: a client writes aside what it keeps of a round, and the server commits that when the
    round counts and the client's update is in it. Otherwise the client has what it had before.

    Args:
        output_dir (`str` or `os.PathLike`): The folder of the run. Files are written into its folder `client_states`.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.root = Path(output_dir) / FOLDER

    def load(self, client: str, before: int) -> dict[str, torch.Tensor]:
        """
        Args:
            client (`str`): The name of the client.
            before (`int`): The round that begins.

        Returns:
            `dict[str, torch.Tensor]`: What the client kept at the end of its last round before this one; nothing if no
            update of it was merged yet.

        Raises:
            ClientStoreError: if its file cannot be read.
        """
        versions = [number for number in self._versions(client) if number < before]
        return _read(client, self._path(client, max(versions))) if versions else {}

    def set_aside(self, client: str, round_number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """
        Write what a client keeps, if its update is merged.

        Args:
            client (`str`): The name of the client.
            round_number (`int`): The round.
            tensors (`Mapping[str, torch.Tensor]`): What the client keeps.

        Raises:
            ClientStoreError: if it could not be written.
        """
        path = self._aside(client, round_number)
        try:
            with _store_errors(client, path, "written"):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        except ClientStoreError:
            path.unlink(missing_ok=True)
            raise

    def load_aside(self, client: str, round_number: int) -> dict[str, torch.Tensor]:
        """
        Args:
            client (`str`): The name of the client.
            round_number (`int`): The round.

        Returns:
            `dict[str, torch.Tensor]`: What the client has set aside.

        Raises:
            ClientStoreError: if its file cannot be read.
        """
        return _read(client, self._aside(client, round_number))

    def commit(self, client: str, round_number: int, keep_from: int) -> str:
        """
        Let what a client has set aside be what it has.

        Args:
            client (`str`): The name of the client.
            round_number (`int`): The round.
            keep_from (`int`): The first round after which a run may go on: what only earlier ones need is deleted.

        Returns:
            `str`: The SHA-256 of the file.

        Raises:
            ClientStoreError: if the files could not be read, renamed or deleted.
        """
        path = self._path(client, round_number)
        with _store_errors(client, path, "written"):
            os.replace(self._aside(client, round_number), path)
            for number in sorted(version for version in self._versions(client) if version <= keep_from)[:-1]:
                self._path(client, number).unlink()
            return file_digest(path)

    def discard(self, client: str, round_number: int) -> None:
        """
        Delete what a client has set aside, if it has.

        Args:
            client (`str`): The name of the client.
            round_number (`int`): The round.
        """
        self._aside(client, round_number).unlink(missing_ok=True)

    def forget_after(self, round_number: int) -> None:
        """
        Delete what was written in later rounds, which are run again, and what was set aside in rounds that were not ended.

        Args:
            round_number (`int`): The last round that counts.
        """
        folders = self.root.iterdir() if self.root.is_dir() else ()
        for path in [path for folder in folders if folder.is_dir() for path in folder.iterdir()]:
            match = _VERSION.fullmatch(path.name)
            if match and (match[2] == "aside" or int(match[1]) > round_number):
                path.unlink()

    def _versions(self, client: str) -> list[int]:
        folder = self._path(client, 0).parent
        names = os.listdir(folder) if folder.is_dir() else []
        matches = [match for name in names if (match := _VERSION.fullmatch(name))]
        return [int(match[1]) for match in matches if match[2] == "safetensors"]

    def _path(self, client: str, round_number: int) -> Path:
        # a name may be long, or have characters that lead out of the folder
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", client)[:40]
        folder = f"{readable}-{hashlib.sha256(client.encode()).hexdigest()[:12]}"
        return self.root / folder / f"round-{round_number}.safetensors"

    def _aside(self, client: str, round_number: int) -> Path:
        return self._path(client, round_number).with_suffix(".aside")


def _read(client: str, path: Path) -> dict[str, torch.Tensor]:
    with _store_errors(client, path, "read"):
        return load_file(path)


@contextlib.contextmanager
def _store_errors(client: str, path: Path, done: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        errno, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
        raise ClientStoreError(
            errno or 0,
            f"What client {client!r} keeps could not be {done} ({reason}). This is a fault of this machine and not of the "
            "client, so the run ends. Mend it, such as by making room; a run that saves checkpoints goes on from the last "
            "one with `resume_from_checkpoint=True`",
            str(path),
        ) from error
