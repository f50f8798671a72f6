"""
Splitting one data set among clients.

flwr-datasets has these partitioners and more, but its releases up to 0.6.1 exclude datasets 5, so the three that are
needed here are written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from torch.utils.data import Dataset, Subset
from transformers.trainer_utils import has_length

from .rounds import derive_seed


if TYPE_CHECKING:
    from .arguments import FederatedArguments


PARTITIONS = ("iid", "dirichlet", "column")
LABEL_COLUMNS = ("label", "labels")
DEFAULT_NUM_CLIENTS = 10
# a draw that leaves a client without data is thrown away, as flwr-datasets and the papers do
MAX_DIRICHLET_DRAWS = 1000


def make_clients(train_dataset: Dataset | Mapping[str, Dataset], args: FederatedArguments) -> dict[str, Dataset]:
    """
    Split a training set among clients, or check clients that are given.

    Args:
        train_dataset (`Dataset` or `Mapping[str, Dataset]`):
            One data set with a length, or client names to data sets.
        args ([`FederatedArguments`]):
            The arguments, of which `partition`, `partition_alpha`, `partition_column`, `num_clients` and
            `federated_seed` are read.

    Returns:
        `dict[str, Dataset]`: Client names to data sets, none of them empty.

    Raises:
        ValueError: if a client has no data, if the data cannot be split that way, or if there are fewer clients than
            `clients_per_round`.
    """
    if isinstance(train_dataset, Mapping):
        clients = {str(name): dataset for name, dataset in train_dataset.items()}
    elif not has_length(train_dataset):
        raise ValueError(
            f"A {type(train_dataset).__name__} without a length cannot be split among clients. Pass `train_dataset` as a "
            "dict of client name -> dataset instead."
        )
    else:
        parts = partition_indices(train_dataset, args)
        clients = {name: _select(train_dataset, indices) for name, indices in parts.items()}
    _check_clients(clients, args)
    return clients


def partition_indices(dataset: Dataset, args: FederatedArguments) -> dict[str, np.ndarray]:
    """
    Decide which example goes to which client.

    Args:
        dataset (`Dataset`): A data set with a length.
        args ([`FederatedArguments`]): The arguments, as for [`make_clients`].

    Returns:
        `dict[str, np.ndarray]`: Client names to the indices of their examples. Every index is in exactly one of them.

    Raises:
        ValueError: if the data cannot be split that way.
    """
    rng = np.random.default_rng(derive_seed(args.federated_seed, "partition"))
    if args.partition == "column":
        if args.partition_column is None:
            raise ValueError("`partition='column'` needs `partition_column`, the column that names the client.")
        return _by_column(dataset, args.partition_column)

    num_clients = args.num_clients or DEFAULT_NUM_CLIENTS
    if num_clients > len(dataset):
        raise ValueError(
            f"{len(dataset)} examples cannot be split among num_clients={num_clients}: every client needs at least one. "
            "Use fewer clients."
        )
    if args.partition == "iid":
        parts = np.array_split(rng.permutation(len(dataset)), num_clients)
    else:
        column = args.partition_column or _label_column(dataset)
        parts = _dirichlet(np.asarray(_column(dataset, column)), num_clients, args.partition_alpha, rng)
    digits = len(str(num_clients - 1))
    return {f"client_{index:0{digits}d}": part for index, part in enumerate(parts)}


def _dirichlet(labels: np.ndarray, num_clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Split each label by proportions drawn from a Dirichlet distribution (Hsu et al., 2019, arXiv 1909.06335)."""
    by_label = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(MAX_DIRICHLET_DRAWS):
        parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
        for indices in by_label:
            proportions = rng.dirichlet(np.full(num_clients, alpha))
            cuts = (np.cumsum(proportions)[:-1] * len(indices)).astype(int)
            for part, chunk in zip(parts, np.split(rng.permutation(indices), cuts), strict=True):
                part.append(chunk)
        merged = [np.concatenate(part) for part in parts]
        if min(len(part) for part in merged) > 0:
            return [rng.permutation(part) for part in merged]
    raise ValueError(
        f"No Dirichlet split of {len(labels)} examples with {len(by_label)} labels gave each of {num_clients} clients an "
        f"example, in {MAX_DIRICHLET_DRAWS} draws with partition_alpha={alpha}. Use fewer clients or a larger alpha."
    )


def _by_column(dataset: Dataset, column: str) -> dict[str, np.ndarray]:
    values = _column(dataset, column)
    feature = dataset.features.get(column) if isinstance(dataset, datasets.Dataset) else None
    if isinstance(feature, datasets.ClassLabel):
        values = feature.int2str([int(value) for value in values])
    names = np.asarray([str(value) for value in values])
    return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}


def _column(dataset: Dataset, column: str) -> Sequence[Any]:
    if isinstance(dataset, datasets.Dataset):
        if column not in dataset.column_names:
            raise ValueError(
                f"`partition_column` names {column!r}, but the training set has the columns {dataset.column_names}."
            )
        return list(dataset.with_format(None)[column])
    try:
        return [dataset[index][column] for index in range(len(dataset))]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"`partition_column` names {column!r}, but the examples of {type(dataset).__name__} have no such entry."
        ) from error


def _label_column(dataset: Dataset) -> str:
    names = dataset.column_names if isinstance(dataset, datasets.Dataset) else dataset[0]
    for column in LABEL_COLUMNS:
        if column in names:
            return column
    raise ValueError(
        f"`partition='dirichlet'` needs the labels, but the training set has none of the columns {LABEL_COLUMNS}. Name the "
        "column in `partition_column`."
    )


def _select(dataset: Dataset, indices: np.ndarray) -> Dataset:
    return dataset.select(indices) if isinstance(dataset, datasets.Dataset) else Subset(dataset, indices.tolist())


def _check_clients(clients: Mapping[str, Dataset], args: FederatedArguments) -> None:
    if not clients:
        raise ValueError("`train_dataset` has no clients: pass at least one client name with its data set.")
    for name, dataset in clients.items():
        if has_length(dataset) and len(dataset) == 0:
            raise ValueError(f"client {name!r} has no training examples. Leave it out of `train_dataset`.")
    if args.num_clients is not None and args.num_clients != len(clients):
        raise ValueError(
            f"`num_clients` is {args.num_clients}, but the data has {len(clients)} clients. Leave `num_clients` out when "
            "the data comes by client."
        )
    if args.clients_per_round is not None and args.clients_per_round > len(clients):
        raise ValueError(
            f"`clients_per_round` is {args.clients_per_round}, but there are only {len(clients)} clients."
        )
