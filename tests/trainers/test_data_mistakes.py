"""Mistakes in the data are reported before the first round, or once for all clients, not as failures of clients."""

import datasets
import numpy as np
import pytest
import torch
from transformers import Trainer

from peft_ravan.trainers import FederatedArguments, RoundFailedError, federated, make_clients

from ..conftest import NUM_LABELS, classification_dataset
from .helpers import make_trainer


def args(**kwargs) -> FederatedArguments:
    return FederatedArguments("out", **kwargs)


def relabelled(change, num_examples=40) -> datasets.Dataset:
    data = classification_dataset(num_examples)
    labels = [change(index, label) for index, label in enumerate(data["labels"])]
    return data.remove_columns("labels").add_column("labels", labels)


# ---- Which client has which data --------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_data_sets_is_reported(kind):
    parts = kind(classification_dataset(20, seed) for seed in range(2))
    with pytest.raises(
        ValueError, match=f"is a {kind.__name__} of 2 data sets. Pass a dict of client name -> data set"
    ):
        make_clients(parts, args())


def test_a_list_of_examples_is_one_data_set():
    assert len(make_clients([{"x": index} for index in range(20)], args(num_clients=4))) == 4


def test_splits_are_no_clients():
    splits = datasets.DatasetDict(train=classification_dataset(20), test=classification_dataset(20, 1))
    with pytest.raises(ValueError, match="DatasetDict with the splits 'train', 'test', which would become clients"):
        make_clients(splits, args())
    assert set(make_clients(dict(splits), args())) == {"train", "test"}
    assert set(make_clients(datasets.DatasetDict(north=splits["train"], south=splits["test"]), args())) == {
        "north",
        "south",
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["north", ""], "A client in `train_dataset` has the name '', which nobody could read"),
        (["north", " \n"], "has the name ' "),
        ([1, "1"], r"must be strings, got 1 \(int\). Names that are alike as text would be one client"),
        ([0, 1], r"must be strings, got 0 \(int\)"),
        ([None], "must be strings, got None"),
    ],
)
def test_names_of_clients_are_strings(names, message):
    with pytest.raises(ValueError, match=message):
        make_clients({name: classification_dataset(8) for name in names}, args())


@pytest.mark.parametrize("nobody", ["", None, "  "])
def test_a_column_with_missing_client_names_is_refused(nobody):
    data = datasets.Dataset.from_dict({"site": ["north", "south", nobody, "north"], "x": [1, 2, 3, 4]})
    with pytest.raises(ValueError, match="for every example, but 1 of 4 have none in 'site'"):
        make_clients(data, args(partition="column", partition_column="site"))


def test_names_of_clients_to_evaluate_are_strings(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="names of clients in `client_eval_dataset` must be strings, got 0"):
        trainer.evaluate_clients({0: classification_dataset(8)})


# ---- Labels ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda index, label: label + 1,
            f"have the label {NUM_LABELS} in 'labels', but `num_labels` of the model is 4",
        ),
        (lambda index, label: -1 if index == 7 else label, "have the label -1 in 'labels', but .* labels are 0 to 3"),
        (
            lambda index, label: None if index < 3 else label,
            "3 of 40 examples have no label in 'labels'. Leave them out",
        ),
    ],
)
def test_labels_that_the_model_does_not_have_are_refused_before_the_first_round(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, train_dataset=relabelled(change))
    clients = {"north": classification_dataset(8), "south": relabelled(change)}
    where = message.replace("have the", "of client 'south' have the").replace("have no", "of client 'south' have no")
    with pytest.raises(ValueError, match=where):
        make_trainer(tmp_path, train_dataset=clients, num_clients=None)


def test_labels_that_the_loss_leaves_out_are_no_mistake(tmp_path):
    make_trainer(
        tmp_path, train_dataset=relabelled(lambda index, label: -100 if index < 3 else label), max_steps=1
    ).train()


