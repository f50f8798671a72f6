"""
Clients whose data is prepared by a trainer. The trainers of TRL tokenize, truncate and pack data, or compute the
log-probabilities of a reference model.

Those trainers do this once, for one training set. Here it is done for each client after the split, because the
preparation drops columns that the split may depend on, and packing would mix examples of several clients. A client's
data is prepared when the client takes part for the first time, since only some of the clients train in each round.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import datasets
from torch.utils.data import Dataset
from transformers.trainer_utils import has_length

from .partition import KeptParts


Preparation = Callable[[Dataset], Dataset]


class PreparedClients(KeptParts):
    """
    The data sets of clients, each prepared on first access.

    Args:
        clients (`Mapping[str, Dataset]`): Client names to data sets.
        preparations (`list[Callable[[Dataset], Dataset]]`): The functions that are applied to each of them, in order.
    """

    def __init__(self, clients: Mapping[str, Dataset], preparations: list[Preparation]):
        super().__init__(clients)
        self._preparations = preparations

    @property
    def given(self) -> Mapping[str, Dataset]:
        """The data sets before they are prepared."""
        return self._sources

    def _make(self, client: str) -> Dataset:
        dataset = self.given[client]
        with _no_progress_bars():  # there would be several for each client
            for prepare in self._preparations:
                dataset = prepare(dataset)
        if has_length(dataset) and len(dataset) == 0:
            raise ValueError(
                f"No example of client {client!r} is left by its preparation, which drops those that are cut off before "
                "there is anything to learn. Raise `max_length`, or leave the client out."
            )
        return dataset


def given_clients(clients: Mapping[str, Dataset]) -> Mapping[str, Dataset]:
    """
    Args:
        clients (`Mapping[str, Dataset]`): The data sets of clients, as a trainer has them.

    Returns:
        `Mapping[str, Dataset]`: The original data sets, before the trainer prepares them.
    """
    return clients.given if isinstance(clients, PreparedClients) else clients


class PreparationMixin:
    """
    Lets a trainer that prepares its training set prepare the data of each client instead. This covers the methods
    `_prepare_dataset` and `_precompute_ref_logps`, which the trainers of TRL have.
    """

    # the training and evaluation sets passed to the parent, while it is initialized
    _handed_dataset: Dataset | None = None
    _handed_eval_dataset: Dataset | None = None
    _preparations: list[Preparation] = []
    _eval_preparations: list[Preparation] = []

    def _prepare_dataset(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return self._prepare_by_client(super()._prepare_dataset, dataset, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return self._prepare_by_client(
            partial(self._in_evaluation_mode, super()._precompute_ref_logps), dataset, *args, **kwargs
        )

    def _prepare_by_client(self, prepare: Callable[..., Dataset], dataset: Dataset, *args, **kwargs) -> Dataset:
        def prepare_another(client_dataset: Dataset) -> Dataset:
            return prepare(client_dataset, *args, **kwargs)

        if self._handed_dataset is not None and dataset is self._handed_dataset:
            self._preparations = [*self._preparations, prepare_another]
            return dataset
        prepared = prepare_another(dataset)
        if self._handed_eval_dataset is not None and dataset is self._handed_eval_dataset:
            self._eval_preparations = [*self._eval_preparations, prepare_another]
            self._handed_eval_dataset = prepared  # which may be prepared further
        return prepared

    def _in_evaluation_mode(self, compute: Callable[..., Dataset], *args, **kwargs) -> Dataset:
        # as during the initialization of the trainer; between clients the model is in training mode
        training = self.model.training
        self.model.eval()
        try:
            return compute(*args, **kwargs)
        finally:
            self.model.train(training)

    def _prepared(self, clients: Mapping[str, Dataset]) -> Mapping[str, Dataset]:
        """The clients' data, prepared as by the parent. The first is prepared at once, so that errors come early."""
        if not self._preparations:
            return clients
        clients = PreparedClients(clients, self._preparations)
        clients[next(iter(clients))]
        return clients

    def _prepared_for_evaluation(self, datasets: Mapping[str, Dataset]) -> Mapping[str, Dataset]:
        """The clients' evaluation data, prepared as the parent prepares its evaluation set."""
        preparations = self._eval_preparations or self._preparations
        return PreparedClients(datasets, preparations) if preparations else datasets


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()


def one_dataset(given: Dataset | Mapping[str, Dataset]) -> Dataset:
    """
    The data set to pass to the trainer below as its training set. It is of a type that the trainer knows, and a copy,
    so that it can be told apart from other data sets.
    """
    first = next(iter(given.values())) if isinstance(given, Mapping) else given
    return copy.copy(first) if isinstance(first, (datasets.Dataset, datasets.IterableDataset)) else first


def by_name(trainer_class: type, mixin: type, positional: tuple) -> dict[str, Any]:
    """The positional arguments of the trainer below a mixin, by name."""
    below = trainer_class.__mro__[trainer_class.__mro__.index(mixin) + 1 :]
    names: list[str] = []
    for cls in [cls for cls in below if "__init__" in vars(cls)]:
        _, *parameters = inspect.signature(cls.__init__).parameters.values()
        names += [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD and p.name not in names]
        if not any(p.kind == p.VAR_POSITIONAL for p in parameters):  # otherwise it passes the others on
            break
    if len(positional) > len(names):
        raise TypeError(f"{trainer_class.__name__} takes {len(names)} arguments by position, got {len(positional)}.")
    return dict(zip(names, positional, strict=False))
