"""
Checkpoints of a server: its state, and a hash of every file in the folder, so that an incomplete one is never used.

A checkpoint has the files that [`~transformers.Trainer`] saves for an adapter, and the files that the federation needs
to resume: its tensors as safetensors, and the rest as JSON, with the facts of the run, the hashes of all other files,
and a hash of the JSON file itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from ..exchange import KeptFile
from ..files import CheckpointError, file_digest
from ..random_state import RandomState
from .privacy import NoisyRound
from .state import ServerState


FORMAT_VERSION = 4
STATE_FILE = "federation_state.json"
TENSORS_FILE = "federation_state.safetensors"
OWN_DIGEST = "sha256"  # the digest of the state file, which is stored in it
# the fields of the state that hold tensors
_TENSOR_FIELDS = ("global_state", "running_mean", "merge_memory", "control")
_RANDOM_PREFIX = "rng."
_EARLIER_PREFIX = "earlier."


class SavedServer(NamedTuple):
    """
    The contents of a checkpoint.

    Args:
        state ([`ServerState`]): The state of the server.
        facts (`Mapping[str, Any]`): The facts that must be the same in the resumed run.
    """

    state: ServerState
    facts: Mapping[str, Any]


def write_server_state(folder: Path, state: ServerState, facts: Mapping[str, Any]) -> None:
    """
    Write the state of a server into a checkpoint that already has all other files.

    Args:
        folder (`Path`): The checkpoint.
        state ([`ServerState`]): The state.
        facts (`Mapping[str, Any]`): The facts that must be the same in the resumed run.
    """
    random_state = state.random_state or RandomState.now()
    tensors = {
        f"{field}.{name}": tensor.contiguous()
        for field in _TENSOR_FIELDS
        for name, tensor in getattr(state, field).items()
    }
    earlier = {
        f"{_EARLIER_PREFIX}{age}.{name}": tensor.contiguous()
        for age, merged in enumerate(state.earlier)
        for name, tensor in merged.items()
    }
    safetensors.torch.save_file({**tensors, **earlier, **random_state.tensors}, folder / TENSORS_FILE)
    # including subfolders: PEFT saves an adapter that is not named "default" into one
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}
    content = {
        "format_version": FORMAT_VERSION,
        "round": state.round,
        "num_merged": state.num_merged,
        "num_earlier": len(state.earlier),
        "has_succeeded": state.has_succeeded,
        "spent": [[*noisy, count] for noisy, count in state.spent.items()],
        "kept": state.kept,
        "facts": dict(facts),
        "random_state": random_state.numbers,
        "files": files,
    }
    (folder / STATE_FILE).write_text(json.dumps({**content, OWN_DIGEST: content_digest(content)}, indent=2))


def read_server_state(folder: str | os.PathLike) -> SavedServer:
    """
    Read a checkpoint and check that it is complete.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint.

    Returns:
        [`SavedServer`]: Its contents.

    Raises:
        CheckpointError: if a file is missing, truncated or modified.
    """
    content = _checked_content(Path(folder))
    tensors = safetensors.torch.load_file(Path(folder) / TENSORS_FILE)
    random_tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(_RANDOM_PREFIX)}
    state = ServerState(
        **{field: _of_field(tensors, field) for field in _TENSOR_FIELDS},
        round=content["round"],
        num_merged=content["num_merged"],
        earlier=tuple(_of_field(tensors, f"{_EARLIER_PREFIX}{age}") for age in range(content["num_earlier"])),
        has_succeeded=content["has_succeeded"],
        spent={NoisyRound(*noisy): count for *noisy, count in content["spent"]},
        kept={client: KeptFile(*file) for client, file in content["kept"].items()},
        random_state=RandomState(content["random_state"], random_tensors),
    )
    return SavedServer(state, content["facts"])


def _of_field(tensors: Mapping[str, torch.Tensor], field: str) -> dict[str, torch.Tensor]:
    prefix = f"{field}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def content_digest(content: Mapping[str, Any]) -> str:
    """
    Args:
        content (`Mapping[str, Any]`): The contents of `federation_state.json`, without its own digest.

    Returns:
        `str`: The digest: the SHA-256 of these contents.
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
