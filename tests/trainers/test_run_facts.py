"""A resumed run reports what has changed: arguments, configurations, and the data of each client."""

import dataclasses
import random

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.utils.data import Dataset, Subset, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from peft_ravan.trainers import FederatedArguments, make_clients
from peft_ravan.trainers.data.fingerprint import MAX_EXAMPLES, MAX_ROWS, client_fingerprints
from peft_ravan.trainers.data.preparation import PreparedClients
from peft_ravan.trainers.run_facts import NOT_COMPARED, changes, run_facts

from ..conftest import classification_dataset, tiny_bert
from .helpers import adapter_state, interrupted, logged, lora, make_trainer, ravan, resumable_trainer


def facts(tmp_path, **kwargs):
    trainer = make_trainer(tmp_path, **kwargs)
    return run_facts(trainer.federation, adapter_state(trainer))


@pytest.mark.parametrize(
    "other, told",
    [
        ({"scaffold": True}, "scaffold (False, now True)"),
        ({"proximal_mu": 0.1}, "proximal_mu (0.0, now 0.1)"),
        ({"local_parameters": ["classifier"]}, "local_parameters (None, now ['classifier'])"),
        ({"participation_weights": "examples"}, "participation_weights (None, now 'examples')"),
        ({"optim": "sgd"}, "now 'sgd')"),
        ({"weight_decay": 0.1}, "weight_decay (0.0, now 0.1)"),
        ({"adam_beta1": 0.8}, "adam_beta1 (0.9, now 0.8)"),
        ({"max_grad_norm": 0.5}, "max_grad_norm (1.0, now 0.5)"),
        ({"bf16": True}, "bf16 (False, now True)"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor (0.0, now 0.1)"),
        ({"client_budgets": 0.5}, "client_budgets (None, now 0.5)"),
        ({"head_selection": "weight"}, "head_selection ('random', now 'weight')"),
        ({"server_optimizer": "fedadam"}, "server_optimizer (None, now 'fedadam')"),
        ({"merge_method": "fedrpca"}, "merge_method ('ravan', now 'fedrpca')"),
        ({"merge_method": "ravan"}, ""),  # the same as before
        ({"seed": 3, "federated_seed": 42}, "seed (42, now 3)"),
        ({"adapter": dataclasses.replace(ravan(), ravan_dropout=0.1)}, "adapter.ravan_dropout (0.0, now 0.1)"),
    ],
    ids=str,
)
def test_other_arguments_are_found(tmp_path, other, told):
    found = changes(facts(tmp_path), facts(tmp_path, **other))
    assert (told in ", ".join(found)) if told else not found
    assert all(len(change) < 250 for change in found)


def test_other_configurations_are_found(tmp_path):
    def with_lora(**kwargs):
        return LoraConfig(**{"r": 2, "task_type": "SEQ_CLS", "target_modules": {"query", "key", "value"}, **kwargs})

    config = {**tiny_bert().config.to_dict(), "hidden_dropout_prob": 0.2}
    model = BertForSequenceClassification(BertConfig(**config))
    before = facts(tmp_path, adapter=with_lora())
    assert not changes(before, facts(tmp_path, adapter=with_lora()))
    assert not changes(before, facts(tmp_path, adapter=with_lora(target_modules=["value", "query", "key"])))
    after = facts(tmp_path, adapter=with_lora(lora_dropout=0.1, lora_alpha=16), model=model)
    assert changes(before, after) == [
        "adapter.lora_alpha (8, now 16)",
        "adapter.lora_dropout (0.0, now 0.1)",
        "model.hidden_dropout_prob (0.0, now 0.2)",
    ]


def test_changes_that_do_not_affect_training_are_not_reported(tmp_path):
    other = {
        "report_to": "none", "logging_steps": 3, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2,
        "eval_strategy": "steps", "eval_steps": 2, "eval_clients": True, "per_device_eval_batch_size": 2,
        "dataloader_num_workers": 2, "dataloader_pin_memory": False, "disable_tqdm": False, "run_name": "another",
        "hub_model_id": "me/it", "hub_token": "hf_mine", "hub_lora_twin": False, "do_train": True, "ddp_timeout": 60,
    }  # fmt: skip
    assert not changes(facts(tmp_path), facts(tmp_path / "elsewhere", **other))


def test_every_argument_is_compared_but_those_that_are_named():
    pytest.importorskip("trl")
    from peft_ravan.trainers import FederatedDPOConfig, FederatedSFTConfig

    known = {
        field.name
        for arguments in (FederatedArguments, FederatedSFTConfig, FederatedDPOConfig)
        for field in dataclasses.fields(arguments)
    }
    assert not NOT_COMPARED - known  # names that do not exist would hide a mistake


def test_an_object_among_the_arguments_is_the_same_in_another_process(tmp_path):
    class Setting:
        pass

    first, second = (facts(tmp_path, lr_scheduler_kwargs={"setting": Setting()}) for _ in range(2))
    assert first["compared"]["lr_scheduler_kwargs"] and not changes(first, second)


def test_a_resumed_run_reports_changes(tmp_path, monkeypatch):
    options = {"max_steps": 1, "num_rounds": 3, "num_clients": None, "clients_per_round": None}
    data = {"north": classification_dataset(16), "south": classification_dataset(24, seed=1)}
    interrupted(tmp_path, 2, **options, train_dataset=data)
    warnings = logged(monkeypatch)
    other_data = {**data, "south": classification_dataset(24, seed=2)}
    resumed = resumable_trainer(
        tmp_path, **options, train_dataset=other_data, learning_rate=0.5, scaffold=True,
        adapter=dataclasses.replace(ravan(), ravan_dropout=0.1),
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=True)
    [warning] = warnings
    assert (
        "goes on with other arguments than" in warning and "checkpoint-2 was written with, and will differ" in warning
    )
    for change in (
        "learning_rate (0.01, now 0.5)",
        "scaffold (False, now True)",
        "adapter.ravan_dropout (0.0, now 0.1)",
        "the data of 'south'.",
    ):
        assert change in warning
    assert "north" not in warning and len(resumed.state.log_history) == 3


def test_a_resumed_run_without_changes_reports_nothing(tmp_path, monkeypatch):
    options = {"max_steps": 1, "adapter": lora(), "local_parameters": "classifier", "scaffold": True, "num_rounds": 2}
    interrupted(tmp_path, 1, **options)
    warnings = logged(monkeypatch)
    resumable_trainer(tmp_path, **options).train(resume_from_checkpoint=True)
    assert warnings == []


# ---- The data of each client -----------------------------------------------------


def parts(dataset, **kwargs):
    return make_clients(dataset, FederatedArguments("out", **{"num_clients": 4, **kwargs}))


def changed(first, second):
    then, now = client_fingerprints(first), client_fingerprints(second)
    assert then.keys() == now.keys() and None not in {*then.values(), *now.values()}
    return [client for client in now if then[client] != now[client]]


def test_the_same_data_is_the_same_however_it_came_about(tmp_path):
    dataset = classification_dataset(60)
    dataset.save_to_disk(tmp_path / "saved")
    reversed_twice = dataset.select(range(59, -1, -1)).select(range(59, -1, -1))
    for same in (
        datasets.load_from_disk(tmp_path / "saved"),
        datasets.Dataset.from_list(dataset.to_list(), features=dataset.features),
        reversed_twice,
        dataset.with_format("torch"),
    ):
        assert changed(parts(dataset), parts(same)) == []
        assert changed({"a": dataset}, {"a": same}) == []


def test_other_data_of_the_same_size_is_found():
    dataset = classification_dataset(60)
    everybody = [f"client_{index}" for index in range(4)]
    assert changed(parts(dataset), parts(classification_dataset(60, seed=1))) == everybody
    assert changed(parts(dataset), parts(dataset, federated_seed=1)) == everybody
    rows = dataset.to_list()
    rows[17]["labels"] = (rows[17]["labels"] + 1) % 4  # one example of one client
    assert len(changed(parts(dataset), parts(datasets.Dataset.from_list(rows)))) == 1
    clients = {name: dataset.select(range(start, start + 20)) for name, start in (("a", 0), ("b", 20), ("c", 40))}
    assert changed(clients, {**clients, "a": clients["b"], "b": clients["a"]}) == ["a", "b"]


def test_data_is_looked_at_as_it_was_given():
    dataset = classification_dataset(20)
    prepared = PreparedClients(parts(dataset), [lambda part: part.remove_columns("labels")])
    assert changed(prepared, parts(dataset)) == [] and not prepared._kept


class Augmented(Dataset):
    """Examples with noise from a given source."""

    def __init__(self, noise, seed=0):
        self.noise, self.seed = noise, seed
        self.reads = 0

    def __len__(self):
        return 50

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        self.reads += 1
        return {"pixels": torch.arange(6.0) + index + self.seed + self.noise(), "label": np.int64(index % 2)}


def test_random_augmentations_give_no_false_alarm():
    from_global_generators = lambda: torch.rand(()) + np.random.rand() + random.random()  # noqa: E731
    for torch_seed in (0, 1):
        torch.manual_seed(torch_seed)
        before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
        assert changed(parts(Augmented(from_global_generators)), parts(Augmented(from_global_generators))) == []
        assert len(changed(parts(Augmented(from_global_generators)), parts(Augmented(from_global_generators, 1)))) == 4
        assert torch.equal(before[0], torch.get_rng_state()) and before[2] == random.getstate()
        assert np.array_equal(before[1], np.random.get_state()[1])
    own_generator = np.random.default_rng(0)
    assert set(client_fingerprints(parts(Augmented(own_generator.random))).values()) == {None}


def test_examples_that_workers_read_are_not_read_before():
    data, table = Augmented(lambda: 0), classification_dataset(20)
    assert client_fingerprints({"a": data}, may_read=False) == {"a": None} and data.reads == 0
    assert client_fingerprints({"a": table}, may_read=False) == client_fingerprints({"a": table})


def test_pictures_and_sounds_are_what_is_in_their_files():
    def pictures(folder, content=b"png"):
        rows = [{"image": {"bytes": None, "path": f"{folder}/7.png"}}, {"image": {"bytes": content, "path": None}}]
        features = datasets.Features({"image": datasets.Image(decode=False)})
        return {"a": datasets.Dataset.from_list(rows, features=features)}

    assert changed(pictures("/here"), pictures("/there")) == []
    assert changed(pictures("/here"), pictures("/here", b"jpg")) == ["a"]


def test_data_of_other_kinds():
    tensors = TensorDataset(torch.arange(40).view(20, 2).bfloat16(), torch.zeros(20))
    same = TensorDataset(torch.arange(40).view(20, 2).bfloat16(), torch.zeros(20))
    other = TensorDataset(torch.arange(40).view(20, 2).bfloat16() + 1, torch.zeros(20))
    assert changed(parts(tensors), parts(same)) == [] and len(changed(parts(tensors), parts(other))) == 4
    assert changed({"a": Subset(tensors, [1, 2])}, {"a": Subset(tensors, [1, 3])}) == ["a"]
    assert changed({"a": [{"x": {3, 1}}]}, {"a": [{"x": {1, 3}}]}) == []
    assert changed({"a": [object()]}, {"a": [object()]}) == []  # only the class can be compared
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"x": 1}]))
    assert client_fingerprints({"a": stream}) == {"a": None}

    class Broken(Augmented):
        def __getitem__(self, index):
            raise OSError("no such file")

    assert set(client_fingerprints(parts(Broken(float))).values()) == {None}


def test_only_a_sample_of_large_data_is_read(monkeypatch):
    data = Augmented(lambda: 0)
    data.__class__.__len__ = lambda self: 4000
    try:
        fingerprints = client_fingerprints(parts(data, num_clients=2000))
    finally:
        data.__class__.__len__ = lambda self: 50
    assert len(set(fingerprints.values())) == 2000 and data.reads == 2 * MAX_EXAMPLES
    queried = []
    monkeypatch.setattr(
        "peft_ravan.trainers.data.fingerprint.query_table",
        lambda table, key, indices: queried.extend(key) or table.slice(0, 1),
    )
    client_fingerprints(parts(classification_dataset(5000), num_clients=1500))
    assert len(queried) == MAX_ROWS