@pytest.mark.parametrize("own", ["loss", "function", "collator"])
def test_custom_labels_are_not_checked(tmp_path, own):
    class Shifted(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return super().compute_loss(model, {**inputs, "labels": inputs["labels"] - 1}, **kwargs)

    def collate(examples):
        batch = {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}
        return {**batch, "labels": batch["labels"] - 1}

    def compute_loss(outputs, labels, **kwargs):
        return torch.nn.functional.cross_entropy(outputs.logits, labels - 1)

    options = {"function": {"compute_loss_func": compute_loss}, "collator": {"data_collator": collate}}.get(own, {})
    trainer_class = federated(Shifted if own == "loss" else Trainer)
    base = make_trainer(tmp_path, max_steps=1, num_rounds=1)
    data = relabelled(lambda index, label: label + 1)
    trainer_class(base.model, base.args, train_dataset=data, **options).train()


def test_numbers_are_no_classes(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, num_rounds=1)
    trainer.model.config.problem_type = "regression"
    trainer.model.config.num_labels = 1
    data = classification_dataset(40).cast_column("labels", datasets.Value("float32"))
    federated(Trainer)(trainer.model, trainer.args, train_dataset=data)


# ---- What can only be found by training --------------------------------------------------


@pytest.mark.parametrize("clients_per_round", [None, 1, 3])
def test_an_error_that_all_clients_have_is_reported_once(tmp_path, clients_per_round):
    trained = []

    class Loss(torch.nn.Module):
        def forward(self, outputs, labels, **kwargs):
            trained.append(1)
            raise IndexError("Target 7 is out of bounds.")

    base = make_trainer(tmp_path, clients_per_round=clients_per_round, num_clients=5, max_round_attempts=3)
    trainer = federated(Trainer)(
        base.model, base.args, train_dataset=classification_dataset(40), compute_loss_func=Loss()
    )
    tried = {None: 5, 1: 2, 3: 3}[clients_per_round]
    message = f"Round 1: all {tried} clients that have tried failed with the same error, .* not repeated. .* IndexError: Target 7"
    with pytest.raises(RoundFailedError, match=message) as caught:
        trainer.train()
    assert isinstance(caught.value.__cause__, IndexError) and len(trained) == tried
    assert "attempts" not in str(caught.value)


def test_data_without_labels_is_reported_once(tmp_path):
    with pytest.raises(RoundFailedError, match="same error, .* did not return a loss"):
        make_trainer(tmp_path, train_dataset=classification_dataset(40).remove_columns("labels")).train()


def fails_with(*errors):
    def client_fault(client, round_number, update):
        number = int(client[-1])
        if number < len(errors) and errors[number] is not None:
            raise errors[number]

    return client_fault


@pytest.mark.parametrize(
    "errors",
    [
        [ValueError("a"), TypeError("b"), ValueError("c"), ValueError("d")],  # not of one kind
        [OSError("no network")] * 4,  # which may pass
        [RuntimeError("out of paper")] * 4,
    ],
)
def test_other_failures_are_tried_again(tmp_path, errors):
    trainer = make_trainer(tmp_path, client_fault=fails_with(*errors), max_steps=1, max_round_attempts=2)
    with pytest.raises(RoundFailedError, match="in each of 2 attempts"):
        trainer.train()


def test_a_client_with_other_data_may_succeed(tmp_path):
    """Once a client has succeeded, errors count as failures of clients."""

    def client_fault(client, round_number, update):
        if round_number == 2:
            raise ValueError("a bad example")

    trainer = make_trainer(tmp_path, client_fault=client_fault, max_steps=1, max_round_attempts=2)
    with pytest.raises(RoundFailedError, match="Round 2: .* in each of 2 attempts"):
        trainer.train()
    one = make_trainer(
        tmp_path, client_fault=fails_with(ValueError("a bad example")), max_steps=1, clients_per_round=1
    )
    one.train()
    assert np.mean([len(record["clients"]) for record in one.state.log_history]) == 1
