"""What stays with a client between its rounds: personal parts of the adapter, and control variates."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .checkpoints import CheckpointError, KeptFile, file_digest


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


def of_parts(state: Mapping[str, torch.Tensor], parts: tuple[str, ...]) -> tuple[State, State]:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`): Names to tensors.
        parts (`tuple[str, ...]`): Parts of names, such as those that a merge method freezes in a round.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: What has one of them in its name, and the rest.
    """
    return split_state(state, [re.escape(part) for part in parts])


def read_patterns(value: Sequence[str] | str | None) -> list[str] | None:
    """
    Args:
        value (`list[str]` or `str`, *optional*): Regular expressions: one, or several, also as JSON.

    Returns:
        `list[str]`: The expressions, or `None` if there are none given.

    Raises:
        ValueError: if one of them is not a regular expression.
    """
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else list(value)
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):  # else it is one that begins with a set of characters
            patterns = json.loads(value)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"`local_parameters` must be regular expressions, but {pattern!r} is none: {error}. Put a backslash before "
                "characters that are meant as they are, as `re.escape` does."
            ) from None
    return patterns


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

    def commit(self, client: str, round_number: int, keep_from: int) -> KeptFile:
        """
        Let what a client has set aside be what it has.

        Args:
            client (`str`): The name of the client.
            round_number (`int`): The round.
            keep_from (`int`): The first round after which a run may go on: what only earlier ones need is deleted.

        Returns:
            [`~peft_ravan.trainers.checkpoints.KeptFile`]: The file, for the checkpoints that need it.

        Raises:
            ClientStoreError: if the files could not be read, renamed or deleted.
        """
        path = self._path(client, round_number)
        with _store_errors(client, path, "written"):
            os.replace(self._aside(client, round_number), path)
            for number in sorted(version for version in self._versions(client) if version <= keep_from)[:-1]:
                self._path(client, number).unlink()
            return KeptFile(round_number, file_digest(path))

    def discard(self, client: str, round_number: int) -> None:
        """
        Delete what a client has set aside, if it has.

        Args:
            client (`str`): The name of the client.
            round_number (`int`): The round.
        """
        self._aside(client, round_number).unlink(missing_ok=True)

    def check(self, kept: Mapping[str, KeptFile]) -> None:
        """
        Args:
            kept (`Mapping[str, KeptFile]`): The files that a checkpoint needs, by the names of the clients.

        Raises:
            CheckpointError: if one of them is missing, cut off or changed.
        """
        for client, file in kept.items():
            path = self._path(client, file.round)
            found = file_digest(path) if path.is_file() else None
            if found != file.digest:
                problem = "is missing" if found is None else "is cut off or damaged"
                raise CheckpointError(
                    f"What client {client!r} has kept since round {file.round} {problem} ({path}), and the run would have "
                    f"another result without it. Put {self.root} back as the run has left it, or start without "
                    "`resume_from_checkpoint`."
                )

    def forget_newer(self, kept: Mapping[str, KeptFile]) -> None:
        """
        Delete what was written in rounds that are run again, or by another run, and what was set aside in rounds that
        were not ended.

        Args:
            kept (`Mapping[str, KeptFile]`): What clients have now, by their names: none for a new run.
        """
        newest = {self._path(client, file.round).parent.name: file.round for client, file in kept.items()}
        folders = self.root.iterdir() if self.root.is_dir() else ()
        for path in [path for folder in folders if folder.is_dir() for path in folder.iterdir()]:
            match = _VERSION.fullmatch(path.name)
            if match and (match[2] == "aside" or int(match[1]) > newest.get(path.parent.name, 0)):
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
