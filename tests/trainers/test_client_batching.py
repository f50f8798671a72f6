"""Several clients in one forward pass: each ends where it would have ended alone."""

import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, Trainer, set_seed

from peft_ravan import RavanConfig
from peft_ravan.trainers import FederatedCallback, FederatedTrainer, federated
from peft_ravan.trainers.client.batching.computation import CommonModel

from ..conftest import (
    NUM_LABELS,
    VOCAB_SIZE,
    classification_dataset,
    make_tokenizer,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
)
from .helpers import (
    adapter_state,
    arguments,
    assert_same,
    comparable,
    interrupted,
    kept_by_clients,
    lora,
    make_trainer,
    ravan,
    resumable_trainer,
)


CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture
def sizes_at_once(monkeypatch) -> list[int]:
    """How many clients were computed at once, in each forward pass with gradients."""
    sizes, outputs = [], CommonModel.outputs

    def counted(self, call, inputs, replicas):
        if call.with_gradients:
            sizes.append(len(replicas))
        return outputs(self, call, inputs, replicas)

    monkeypatch.setattr(CommonModel, "outputs", counted)
    return sizes


def unequal_clients(sizes=(20, 7, 13, 16, 3)) -> dict[str, Dataset]:
    starts = np.cumsum([0, *sizes])
    dataset = classification_dataset(int(starts[-1]))
    return {
        f"client_{index}": dataset.select(range(start, start + size))
        for index, (start, size) in enumerate(zip(starts, sizes, strict=False))
    }


def run(tmp_path, batching, adapter=None, **kwargs):
    set_seed(0)
    # with the default of 1e-8, AdamW makes large steps out of what is rounded in gradients near 0
    options = {"client_batching": batching, "adam_epsilon": 1e-4, **kwargs}
    trainer = make_trainer(tmp_path / str(batching), adapter() if adapter else None, **options)
    trainer.train()
    return trainer


def assert_same_runs(first, second, **tolerance):
    assert_same(first.last_global_state, second.last_global_state, **{**CLOSE, **tolerance})
    for one, other in zip(comparable(first.state.log_history), comparable(second.state.log_history), strict=True):
        assert one.keys() == other.keys()
        assert one["clients"] == other["clients"] and one["num_examples"] == other["num_examples"]
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=tolerance.get("rtol", 1e-4))


def lora_of_rank_4() -> LoraConfig:
    return LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear")


def dora() -> LoraConfig:
    return LoraConfig(r=2, task_type="SEQ_CLS", use_dora=True, target_modules=["query", "dense"])


def trained_biases() -> LoraConfig:
    return LoraConfig(r=2, task_type="SEQ_CLS", bias="all", modules_to_save=["pooler", "classifier"])


