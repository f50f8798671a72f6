"""Partitions that are objects with the interface of flwr-datasets' `Partitioner`."""

import copy
import dataclasses
import json
import multiprocessing
import pickle
import threading
from abc import ABC, abstractmethod
from multiprocessing.reduction import ForkingPickler

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_ravan.trainers import FederatedArguments, FederatedTrainer, federated, federated_arguments, make_clients

from ..conftest import classification_dataset, tiny_bert


class Partitioner(ABC):
    """Has the attributes and errors of flwr-datasets' Partitioner, which is incompatible with datasets 5."""

    def __init__(self):
        self._dataset = None

    @property
    def dataset(self):
        if self._dataset is None:
            raise AttributeError("The dataset field should be set before using it")
        return self._dataset

    @dataset.setter
    def dataset(self, value):
        if self._dataset is not None:
            raise ValueError("The dataset should be assigned only once to the partitioner.")
        if not isinstance(value, datasets.Dataset):
            raise TypeError("The dataset object you want to assign should be of type `datasets.Dataset`")
        self._dataset = value

    @abstractmethod
    def load_partition(self, partition_id): ...

    @property
    @abstractmethod
    def num_partitions(self): ...


class LinearPartitioner(Partitioner):
    """Sizes proportional to 1, 2, 3, ... As in flwr-datasets, the number is known only with the data."""

    def __init__(self, num_partitions, first=1):
        super().__init__()
        self._num_partitions, self._first = num_partitions, first
        self.lock = threading.Lock()  # cannot be copied or pickled

    @property
    def num_partitions(self):
        assert len(self.dataset) > 0
        return self._num_partitions

    def load_partition(self, partition_id):
        starts = [0]
        for index in range(self._num_partitions):
            starts.append(starts[-1] + index + self._first)
        unit = len(self.dataset) // starts[-1]
        return self.dataset.select(range(unit * starts[partition_id], unit * starts[partition_id + 1]))


def labelled(num_examples: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"label": [index % 2 for index in range(num_examples)]})


def args(partitioner, **kwargs) -> FederatedArguments:
    return FederatedArguments("out", partition=partitioner, **kwargs)


def test_its_partitions_are_the_clients():
    clients = make_clients(labelled(60), args(LinearPartitioner(3)))
    assert {name: len(dataset) for name, dataset in clients.items()} == {
        "client_0": 10,
        "client_1": 20,
        "client_2": 30,
    }


def test_the_same_data_can_be_split_again():
    arguments, dataset = args(LinearPartitioner(3)), labelled(60)
    first, second = make_clients(dataset, arguments), make_clients(dataset, arguments)
    assert [client["label"][:] for client in first.values()] == [client["label"][:] for client in second.values()]


def test_a_class_without_a_base_will_do():
    class Halves:
        num_partitions = 2

        def load_partition(self, partition_id):
            return torch.utils.data.Subset(self.dataset, range(partition_id, len(self.dataset), 2))

    clients = make_clients(torch.utils.data.TensorDataset(torch.arange(7)), args(Halves()))
    assert [len(client) for client in clients.values()] == [4, 3]


def test_what_is_written_of_the_arguments_has_the_name_of_its_class():
    partitioner = LinearPartitioner(3)
    arguments = args(partitioner, num_clients=3)
    partitioner.dataset = labelled(60)
    assert arguments.to_dict()["partition"] == "LinearPartitioner"
    assert json.loads(arguments.to_json_string())["partition"] == "LinearPartitioner"
    assert arguments.to_sanitized_dict()["partition"] == "LinearPartitioner"
    assert "partition=LinearPartitioner,\n" in str(arguments) and "partition=LinearPartitioner,\n" in repr(arguments)
    loaded = pickle.loads(pickle.dumps(arguments))
    assert loaded.partition == "LinearPartitioner" and loaded.num_clients == 3
    assert arguments.partition is partitioner


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, dataclasses.replace])
def test_copies_have_the_object_itself(copy_of):
    arguments = args(LinearPartitioner(3), merge_options={"scale": 1.0})
    copied = copy_of(arguments)
    assert copied is not arguments and copied.partition is arguments.partition
    assert copied.to_dict() == arguments.to_dict()


