"""
A fingerprint of each client's data, which shows whether a resumed run uses different data.

It must be cheap for thousands of clients and for large data sets, so only a sample of the examples is hashed, or all
of them if there are few. It depends only on the content of the examples. The fingerprints of 🤗 Datasets, in contrast,
also depend on the machine and on how a data set was created.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from datasets.formatting import query_table
from torch.utils.data import Dataset
from transformers.trainer_utils import has_length

from ..random_state import preserved_random_state
from .partition import ClientParts
from .preparation import given_clients


# number of examples read over all clients: from tables, and from data sets where creating an example may be slow
MAX_ROWS = 1000
MAX_EXAMPLES = 50


def client_fingerprints(clients: Mapping[str, Dataset], may_read: bool = True) -> dict[str, str | None]:
    """
    Args:
        clients (`Mapping[str, Dataset]`): Client names to data sets, as a trainer has them. The fingerprints are those
            of the original data sets, before the trainer prepares them.
        may_read (`bool`, *optional*, defaults to `True`): Whether this process may read examples of data sets other than
            tables. It must not if workers load the data, since they would inherit an open file.

    Returns:
        `dict[str, str | None]`: Client names to fingerprints. `None` for data that cannot be recognized again:
        streams, and examples that change on every access, such as those of an augmentation with its own random
        numbers.
    """
    given = given_clients(clients)
    sources = {client: _source(given, client) for client in given}
    is_table = all(isinstance(dataset, datasets.Dataset) for dataset, _ in sources.values())
    budget = MAX_ROWS if is_table else MAX_EXAMPLES
    looked_at = set(_spread(list(sources), budget))
    per_client = max(1, budget // max(1, len(sources)))
    fingerprints = {}
    with preserved_random_state():
        for client, (dataset, indices) in sources.items():
            indices = np.ascontiguousarray(indices, dtype="<i8")  # the same bytes on all machines
            parts = [_digest(indices.tobytes())]
            if client in looked_at:
                may_look = may_read or isinstance(dataset, datasets.Dataset)
                parts.append(_examples_digest(dataset, _spread(indices, per_client)) if may_look else None)
            fingerprints[client] = None if None in parts else _digest("".join(parts).encode())[:16]
    return fingerprints


def _source(given: Mapping[str, Dataset], client: str) -> tuple[Dataset, Sequence[int]]:
    """The data set that contains the examples of a client, and their indices in it."""
    if isinstance(given, ClientParts):
        return given.dataset, given.indices(client)
    dataset = given[client]
    return dataset, range(len(dataset)) if has_length(dataset) else range(0)


def _spread(values: Sequence[Any], number: int) -> list[Any]:
    """At most `number` values, evenly spaced, including the first and the last."""
    places = np.linspace(0, len(values) - 1, min(number, len(values))).astype(int)
    return [values[place] for place in places]


def _examples_digest(dataset: Dataset, indices: Sequence[int]) -> str | None:
    if not indices:
        return None
    try:
        if isinstance(dataset, datasets.Dataset):
            # the stored values, without decoding or transforms
            rows = query_table(dataset._data, [int(index) for index in indices], indices=dataset._indices).to_pylist()
            return _rows_digest([{name: _without_folder(value) for name, value in row.items()} for row in rows])
        first, again = (_rows_digest(_seeded_examples(dataset, indices)) for _ in range(2))
        return first if first == again else None
    except Exception:  # training will report it; here it only means that there is no fingerprint
        return None


def _without_folder(value: Any) -> Any:
    """The content of an image or audio file, or else its name without the folder, which may differ next time."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["bytes"] or os.path.basename(value["path"] or "")
    return value


def _seeded_examples(dataset: Dataset, indices: Sequence[int]) -> list[Any]:
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    return [dataset[int(index)] for index in indices]


def _rows_digest(rows: Sequence[Any]) -> str:
    return _digest(json.dumps(rows, sort_keys=True, default=_plain).encode())


def _plain(value: Any) -> Any:
    """The content of a value in a form that JSON can represent."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        return [str(value.dtype), list(value.shape), _digest(flat.view(torch.uint8).numpy().tobytes())]
    if isinstance(value, bytes):
        return _digest(value)
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "__array_interface__"):  # a numpy array or an image
        array = np.asarray(value)
        return (
            array.tolist() if array.dtype.hasobject else [array.dtype.str, list(array.shape), _digest(array.tobytes())]
        )
    return stable_text(value)


def stable_text(value: Any) -> str:
    """
    Args:
        value (`Any`): Anything.

    Returns:
        `str`: Its text if that is the same in every process, otherwise the name of its class.
    """
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text  # the memory address differs every time


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