@pytest.mark.parametrize(
    "adapter, options",
    [
        (ravan, {}),
        (lora, {}),
        (ravan, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "weight_decay": 0.1}),
        (lora_of_rank_4, {"optim": "sgd", "lr_scheduler_type": "linear", "warmup_steps": 1, "max_grad_norm": 0.05}),
        (ravan, {"task_head_learning_rate": 0.05, "label_smoothing_factor": 0.1}),
        (lora, {"proximal_mu": 0.5, "merge_method": "fedex_lora"}),
        # the second round goes on from what the server or the clients have kept
        (lora, {"merge_method": "rolora", "upload_dtype": "int8", "num_rounds": 2}),
        (ravan, {"scaffold": True, "optim": "sgd", "num_rounds": 2}),
        (ravan, {"local_parameters": ["classifier"], "num_rounds": 2}),
        (ravan, {"client_budgets": "uniform", "head_selection": "gradient", "head_allocation": "global"}),
        (lora_of_rank_4, {"client_budgets": 0.5, "merge_method": "flexlora"}),
        (dora, {}),
        (trained_biases, {}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(value) or "plain",
)
def test_several_clients_at_once_are_each_as_if_alone(tmp_path, adapter, options, sizes_at_once):
    # epochs, so that clients do different numbers of steps, and the last batches differ in size
    data = {"train_dataset": unequal_clients(), "num_clients": None, "max_steps": -1, "num_train_epochs": 1}
    options = {"num_rounds": 1, **data, **options}
    alone, at_once = (run(tmp_path, batching, adapter, **options) for batching in (1, 3))
    assert_same_runs(alone, at_once)
    assert set(sizes_at_once) == {2, 3}  # five clients in chunks of three, one of which has the fewest steps
    assert kept_by_clients(alone).keys() == kept_by_clients(at_once).keys()
    for client, kept in kept_by_clients(alone).items():
        assert_same(kept, kept_by_clients(at_once)[client], **CLOSE)


def language_clients() -> dict[str, Dataset]:
    rng = np.random.default_rng(0)
    lengths = {"a": [5, 9, 7, 6], "b": [12, 4, 8], "c": [3, 11, 10, 5, 4]}
    return {
        client: Dataset.from_dict({"input_ids": [rng.integers(0, 60, length).tolist() for length in of_client]})
        for client, of_client in lengths.items()
    }


def gpt2_without_dropout():
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("make_model", [tiny_llama, gpt2_without_dropout])
def test_texts_of_different_lengths_are_filled_up(tmp_path, make_model, sizes_at_once):
    padding = DataCollatorWithPadding(make_tokenizer())

    def collate(rows):
        batch = padding(rows)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    states = []
    for batching in (1, 3):
        set_seed(0)
        config = RavanConfig(r=4, num_heads=2, task_type="CAUSAL_LM", target_modules="all-linear")
        trainer = FederatedTrainer(
            get_peft_model(make_model(), config),
            arguments(
                tmp_path,
                client_batching=batching,
                num_clients=None,
                num_rounds=1,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                adam_epsilon=1e-4,
            ),
            train_dataset=language_clients(),
            data_collator=collate,
        )
        trainer.train()
        states.append(adapter_state(trainer))
    assert_same(*states, **CLOSE)
    assert set(sizes_at_once) == {2, 3}  # one has an odd number of batches, so its last step takes fewer of them


def test_it_works_in_mixed_precision(tmp_path, sizes_at_once):
    alone, at_once = (run(tmp_path, batching, bf16=True, num_rounds=1) for batching in (1, 4))
    assert_same_runs(alone, at_once, atol=2e-2, rtol=2e-2)
    assert set(sizes_at_once) == {4}


def test_a_resumed_run_is_that_of_clients_one_by_one(tmp_path):
    options = {"client_batching": 2, "num_rounds": 2, "eval_strategy": "no", "adam_epsilon": 1e-4}
    interrupted(tmp_path / "at_once", after=1, **options)
    resumed = resumable_trainer(tmp_path / "at_once", **options)
    resumed.train(resume_from_checkpoint=True)
    whole = resumable_trainer(tmp_path / "whole", **{**options, "client_batching": 1})
    whole.train()
    assert_same(adapter_state(whole), adapter_state(resumed), **CLOSE)


def bert_with_dropout() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = tiny_bert().config.to_dict()
    return BertForSequenceClassification(BertConfig.from_dict({**config, "hidden_dropout_prob": 0.3}))


def test_dropout_is_seeded_and_differs_between_clients(tmp_path):
    rows = classification_dataset(8)  # of both clients, so without dropout they upload the same
    options = {"train_dataset": {"a": rows, "b": rows}, "num_clients": None, "max_steps": 1, "num_rounds": 1}
    with_dropout = [run(tmp_path, 2, ravan, model=bert_with_dropout(), **options) for _ in range(2)]
    assert_same(*map(adapter_state, with_dropout))
    cosines = [
        trainer.state.log_history[0]["update_cosine"] for trainer in (*with_dropout, run(tmp_path, 2, **options))
    ]
    assert cosines[2] == pytest.approx(1, abs=1e-4) and cosines[0] == cosines[1] < 0.99


class FailingCollator:
    """Collates rows. Those that start with a certain token lead to an error, there or in the model."""

    def __init__(self, marked_with, error):
        self.marked_with, self.error = marked_with, error

    def __call__(self, rows):
        tokens = torch.tensor([row["input_ids"] for row in rows])
        if (tokens[:, 0] == self.marked_with).all():
            if self.error == "collator":
                raise OSError("the disk of this client is broken")
            tokens[0, 0] = 10_000  # beyond the vocabulary, which is an error of the whole batch
        return {"input_ids": tokens, "labels": torch.tensor([row["labels"] for row in rows])}


@pytest.mark.parametrize("error", ["collator", "token"])
def test_an_error_of_one_client_costs_its_own_contribution(tmp_path, error):
    clients = unequal_clients((8, 8, 8))
    marked = clients["client_1"].map(lambda row: {"input_ids": [63, *row["input_ids"][1:]]})
    clients["client_1"] = marked
    states, records = [], []
    for batching in (1, 3):
        set_seed(0)
        trainer = FederatedTrainer(
            get_peft_model(tiny_bert(), ravan()),
            arguments(tmp_path, client_batching=batching, num_clients=None, num_rounds=1),
            train_dataset=clients,
            data_collator=FailingCollator(63, error),
        )
        trainer.train()
        states.append(adapter_state(trainer))
        records.append(trainer.state.log_history[0])
    assert_same(*states, **CLOSE)
    assert [record["clients"] for record in records] == [["client_0", "client_2"]] * 2
    assert records[0]["failed_clients"] == records[1]["failed_clients"]


class DivergesForOne(Trainer):
    """The loss of a client with many examples of the first label is NaN."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss * float("nan") if (inputs["labels"] == 0).all() else loss


def test_a_client_that_diverges_does_not_spoil_the_others(tmp_path):
    clients = unequal_clients((8, 8, 8))
    clients["client_1"] = clients["client_1"].map(lambda row: {"labels": 0})
    states = []
    for batching in (1, 3):
        set_seed(0)
        trainer = federated(DivergesForOne)(
            get_peft_model(tiny_bert(), lora()),
            arguments(tmp_path, client_batching=batching, num_clients=None, num_rounds=1),
            train_dataset=clients,
        )
        trainer.train()
        assert trainer.state.log_history[0]["clients"] == ["client_0", "client_2"]
        assert "NaN" in trainer.state.log_history[0]["failed_clients"][0]["reason"]
        states.append(adapter_state(trainer))
    assert_same(*states, **CLOSE)


def test_gradients_that_cannot_be_computed_at_once_are_computed_alone(tmp_path, monkeypatch):
    def out_of_memory(losses):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

    alone = run(tmp_path, 1, num_rounds=1)
    monkeypatch.setattr("peft_ravan.trainers.client.batching.client_batch.compute_gradients", out_of_memory)
    assert_same(adapter_state(alone), adapter_state(run(tmp_path, 4, num_rounds=1)))


def test_an_interruption_ends_all_clients(tmp_path):
    class Interrupt(FederatedCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, callbacks=[Interrupt()], client_batching=3)
    start, threads = adapter_state(trainer), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same(start, adapter_state(trainer))
    assert threading.active_count() == threads


def test_the_trainer_and_its_model_stay_as_they_are(tmp_path):
    trainer = make_trainer(tmp_path, client_batching=4, num_rounds=1)
    model, accelerator = trainer.model, trainer.accelerator
    trainer.train()
    assert trainer.model is model and trainer.accelerator is accelerator and "backward" not in vars(accelerator)
    assert "training_step" not in vars(trainer)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    model.train(), model(input_ids=torch.arange(8)[None], labels=torch.tensor([1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_it_goes_with_several_kinds_of_layers_at_the_top(tmp_path, sizes_at_once):
    """A model of one's own, whose adapted layers are not below a common encoder."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(VOCAB_SIZE, 16)
            self.first = nn.Linear(16, 16)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)])
            self.last = nn.Linear(16, NUM_LABELS)

        def forward(self, input_ids, labels):
            hidden = torch.tanh(self.first(self.embedding(input_ids).mean(dim=1)))
            for block in self.blocks:
                hidden = block(hidden)
            logits = self.last(hidden)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    states = []
    for batching in (1, 2):
        config = RavanConfig(
            r=4, num_heads=2, target_modules=["first", "blocks.0.0", "blocks.1.0"], modules_to_save=["last"]
        )
        trainer = FederatedTrainer(
            get_peft_model(Classifier(), config),
            arguments(tmp_path, client_batching=batching, num_clients=None),
            train_dataset=unequal_clients((12, 9)),
        )
        trainer.train()
        states.append(adapter_state(trainer))
    assert_same(*states, **CLOSE)
    assert set(sizes_at_once) == {2}


