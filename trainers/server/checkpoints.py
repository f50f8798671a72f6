"""
Checkpoints of a federation: folders that are written aside and then renamed, so that there is never half of one.

A checkpoint has what [`~transformers.Trainer`] puts there for an adapter, and what the federation needs to go on: the
memory of the server and the random state as safetensors, the facts of the run and a hash of every file as JSON, with those
of the files in which clients keep their own parts, and one of itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


FORMAT_VERSION = 2
STATE_FILE = "federation_state.json"
TENSORS_FILE = "federation_state.safetensors"
OWN_DIGEST = "sha256"  # of the state file, within it
_SERVER_PREFIX = "server."


class CheckpointError(ValueError):
    """A checkpoint that is cut off, or of another federation. The message names it and says why."""


class KeptFile(NamedTuple):
    """
    The file of what a client keeps.

    Args:
        round (`int`): The round that it was written in.
        digest (`str`): Its SHA-256.
    """

    round: int
    digest: str


@dataclass(frozen=True)
class FederationState:
    """
    What a run needs to go on, beside the adapter and the history.

    Args:
        round (`int`): The last round that was run.
        facts (`Mapping[str, Any]`): What must be the same in the run that goes on.
        server_state (`Mapping[str, torch.Tensor]`): What server optimizers and merge methods remember.
        client_states (`Mapping[str, KeptFile]`): The files of what clients keep, by the names of the clients.
    """

    round: int
    facts: Mapping[str, Any]
    server_state: Mapping[str, torch.Tensor]
    client_states: Mapping[str, KeptFile] = field(default_factory=dict)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, way_out: str = "Make room, and try again") -> Iterator[Path]:
    """
    Write a folder aside, and put it in its place when all is written.

    Args:
        path (`str` or `os.PathLike`): The folder. One that exists is replaced.
        way_out (`str`, *optional*): What to tell who has no room for it.

    Yields:
        `Path`: The folder to write into.

    Raises:
        OSError: if it could not be written. The place is as it was then.
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
    # a rename that reaches the disk before the contents would leave empty files after a power failure
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


def write_federation_state(folder: Path, state: FederationState) -> None:
    """
    Write what the federation needs into a checkpoint that has all other files already.

    Args:
        folder (`Path`): The checkpoint.
        state ([`FederationState`]): The state.
    """
    rng_json, rng_tensors = random_state()
    tensors = {f"{_SERVER_PREFIX}{name}": tensor.contiguous() for name, tensor in state.server_state.items()}
    safetensors.torch.save_file({**tensors, **rng_tensors}, folder / TENSORS_FILE)
    # also in folders: PEFT saves an adapter that is not named "default" into one
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}
    content = {
        "format_version": FORMAT_VERSION,
        "round": state.round,
        "facts": dict(state.facts),
        "client_states": state.client_states,
        "random_state": rng_json,
        "files": files,
    }
    (folder / STATE_FILE).write_text(json.dumps({**content, OWN_DIGEST: content_digest(content)}, indent=2))


def read_federation_state(folder: str | os.PathLike) -> FederationState:
    """
    Read a checkpoint, and check that it is whole.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint.

    Returns:
        [`FederationState`]: The state.

    Raises:
        CheckpointError: if a file is missing, cut off or changed.
    """
    content = _checked_content(Path(folder))
    tensors = safetensors.torch.load_file(Path(folder) / TENSORS_FILE)
    server_state = {
        name.removeprefix(_SERVER_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(_SERVER_PREFIX)
    }
    client_states = {client: KeptFile(*file) for client, file in content["client_states"].items()}
    return FederationState(content["round"], content["facts"], server_state, client_states)


def content_digest(content: Mapping[str, Any]) -> str:
    """
    Args:
        content (`Mapping[str, Any]`): What `federation_state.json` has beside its own digest.

    Returns:
        `str`: That digest, the SHA-256 of it all.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checked_content(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / STATE_FILE).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint of a federation: it has no {STATE_FILE}.") from None
    except ValueError as error:
        raise CheckpointError(f"{folder} is cut off or damaged: {STATE_FILE} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder} is damaged: {STATE_FILE} is not what was written.")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {content.get('format_version')!r}, and this version reads {FORMAT_VERSION}."
        )
    if content.pop(OWN_DIGEST, None) != content_digest(content):
        raise CheckpointError(f"{folder} is damaged: {STATE_FILE} is not what was written.")
    for name, digest in content["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing.")
        if file_digest(file) != digest:
            raise CheckpointError(f"{folder} is cut off or damaged: {name} is not what was written.")
    return content


def find_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """
    Args:
        output_dir (`str` or `os.PathLike`): The folder of the run.

    Returns:
        `list[Path]`: The folders with the name of a checkpoint, the newest first. They may be damaged.
    """
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    numbered = [path for path in folders if path.name.rpartition("-")[2].isdigit()]
    return sorted(numbered, key=checkpoint_round, reverse=True)


def checkpoint_round(folder: Path) -> int:
    """
    Args:
        folder (`Path`): The folder of a checkpoint.

    Returns:
        `int`: The round that it was written after.
    """
    return int(folder.name.rpartition("-")[2])


def random_state() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """
    Returns:
        `tuple[dict[str, Any], dict[str, torch.Tensor]]`: The state of the random generators of Python, NumPy and torch: what
        JSON can hold of it, and the rest as tensors.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    tensors = {"rng.torch": torch.get_rng_state(), "rng.numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors.update({f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    version, internal, gauss_next = random.getstate()
    return {
        "numpy": [kind, position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }, tensors


def restore_random_state(folder: str | os.PathLike) -> None:
    """
    Put the random generators into the state they had when a checkpoint was written.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint.
    """
    content = json.loads((Path(folder) / STATE_FILE).read_text())["random_state"]
    _set_random_state(content, safetensors.torch.load_file(Path(folder) / TENSORS_FILE))


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave the random generators as they were, whatever is drawn from them within."""
    state = random_state()
    try:
        yield
    finally:
        _set_random_state(*state)


def _set_random_state(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors["rng.torch"])
    kind, position, has_gauss, gauss = content["numpy"]
    np.random.set_state((kind, tensors["rng.numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = content["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if torch.cuda.is_available():
        states = [tensors[f"rng.cuda.{i}"] for i in range(torch.cuda.device_count()) if f"rng.cuda.{i}" in tensors]
        for device, state in enumerate(states):
            torch.cuda.set_rng_state(state, device)
