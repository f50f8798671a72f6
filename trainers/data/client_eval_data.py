"""The evaluation data of each client: its own data, or its part of one evaluation set."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
from torch.utils.data import Dataset
from transformers.trainer_utils import has_length

from ..seeds import derive_seed
from .checks import check_client_names
from .columns import find_label_column, read_labels
from .partition import ClientParts, PartitionSettings, partition_indices
from .preparation import given_clients


def make_client_eval_datasets(
    eval_dataset: Dataset | Mapping[str, Dataset], clients: Mapping[str, Dataset], settings: PartitionSettings
) -> Mapping[str, Dataset]:
    """
    Split an evaluation set among clients in the same way as their training data, or check data that comes by client.

    With `partition="column"` a client gets the examples that the column assigns to it. Otherwise the examples of each
    label are distributed by the method of largest remainders, in proportion to the number of training examples with
    this label that each client has. Each client is thus evaluated on about the labels that it trains on. Examples of a
    label that no client trains on are left out. Without labels, the examples are distributed in proportion to the
    number of training examples.

    Args:
        eval_dataset (`Dataset` or `Mapping[str, Dataset]`):
            One data set with a length, or client names to data sets.
        clients (`Mapping[str, Dataset]`):
            Client names to training sets.
        settings ([`PartitionSettings`]):
            How the training data is split.

    Returns:
        `Mapping[str, Dataset]`: Client names to data sets, in the order of `clients`, without clients that have no
        example.

    Raises:
        ValueError: if a name does not belong to a client, the data has no length, or no client has an example.
    """
    if isinstance(eval_dataset, Mapping):
        parts = _given(eval_dataset, clients)
    elif not has_length(eval_dataset):
        raise ValueError(
            f"A {type(eval_dataset).__name__} without a length cannot be split among clients. Pass `client_eval_dataset` "
            "as a dict of client name -> dataset."
        )
    else:
        indices = _indices(eval_dataset, given_clients(clients), settings)
        parts = ClientParts(eval_dataset, {client: indices[client] for client in clients if len(indices[client])})
    if not parts:
        raise ValueError("No client has an example to be evaluated on. Give `client_eval_dataset` more examples.")
    if len(parts) < len(clients):
        warnings.warn(f"{len(clients) - len(parts)} of {len(clients)} clients have no examples to be evaluated on.")
    return parts


def _given(datasets: Mapping[str, Dataset], clients: Mapping[str, Dataset]) -> dict[str, Dataset]:
    check_client_names(datasets, "client_eval_dataset")
    given = dict(datasets)
    unknown = [name for name in given if name not in clients]
    if unknown:
        raise ValueError(
            f"`client_eval_dataset` names {unknown[0]!r}, which is none of the {len(clients)} clients, such as "
            f"{next(iter(clients))!r}. Its names must be those of clients."
        )
    has_some = {name for name, dataset in given.items() if not has_length(dataset) or len(dataset)}
    return {client: given[client] for client in clients if client in has_some}


def _indices(
    dataset: Dataset, clients: Mapping[str, Dataset], settings: PartitionSettings
) -> Mapping[str, np.ndarray]:
    nothing = np.empty(0, dtype=int)
    if settings.partition == "column" and isinstance(clients, ClientParts):
        by_client = partition_indices(dataset, settings)
        return {client: by_client.get(client, nothing) for client in clients}
    rng = np.random.default_rng(derive_seed(settings.seed, "client_eval_dataset"))
    labels, counts = _labels_and_counts(dataset, clients, settings)
    parts = {client: [nothing] for client in clients}
    for label in counts.columns:
        examples = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(largest_remainders(counts[label].to_numpy(), len(examples)))[:-1]
        for client, part in zip(counts.index, np.split(examples, cuts), strict=True):
            parts[client].append(part)
    return {client: np.sort(np.concatenate(part)) for client, part in parts.items()}


def _labels_and_counts(
    dataset: Dataset, clients: Mapping[str, Dataset], settings: PartitionSettings
) -> tuple[np.ndarray, pd.DataFrame]:
    """
    The label of each example, and the number of training examples by client and label. Data without labels is treated
    as having a single one.
    """
    column = find_label_column(dataset)
    if settings.is_by_label and isinstance(clients, ClientParts):
        column = settings.column or column
    if column is not None and all(map(has_length, clients.values())):
        # a column that was not asked for may have several labels per example, or be missing in the training data
        with contextlib.suppress(ValueError):
            labels = read_labels(dataset, column)
            counts = {client: pd.Series(read_labels(part, column)).value_counts() for client, part in clients.items()}
            return labels, pd.DataFrame(counts).T.fillna(0).astype(int)
    sizes = [len(part) if has_length(part) else 1 for part in clients.values()]
    return np.zeros(len(dataset), dtype=int), pd.DataFrame({0: sizes}, index=list(clients))


def largest_remainders(weights: np.ndarray, total: int) -> np.ndarray:
    """
    Distribute a number of items by the method of largest remainders (Hamilton).

    Args:
        weights (`np.ndarray`): The weights that the shares are proportional to, `[shares]`.
        total (`int`): The number of items.

    Returns:
        `np.ndarray`: Integers, `[shares]`, that add up to the total. Each is the exact share, rounded up or down.
    """
    exact = weights * total / weights.sum()
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    return shares
