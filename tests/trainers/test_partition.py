import datasets
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from sklearn.datasets import load_digits

from peft_ravan.trainers import FederatedArguments, make_clients
from peft_ravan.trainers.data import partition
from peft_ravan.trainers.data.partition import partition_indices

from ..properties import examples


def labelled(labels, **columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"x": list(range(len(labels))), "label": list(labels), **columns})


def args(**kwargs) -> FederatedArguments:
    return FederatedArguments("out", **kwargs)


@examples(30)
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
    parts = partition_indices(dataset, arguments.partition_settings)
    assert len(parts) == num_clients and min(len(part) for part in parts.values()) > 0
    assert sorted(np.concatenate(list(parts.values()))) == list(range(num_examples))
    again = partition_indices(dataset, arguments.partition_settings)
    assert all(np.array_equal(parts[name], again[name]) for name in parts)


@examples(60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    num_clients=st.integers(1, 12),
    k=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_pathological_clients_have_at_most_k_labels(sizes, num_clients, k, seed):
    assume(k <= len(sizes) <= num_clients * k and num_clients <= sum(sizes))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(seed).shuffle(labels)
    parts = partition_indices(
        labelled(labels),
        args(
            num_clients=num_clients, partition="pathological", labels_per_client=k, federated_seed=seed
        ).partition_settings,
    )
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(labels)))
    label_counts = [len(set(labels[part])) for part in parts.values()]
    assert 1 <= min(label_counts) and max(label_counts) <= k
    # where there are examples enough, not fewer either
    if min(sizes) >= num_clients:
        assert set(label_counts) == {k}
    assert max(label_counts) - min(label_counts) <= 1


def test_pathological_on_digits_is_as_in_the_paper():
    """Real data: 1,797 digits, and two of them for each of 100 clients."""
    digits = load_digits().target
    arguments = args(num_clients=100, partition="pathological", labels_per_client=2)
    parts = partition_indices(labelled(digits), arguments.partition_settings)
    assert all(len(set(digits[part])) == 2 for part in parts.values())
    sizes = [len(part) for part in parts.values()]
    assert sum(sizes) == 1797 and 15 <= min(sizes) <= max(sizes) <= 20
    pairs = {tuple(sorted(set(digits[part]))) for part in parts.values()}
    assert len(pairs) > 15  # of 45; the pairs are random
    again = partition_indices(labelled(digits), arguments.partition_settings)
    other = partition_indices(
        labelled(digits), args(num_clients=100, partition="pathological", federated_seed=1).partition_settings
    )
    assert all(np.array_equal(parts[name], again[name]) for name in parts)
    assert not all(np.array_equal(parts[name], other[name]) for name in parts)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological"])
def test_a_partition_does_not_depend_on_what_was_drawn_before(partition):
    dataset, arguments = labelled(np.arange(60) % 3), args(num_clients=4, partition=partition)
    first = partition_indices(dataset, arguments.partition_settings)
    np.random.seed(1), np.random.random(5), torch.manual_seed(1)
    second = partition_indices(dataset, arguments.partition_settings)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_labels_of_every_kind():
    class Tensors(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return {"labels": torch.tensor(index % 3)}

    for dataset in (Tensors(), labelled(list("abc") * 4), labelled([0.5, -1.0, 2.0] * 4)):
        clients = make_clients(dataset, args(num_clients=3, partition="pathological", labels_per_client=1))
        assert [len(client) for client in clients.values()] == [4, 4, 4]


def test_iid_parts_are_equal_and_mixed():
    parts = partition_indices(labelled([0] * 50 + [1] * 50), args(num_clients=4).partition_settings)
    assert [len(part) for part in parts.values()] == [25] * 4
    assert all(0 < (part < 50).sum() < 25 for part in parts.values())


def test_the_smaller_alpha_the_more_clients_differ():
    dataset = labelled(np.arange(2000) % 10)

    def mean_share_of_the_commonest_label(alpha):
        parts = partition_indices(
            dataset, args(num_clients=10, partition="dirichlet", partition_alpha=alpha).partition_settings
        )
        return np.mean([np.bincount(part % 10).max() / len(part) for part in parts.values()])

    assert mean_share_of_the_commonest_label(1000.0) == pytest.approx(0.1, abs=0.03)
    assert mean_share_of_the_commonest_label(0.1) > 0.4


def test_another_seed_gives_another_partition():
    dataset = labelled(np.arange(100) % 3)
    first, second = (
        partition_indices(dataset, args(num_clients=2, federated_seed=seed).partition_settings) for seed in (1, 2)
    )
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


def test_parts_are_made_when_they_are_asked_for(monkeypatch):
    made = []
    monkeypatch.setattr(partition, "_select", lambda dataset, indices: made.append(len(indices)) or list(indices))
    monkeypatch.setattr(partition, "MAX_KEPT_PARTS", 2)
    clients = make_clients(labelled([0] * 12), args(num_clients=4, clients_per_round=2))
    assert list(clients) == [f"client_{index}" for index in range(4)] and len(clients) == 4
    assert "client_0" in clients and "client_4" not in clients
    assert [clients.num_examples(name) for name in clients] == [3, 3, 3, 3]
    assert made == []
    assert clients["client_0"] is clients["client_0"] and made == [3]
    first = clients["client_0"]
    assert sorted(index for part in clients.values() for index in part) == list(range(12))
    assert clients["client_0"] is not first and clients["client_0"] == first
    with pytest.raises(KeyError):
        clients["client_4"]


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
        (
            labelled([0, 1, 2] * 3),
            {"num_clients": 2, "partition": "pathological", "labels_per_client": 4},
            "`labels_per_client` is 4, but the training set has 3 labels",
        ),
        (
            labelled([0, 1, 2] * 3),
            {"num_clients": 2, "partition": "pathological", "labels_per_client": 1},
            "3 labels do not fit into 2 clients with labels_per_client=1",
        ),
        (
            labelled([[0, 1]] * 9),
            {"num_clients": 2, "partition": "pathological"},
            "'label' has a list of values for each example",
        ),
        (
            labelled([[0, 1]] * 9),
            {"num_clients": 2, "partition": "dirichlet"},
            "one number or string each. Name another column in `partition_column`",
        ),
        (
            labelled([0, None, 1] * 3),
            {"num_clients": 2, "partition": "pathological"},
            "needs a label for every example, but 3 of 9 have none in 'label'",
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
def test_what_cannot_be_split_is_refused(dataset, fields, message):
    with pytest.raises(ValueError, match=message):
        make_clients(dataset, args(**fields))
