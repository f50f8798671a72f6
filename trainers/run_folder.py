"""The output folder of a run: it is locked for one run at a time, and each run recognizes its own checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

RUN_FILE = "federation_run.json"
_LOCK_FILE = ".federation.lock"


class FolderInUseError(RuntimeError):
    """Raised when another run is writing into the output folder."""


def find_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """
    Args:
        output_dir (`str` or `os.PathLike`): The folder of the run.

    Returns:
        `list[Path]`: The folders that are named like a checkpoint, the newest first. They may be damaged.
    """
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    numbered = [path for path in folders if path.name.rpartition("-")[2].isdigit()]
    return sorted(numbered, key=checkpoint_round, reverse=True)


def checkpoint_round(folder: Path) -> int:
    """
    Args:
        folder (`Path`): The folder of a checkpoint.

    Returns:
        `int`: The round after which it was written.
    """
    return int(folder.name.rpartition("-")[2])


@dataclass(frozen=True)
class RunIdentity:
    """
    The identity of a run. A run that resumes from a checkpoint has its own name, and shares the rounds up to that
    checkpoint with the run that wrote it.

    Args:
        name (`str`, *optional*): The unique name of the run. By default a random one from the operating system.
        before (`Mapping[str, int]`): The names of the runs that it continues, each with the last round they share.
    """

    name: str = field(default_factory=lambda: secrets.token_hex(8))
    before: Mapping[str, int] = field(default_factory=dict)

    def going_on(self, round_number: int) -> RunIdentity:
        """
        Args:
            round_number (`int`): A round of this run.

        Returns:
            [`RunIdentity`]: A run that continues after that round.
        """
        shared = {name: min(last, round_number) for name, last in self.before.items()}
        return RunIdentity(before={**shared, self.name: round_number})

    def has(self, checkpoint: Path) -> bool:
        """
        Args:
            checkpoint (`Path`): The folder of a checkpoint.

        Returns:
            `bool`: Whether it was written by this run, or by a run that it continues and in a round that they share.
        """
        other = RunIdentity.read(checkpoint)
        if other is None:
            return False
        return other.name == self.name or checkpoint_round(checkpoint) <= self.before.get(other.name, -1)

    def write(self, folder: Path) -> None:
        """
        Args:
            folder (`Path`): The folder of a checkpoint, or the output folder, which then records this run as the
                latest.
        """
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{RUN_FILE}.incomplete"
        aside.write_text(json.dumps(asdict(self)))
        os.replace(aside, folder / RUN_FILE)

    @classmethod
    def read(cls, folder: Path) -> RunIdentity | None:
        """
        Args:
            folder (`Path`): The folder of a checkpoint, or the output folder of runs.

        Returns:
            [`RunIdentity`]: The run that wrote it, or the latest run in it. `None` if that is not known.
        """
        try:
            return cls(**json.loads((folder / RUN_FILE).read_text()))
        except (OSError, ValueError, TypeError):
            return None


def checkpoints_to_resume(run_dir: str | os.PathLike) -> list[Path]:
    """
    Args:
        run_dir (`str` or `os.PathLike`): The output folder of runs.

    Returns:
        `list[Path]`: The checkpoints of the latest run, the newest first, or all checkpoints if that run is not known.
        They may be damaged, and checkpoints that do not identify their run are included.
    """
    run, folders = RunIdentity.read(Path(run_dir)), find_checkpoints(run_dir)
    return [folder for folder in folders if run is None or RunIdentity.read(folder) is None or run.has(folder)]


def rotate_own_checkpoints(run: RunIdentity, run_dir: str | os.PathLike, limit: int | None, best: str | None) -> None:
    """
    Delete the oldest checkpoints of a run according to `save_total_limit`. Those of other runs are kept.

    Args:
        run ([`RunIdentity`]): The run.
        run_dir (`str` or `os.PathLike`): The folder of the run.
        limit (`int`, *optional*): How many to keep. The newest and the best are always kept. By default all are.
        best (`str`, *optional*): The checkpoint with the best metric so far.
    """
    if not limit or limit < 0:
        return
    newest, *older = [folder for folder in find_checkpoints(run_dir) if run.has(folder)]
    kept = {newest} | ({Path(best)} if best else set())
    spare = max(limit, len(kept)) - len(kept)
    for folder in [folder for folder in older if folder not in kept][spare:]:
        shutil.rmtree(folder, ignore_errors=True)


def lock_folder(folder: str | os.PathLike) -> contextlib.ExitStack:
    """
    Lock a folder against other runs, until this process releases the lock or ends.

    Args:
        folder (`str` or `os.PathLike`): The output folder of a run. It is created if it does not exist.

    Returns:
        `contextlib.ExitStack`: Releases the lock when it is closed, at the end of the run.

    Raises:
        FolderInUseError: if another run has locked it.
    """
    os.makedirs(folder, exist_ok=True)
    path = Path(folder, _LOCK_FILE)
    lock, held = FileLock(path), contextlib.ExitStack()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUseError(
            f"Another run is writing into {folder}, and the two would mix their checkpoints. Give this run an `output_dir` "
            "of its own, or wait for the other to end."
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning(f"{folder} cannot be locked ({error}). Make sure that no other run writes into it.")
        return held
    held.callback(lock.release)
    held.callback(_unlink, path)  # runs before the release, so that no process locks a deleted file
    return held


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot delete an open file
        path.unlink()