# ---- What it refuses --------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"client_batching": 0}, "`client_batching` must be 1 or more, got 0"),
        ({"parallel": "data"}, "`parallel='data'`: all processes train one client together"),
        ({"client_timeout": 5.0}, "`client_timeout`"),
        ({"activation_checkpointing": True}, "`activation_checkpointing`"),
        ({"gradient_checkpointing": True}, "`activation_checkpointing`"),
        ({"torch_compile": True}, "`torch_compile`"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha`"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size`"),
        ({"optim": "lomo"}, "`optim='lomo'`"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_go_with_it_are_named(tmp_path, options, message):
    with pytest.raises(ValueError) as raised:
        arguments(tmp_path, **{"client_batching": 2, **options})
    assert message in str(raised.value)


class OwnStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, inputs)
        loss.backward()
        return loss.detach()


def test_a_trainer_with_its_own_step_is_refused(tmp_path):
    model, dataset = get_peft_model(tiny_bert(), lora()), classification_dataset(16)
    with pytest.raises(ValueError, match=r"`client_batching=2` .* its own `training_step`.* Set `client_batching=1`"):
        federated(OwnStep)(model, arguments(tmp_path, client_batching=2), train_dataset=dataset)
    federated(OwnStep)(model, arguments(tmp_path), train_dataset=dataset)


class WithEncoder(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.encoder, self.head = nn.Embedding(VOCAB_SIZE, 16), encoder, nn.Linear(16, NUM_LABELS)

    def forward(self, input_ids, labels):
        logits = self.head(self.encoder(self.embedding(input_ids).mean(dim=1)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer_with(tmp_path, encoder) -> FederatedTrainer:
    config = RavanConfig(r=4, num_heads=2, target_modules=["encoder.0"], modules_to_save=["head"])
    return FederatedTrainer(
        get_peft_model(WithEncoder(encoder), config),
        arguments(tmp_path, client_batching=2, num_clients=2),
        train_dataset=classification_dataset(16),
    )


def test_a_batch_norm_among_the_common_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"encoder\.1 \(BatchNorm1d\) takes its statistics over a batch"):
        trainer_with(tmp_path, nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)))


class Centred(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(dim=0))


class TransposedRows(nn.Module):
    def forward(self, x):
        return x.T.contiguous().flatten()[: 5 * len(x) + 1]


@pytest.mark.parametrize(
    "last, found",
    [
        (Centred(16, 16), "its outputs for one client depend on the others"),
        (TransposedRows(), r"it fails \(CannotBatchError: its output has a tensor of shape"),
    ],
    ids=["mixed rows", "no rows"],
)
def test_a_model_that_mixes_rows_is_refused_before_anything_has_changed(tmp_path, last, found):
    trainer = trainer_with(tmp_path, nn.Sequential(nn.Linear(16, 16), last))
    start = adapter_state(trainer)
    with pytest.raises(ValueError, match=rf"{found}.* Set `client_batching=1`"):
        trainer.train()
    assert_same(start, adapter_state(trainer))