def test_a_federation_is_trained_saved_and_described(tmp_path):
    arguments = args(
        LinearPartitioner(3), num_rounds=1, max_steps=1, save_strategy="epoch", report_to="none", disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    arguments.output_dir = str(tmp_path)
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, task_type="SEQ_CLS"))
    trainer = FederatedTrainer(model, arguments, train_dataset=classification_dataset(60))
    trainer.train()
    trainer.save_model()
    assert trainer.state.log_history[0]["num_examples"] == 60
    assert "| Data of the clients | by a LinearPartitioner |" in (tmp_path / "README.md").read_text()
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.partition == "LinearPartitioner"
    assert trainer.partition_table()["examples"].tolist() == [10, 20, 30]


def secret_arguments(arguments_class, folder):
    return arguments_class(
        str(folder), hub_token="hf_mine", num_clients=3, num_rounds=1, max_steps=1, save_strategy="epoch", use_cpu=True,
        report_to="none", disable_tqdm=True, privacy={"clip_norm": 1.0, "noise_multiplier": 1.0, "noise_seed": 987654321},
    )  # fmt: skip


class OtherArguments(TrainingArguments):
    pass


@pytest.mark.parametrize("arguments_class", [FederatedArguments, federated_arguments(OtherArguments)])
def test_what_is_written_of_the_arguments_has_no_secrets(tmp_path, arguments_class):
    arguments = secret_arguments(arguments_class, tmp_path)
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, task_type="SEQ_CLS"))
    trainer = federated(Trainer)(model, arguments, train_dataset=classification_dataset(60))
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        for secret in (b"hf_mine", b"987654321", pickle.dumps(987654321)[2:-1]):
            assert secret not in written
        saved = torch.load(folder / "training_args.bin", weights_only=False)
        assert type(saved) is arguments_class and saved.hub_token is None and saved.privacy["noise_seed"] is None
        assert saved.max_steps == 1
    assert trainer.args.hub_token == "hf_mine" and trainer.args.privacy["noise_seed"] == 987654321


def test_copies_and_processes_have_the_secrets(tmp_path, monkeypatch):
    arguments = secret_arguments(FederatedArguments, tmp_path)
    # what `multiprocessing` does when it starts a process, which would have to import everything anew
    monkeypatch.setattr(multiprocessing.context._tls, "spawning_popen", object(), raising=False)
    sent = bytes(ForkingPickler.dumps(arguments))
    monkeypatch.undo()
    copies = (copy.copy(arguments), copy.deepcopy(arguments), dataclasses.replace(arguments), pickle.loads(sent))
    for copied in copies:
        assert copied.hub_token == "hf_mine" and copied.privacy["noise_seed"] == 987654321


def tell(arguments, queue):
    queue.put((arguments.hub_token, arguments.privacy["noise_seed"]))


@pytest.mark.deep
def test_a_process_that_is_started_has_the_secrets(tmp_path):
    arguments = secret_arguments(FederatedArguments, tmp_path)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=tell, args=(arguments, queue), daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert queue.get() == ("hf_mine", 987654321)


@pytest.mark.parametrize(
    "value", [LinearPartitioner, object(), None, 3, ["iid"]], ids=lambda value: type(value).__name__
)
def test_what_is_no_partitioner_is_refused(value):
    with pytest.raises(ValueError, match="or an object with `load_partition` and `num_partitions`"):
        args(value)


def test_errors_name_the_partitioner():
    partitioner = LinearPartitioner(3)
    make_clients(labelled(60), args(partitioner))
    with pytest.raises(ValueError, match="The LinearPartitioner in `partition` has another data set than"):
        make_clients(labelled(60), args(partitioner))
    with pytest.raises(ValueError, match="gives partition 0 of 3 no examples, but every client needs at least one"):
        make_clients(labelled(60), args(LinearPartitioner(3, first=0)))
    with pytest.raises(ValueError, match="`num_clients` is 5, but the data has 3 clients"):
        make_clients(labelled(60), args(LinearPartitioner(3), num_clients=5))
