import datasets
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from peft_ravan.trainers import FederatedArguments, make_clients
from peft_ravan.trainers.partition import partition_indices


def labelled(labels, **columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"x": list(range(len(labels))), "label": list(labels), **columns})


def args(**kwargs) -> FederatedArguments:
    return FederatedArguments("out", **kwargs)


@settings(deadline=None, max_examples=30)
@given(
    num_examples=st.integers(40, 200),
    num_clients=st.integers(1, 10),
    num_labels=st.integers(1, 5),
    partition=st.sampled_from(["iid", "dirichlet"]),
    alpha=st.floats(0.3, 10),
    seed=st.integers(0, 2**31),
)
def test_every_example_goes_to_exactly_one_client(num_examples, num_clients, num_labels, partition, alpha, seed):
    dataset = labelled(np.arange(num_examples) % num_labels)
    arguments = args(num_clients=num_clients, partition=partition, partition_alpha=alpha, federated_seed=seed)
    parts = partition_indices(dataset, arguments)
    assert len(parts) == num_clients and min(len(part) for part in parts.values()) > 0
    assert sorted(np.concatenate(list(parts.values()))) == list(range(num_examples))
    again = partition_indices(dataset, arguments)
    assert all(np.array_equal(parts[name], again[name]) for name in parts)


def test_iid_parts_are_equal_and_mixed():
    parts = partition_indices(labelled([0] * 50 + [1] * 50), args(num_clients=4))
    assert [len(part) for part in parts.values()] == [25] * 4
    assert all(0 < (part < 50).sum() < 25 for part in parts.values())


def test_the_smaller_alpha_the_more_clients_differ():
    dataset = labelled(np.arange(2000) % 10)

    def mean_share_of_the_commonest_label(alpha):
        parts = partition_indices(dataset, args(num_clients=10, partition="dirichlet", partition_alpha=alpha))
        return np.mean([np.bincount(part % 10).max() / len(part) for part in parts.values()])

    assert mean_share_of_the_commonest_label(1000.0) == pytest.approx(0.1, abs=0.03)
    assert mean_share_of_the_commonest_label(0.1) > 0.4


def test_another_seed_gives_another_partition():
    dataset = labelled(np.arange(100) % 3)
    first, second = (partition_indices(dataset, args(num_clients=2, federated_seed=seed)) for seed in (1, 2))
    assert not np.array_equal(first["client_0"], second["client_0"])


def test_by_column():
    dataset = labelled([0, 1, 0, 1], hospital=["north", "south", "south", "north"])
    clients = make_clients(dataset, args(partition="column", partition_column="hospital"))
    assert {name: client["x"][:] for name, client in clients.items()} == {"north": [0, 3], "south": [1, 2]}


def test_class_labels_name_the_clients():
    dataset = labelled([1, 0, 1]).cast_column("label", datasets.ClassLabel(names=["bank", "travel"]))
    clients = make_clients(dataset, args(partition="column", partition_column="label"))
    assert {name: client["x"][:] for name, client in clients.items()} == {"bank": [1], "travel": [0, 2]}


def test_torch_datasets_are_split_too():
    class Squares(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, index):
            return {"x": index**2, "labels": index % 3}

    clients = make_clients(Squares(), args(num_clients=3, partition="dirichlet"))
    values = sorted(client[index]["x"] for client in clients.values() for index in range(len(client)))
    assert values == [index**2 for index in range(30)]


def test_clients_that_are_given_are_kept():
    given_clients = {"b": labelled([0, 1]), "a": labelled([1])}
    assert make_clients(given_clients, args()) == given_clients


def stream():
    yield {"label": 0}


@pytest.mark.parametrize(
    "dataset, fields, message",
    [
        (labelled([0, 1]), {"num_clients": 3}, "2 examples cannot be split among num_clients=3"),
        (labelled([0, 1]), {"partition": "column"}, "needs `partition_column`"),
        (
            labelled([0] * 9),
            {"num_clients": 2, "partition": "dirichlet", "partition_column": "y"},
            "names 'y', but the",
        ),
        (
            labelled([0] * 9).rename_column("label", "intent"),
            {"num_clients": 2, "partition": "dirichlet"},
            "none of the columns .'label', 'labels'.. Name the column in `partition_column`",
        ),
        (
            labelled([0] * 20),
            {"num_clients": 20, "partition": "dirichlet", "partition_alpha": 0.01},
            "No Dirichlet split",
        ),
        ({"ward": labelled([])}, {}, "client 'ward' has no training examples"),
        ({}, {}, "has no clients"),
        ({"ward": labelled([0])}, {"num_clients": 2}, "`num_clients` is 2, but the data has 1 clients"),
        ({"ward": labelled([0])}, {"clients_per_round": 2}, "`clients_per_round` is 2, but there are only 1 clients"),
        (
            datasets.IterableDataset.from_generator(stream),
            {},
            "cannot be split among clients. Pass `train_dataset` as a dict",
        ),
    ],
)
def test_what_cannot_be_split_is_told(dataset, fields, message):
    with pytest.raises(ValueError, match=message):
        make_clients(dataset, args(**fields))
