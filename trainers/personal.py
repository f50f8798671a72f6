"""What stays with a client between its rounds: personal parts of the adapter, and control variates."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch


FOLDER = "client_states"
_VERSION = re.compile(r"round-(\d+)\.(safetensors|incomplete)")


State = dict[str, torch.Tensor]


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
            `dict[str, torch.Tensor]`: What the client kept at the end of its last round before this one; nothing if it
            has not taken part yet.
        """
        versions = [number for number in self._versions(client) if number < before]
        return safetensors.torch.load_file(self._path(client, max(versions))) if versions else {}

    def save(self, client: str, round_number: int, tensors: Mapping[str, torch.Tensor], keep_from: int) -> None:
        """
        Args:
            client (`str`): The name of the client.
            round_number (`int`): The round.
            tensors (`Mapping[str, torch.Tensor]`): What the client keeps.
            keep_from (`int`): The first round after which a run may go on: what only earlier ones need is deleted.
        """
        path = self._path(client, round_number)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".incomplete")
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
        os.replace(aside, path)
        for number in sorted(version for version in self._versions(client) if version <= keep_from)[:-1]:
            self._path(client, number).unlink()

    def forget_after(self, round_number: int) -> None:
        """
        Delete what was written in later rounds, which are run again.

        Args:
            round_number (`int`): The last round that counts.
        """
        folders = self.root.iterdir() if self.root.is_dir() else ()
        for path in [path for folder in folders if folder.is_dir() for path in folder.iterdir()]:
            match = _VERSION.fullmatch(path.name)
            if match and (match[2] == "incomplete" or int(match[1]) > round_number):
                path.unlink()

    def _versions(self, client: str) -> list[int]:
        folder = self._path(client, 0).parent
        names = os.listdir(folder) if folder.is_dir() else []
        matches = [match for name in names if (match := _VERSION.fullmatch(name))]
        return [int(match[1]) for match in matches if match[2] == "safetensors"]

    def _path(self, client: str, round_number: int) -> Path:
        # a name may be long, or have characters that lead out of the folder
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", client)[:40]
        return self.root / f"{readable}-{hashlib.sha256(client.encode()).hexdigest()[:12]}" / _file_name(round_number)


def _file_name(round_number: int) -> str:
    return f"round-{round_number}.safetensors"
