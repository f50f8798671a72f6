"""Storage for what clients keep between their rounds: personal parts of the adapter, and control variates."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..exchange import KeptFile
from ..files import CheckpointError, file_digest


FOLDER = "client_states"
_VERSION = re.compile(r"round-(\d+)\.safetensors")


class ClientStoreError(OSError):
    """Tensors that clients keep could not be written or read. This is a fault of the machine, not of a client."""


class ClientStore:
    """
    Keeps tensors of clients on disk, one file per client and round. So memory does not grow with the number of
    clients, and a run that is resumed from a checkpoint finds the tensors that its clients had at that time.

    A file is valid only if the client's update of that round was merged. The server knows this: it names the round
    whose file a client continues from. Newer files belong to rounds in which the client's update was not merged. They
    are deleted the next time the client saves something.

    Args:
        output_dir (`str` or `os.PathLike`): The folder of the run. Files are written into its folder `client_states`.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.root = Path(output_dir) / FOLDER

    def load(self, client: str, round_number: int | None) -> dict[str, torch.Tensor]:
        """
        Args:
            client (`str`): The name of the client.
            round_number (`int`, *optional*): The round in which they were saved.

        Returns:
            `dict[str, torch.Tensor]`: The tensors that the client kept. Empty without a round.

        Raises:
            ClientStoreError: if the file cannot be read.
        """
        if round_number is None:
            return {}
        path = self._path(client, round_number)
        with _store_errors(client, path, "read"):
            return load_file(path)

    def newest(self, client: str, up_to: int) -> int | None:
        """
        Args:
            client (`str`): The name of the client.
            up_to (`int`): A round.

        Returns:
            `int`: The last round up to this one in which the client saved something, or `None` if there is none.
        """
        return max((version for version in self._versions(client) if version <= up_to), default=None)

    def save(
        self,
        client: str,
        round_number: int,
        tensors: Mapping[str, torch.Tensor],
        kept_in: int | None = None,
        keep_from: int = 0,
    ) -> str:
        """
        Write the tensors that a client keeps after a round. They become valid if the client's update is merged.

        Args:
            client (`str`): The name of the client.
            round_number (`int`): The round.
            tensors (`Mapping[str, torch.Tensor]`): The tensors that the client keeps.
            kept_in (`int`, *optional*): The round whose file the client continued from. Newer files are deleted.
            keep_from (`int`, *optional*, defaults to 0): The earliest round after which a run may be resumed. Files
                that only earlier rounds need are deleted.

        Returns:
            `str`: The SHA-256 of the file.

        Raises:
            ClientStoreError: if the file could not be written.
        """
        path = self._path(client, round_number)
        aside = path.with_suffix(".incomplete")
        try:
            with _store_errors(client, path, "written"):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
                os.replace(aside, path)
                self._delete_spare(client, round_number, kept_in or 0, keep_from)
                return file_digest(path)
        except ClientStoreError:
            aside.unlink(missing_ok=True)
            raise

    def check(self, kept: Mapping[str, KeptFile]) -> None:
        """
        Args:
            kept (`Mapping[str, KeptFile]`): The files that a checkpoint needs, by the names of the clients.

        Raises:
            CheckpointError: if one of them is missing, truncated or modified.
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
        Delete files that are not valid, or were written by another run or in rounds that are run again.

        Args:
            kept (`Mapping[str, KeptFile]`): Client names to their valid files. Empty for a new run.
        """
        newest = {self._folder(client).name: file.round for client, file in kept.items()}
        folders = self.root.iterdir() if self.root.is_dir() else ()
        for path in [path for folder in folders if folder.is_dir() for path in folder.iterdir()]:
            match = _VERSION.fullmatch(path.name)
            if path.suffix == ".incomplete" or (match and int(match[1]) > newest.get(path.parent.name, 0)):
                path.unlink()

    def _delete_spare(self, client: str, round_number: int, kept_in: int, keep_from: int) -> None:
        versions = self._versions(client)
        refused = [version for version in versions if version > kept_in and version != round_number]
        settled = sorted(version for version in versions if version <= min(kept_in, keep_from))
        for version in [*refused, *settled[:-1]]:
            self._path(client, version).unlink()

    def _versions(self, client: str) -> list[int]:
        folder = self._folder(client)
        names = os.listdir(folder) if folder.is_dir() else []
        return [int(match[1]) for name in names if (match := _VERSION.fullmatch(name))]

    def _folder(self, client: str) -> Path:
        # a name may be long, or contain characters that lead out of the folder
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", client)[:40]
        return self.root / f"{readable}-{hashlib.sha256(client.encode()).hexdigest()[:12]}"

    def _path(self, client: str, round_number: int) -> Path:
        return self._folder(client) / f"round-{round_number}.safetensors"


@contextlib.contextmanager
def _store_errors(client: str, path: Path, done: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        errno, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
        raise ClientStoreError(
            errno or 0,
            f"What client {client!r} keeps could not be {done} ({reason}). This is a fault of this machine and not of the "
            "client, so the run ends. Fix it, for example by freeing disk space. If the run saves checkpoints, resume "
            "from the last one with `resume_from_checkpoint=True`",
            str(path),
        ) from error
