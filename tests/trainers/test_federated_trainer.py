import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from peft_ravan import RavanLayer
from peft_ravan.trainers import FederatedCallback, FederatedTrainer, RoundFailedError
from peft_ravan.trainers.client.live_adapter import LiveAdapter
from peft_ravan.trainers.seeds import derive_seed
from peft_ravan.tuner.state import exchange_state

from ..conftest import CHECKPOINTING, classification_dataset, tiny_bert, tiny_llama
from .helpers import (
    adapter_state,
    arguments,
    assert_same,
    lora,
    make_trainer,
    ravan,
    ravan_without_scaling,
    trainable_checkpoint,
)


RECORD_KEYS = {
    "round", "clients", "failed_clients", "attempts", "num_examples", "train_loss", "upload_bytes", "download_bytes", "round_seconds", "learning_rate",
}  # fmt: skip


# ---- Equivalences ----------------------------------------------------------------


@pytest.mark.parametrize("adapter", [ravan, ravan_without_scaling, lora])
@pytest.mark.parametrize("feature", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_one_client_and_one_round_is_centralised_training(tmp_path, adapter, feature):
    dataset = classification_dataset()
    federated = make_trainer(
        tmp_path, adapter(), train_dataset={"only": dataset}, num_clients=None, num_rounds=1, **feature
    )
    federated.train()

    model = get_peft_model(tiny_bert(), adapter())
    seed = derive_seed(42, "client", 1, "only")
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, learning_rate=1e-2, seed=seed,
        lr_scheduler_type="constant", report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        **feature,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=dataset)
    set_seed(seed)
    trainer.train()
    assert_same(adapter_state(federated), exchange_state(trainable_checkpoint(model)))


def test_clients_with_the_same_data_are_one_client(tmp_path):
    dataset = classification_dataset(16)
    # one batch holds all data, so the order that each client's seed gives it makes no difference
    one, three = (
        make_trainer(
            tmp_path,
            train_dataset={f"client_{index}": dataset for index in range(num_clients)},
            num_clients=None,
            per_device_train_batch_size=16,
        )
        for num_clients in (1, 3)
    )
    one.train(), three.train()
    assert_same(adapter_state(one), adapter_state(three), atol=1e-5, rtol=1e-4)


def test_a_run_can_be_repeated_bit_for_bit(tmp_path):
    runs = []
    for garbage in (1, 2):
        torch.manual_seed(garbage)
        trainer = make_trainer(tmp_path, partition="dirichlet", clients_per_round=2)
        trainer.train()
        runs.append((adapter_state(trainer), [record["train_loss"] for record in trainer.state.log_history]))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_the_global_adapter_is_the_mean_of_dense_weights(tmp_path):
    """The weight of the merged adapter is the mean of the clients' weights for Ravan, but not for LoRA."""

    class Weights(FederatedCallback):
        def __init__(self):
            self.weights = []

        def on_client_end(self, args, state, control, model, client, **kwargs):
            self.weights.append(delta(model))

    def delta(model):
        layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
        return layer.get_delta_weight("default").detach().clone()

    for adapter, exact in ((ravan(), True), (lora(), False)):
        callback = Weights()
        dataset = classification_dataset(100)
        clients = {"small": dataset.select(range(20)), "large": dataset.select(range(20, 100))}
        trainer = make_trainer(
            tmp_path, adapter, callbacks=[callback], train_dataset=clients, num_clients=None, num_rounds=1
        )
        trainer.train()
        mean = 0.2 * callback.weights[0] + 0.8 * callback.weights[1]
        error = (delta(trainer.model) - mean).norm() / mean.norm()
        assert (error < 1e-5) if exact else (error > 1e-3)


# ---- Rounds ----------------------------------------------------------------------


@pytest.mark.parametrize("merge_method", ["ravan", pytest.param("fedavg", marks=pytest.mark.deep), "fedrpca"])
def test_it_learns(tmp_path, merge_method):
    trainer = make_trainer(
        tmp_path,
        model=tiny_bert(num_layers=2),
        num_rounds=8,
        max_steps=8,
        clients_per_round=3,
        merge_method=merge_method,
        learning_rate=3e-3,
        task_head_learning_rate=1e-2,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    assert before < 0.4 < 0.75 < trainer.evaluate()["eval_accuracy"]


def test_the_history_has_one_record_a_round(tmp_path):
    trainer = make_trainer(tmp_path, num_rounds=4, eval_strategy="steps", eval_steps=2, clients_per_round=3)
    output = trainer.train()
    history = trainer.state.log_history
    assert [record["round"] for record in history] == [1, 2, 3, 4]
    assert all(record.keys() >= RECORD_KEYS for record in history)
    assert ["eval_accuracy" in record for record in history] == [False, True, False, True]
    assert all(len(record["clients"]) == 3 and set(record["clients"]) <= set(trainer.clients) for record in history)
    assert history[0]["num_examples"] == sum(len(trainer.clients[client]) for client in history[0]["clients"])
    assert output.global_step == trainer.state.global_step == 4
    assert output.metrics["upload_bytes"] == sum(record["upload_bytes"] for record in history)
    json.dumps(history)


def test_uploads_are_the_products_and_the_head(tmp_path):
    trainer = make_trainer(tmp_path, num_rounds=1, clients_per_round=2)
    trainer.train()
    [record] = trainer.state.log_history
    numbers = sum(tensor.numel() for tensor in adapter_state(trainer).values())
    targets = len([module for module in trainer.model.modules() if isinstance(module, RavanLayer)])
    assert numbers == targets * 3 * 4**2 + (32 + 1) * 4
    # a list of the tensors and what a task or a reply says besides; the rest is 4 bytes a number
    for sent in ("upload_bytes", "download_bytes"):
        assert 4 * numbers < record[sent] / 2 < 4 * numbers + 1000


def test_afterwards_every_scaling_is_one_and_the_model_holds_the_last_merge(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    scalings = [tensor for name, tensor in trainer.model.named_parameters() if "ravan_s" in name]
    assert scalings and all(torch.equal(s, torch.ones(3)) for s in scalings)
    assert_same(adapter_state(trainer), trainer.last_merge.state)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in adapter_state(trainer).items() if "ravan_H" in name)


class StartingPoints(FederatedCallback):
    """Records the state that each client starts from, and checks that its optimizer is fresh."""

    def __init__(self):
        self.adapters, self.rounds, self.rates = [], 0, []

    def on_round_begin(self, args, state, control, clients, **kwargs):
        self.rounds += 1

    def on_epoch_begin(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
        self.adapters.append((self.rounds, LiveAdapter(model).read()))
        assert not optimizer.state_dict()["state"]
        self.rates.append(lr_scheduler.get_last_lr()[0])


def test_every_client_starts_from_the_global_adapter_with_a_fresh_optimizer(tmp_path):
    callback = StartingPoints()
    trainer = make_trainer(
        tmp_path, callbacks=[callback], num_train_epochs=1, max_steps=-1, per_device_train_batch_size=64
    )
    trainer.train()
    assert len(callback.adapters) == 8
    for number in (1, 2):
        starts = [state for round_, state in callback.adapters if round_ == number]
        for state in starts[1:]:
            assert_same(state, starts[0])  # the task head included: nothing leaks from one client to the next
    name = "base_model.model.classifier.weight"
    assert not torch.equal(callback.adapters[0][1][name], callback.adapters[-1][1][name])


def test_the_learning_rate_changes_from_round_to_round_only(tmp_path):
    callback = StartingPoints()
    make_trainer(tmp_path, callbacks=[callback], lr_scheduler_type="linear", num_clients=2, num_rounds=4).train()
    assert callback.rates == pytest.approx([1e-2, 1e-2, 7.5e-3, 7.5e-3, 5e-3, 5e-3, 2.5e-3, 2.5e-3])


EVENTS = (
    "on_train_begin", "on_train_end", "on_round_begin", "on_round_end", "on_client_end", "on_log", "on_evaluate",
    "on_epoch_begin", "on_step_begin", "on_step_end", "on_optimizer_step",
)  # fmt: skip


class Events(FederatedCallback):
    """Counts the events that it receives."""

    def __init__(self):
        self.counts = dict.fromkeys(EVENTS, 0)
        for event in EVENTS:
            setattr(self, event, self.counter(event))

    def counter(self, event):
        def count(*args, **kwargs):
            self.counts[event] += 1

        return count


def test_callbacks_get_events_of_rounds_clients_and_local_steps(tmp_path):
    callback = Events()
    make_trainer(tmp_path, callbacks=[callback], num_clients=3, clients_per_round=2, eval_strategy="epoch").train()
    once, rounds, clients, steps = 1, 2, 2 * 2, 2 * 2 * 2
    assert callback.counts == {
        "on_train_begin": once, "on_train_end": once,
        "on_round_begin": rounds, "on_round_end": rounds, "on_log": rounds, "on_evaluate": rounds,
        "on_client_end": clients, "on_epoch_begin": clients,
        "on_step_begin": steps, "on_step_end": steps, "on_optimizer_step": steps,
    }  # fmt: skip


def test_a_callback_can_stop_the_run(tmp_path):
    class StopAfterFirst(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            control.should_training_stop = True

    trainer = make_trainer(tmp_path, num_rounds=5, callbacks=[StopAfterFirst()])
    assert trainer.train().global_step == 1


def test_loggers_get_numbers_only(tmp_path):
    class Numbers(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            assert all(isinstance(value, (int, float)) for value in logs.values())

    make_trainer(tmp_path, callbacks=[Numbers()]).train()


def test_initial_evaluation_is_round_zero(tmp_path):
    trainer = make_trainer(tmp_path, eval_on_start=True, eval_strategy="epoch")
    trainer.train()
    assert [record["round"] for record in trainer.state.log_history] == [0, 1, 2]
    assert trainer.state.log_history[0]["eval_accuracy"] == pytest.approx(0.25, abs=0.2)


def test_a_second_run_goes_on_from_the_first(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    after_first = adapter_state(trainer)
    trainer.train()
    assert [record["round"] for record in trainer.state.log_history] == [1, 2]
    assert not torch.equal(
        adapter_state(trainer)["base_model.model.classifier.weight"], after_first["base_model.model.classifier.weight"]
    )


def test_model_init_starts_every_run_anew(tmp_path):
    trainer = FederatedTrainer(
        args=arguments(tmp_path),
        train_dataset=classification_dataset(),
        model_init=lambda: get_peft_model(tiny_bert(), ravan()),
    )
    trainer.train()
    first = adapter_state(trainer)
    trainer.train()
    assert_same(adapter_state(trainer), first)


# ---- Trainer's own features within a client --------------------------------------


@pytest.mark.parametrize(
    "feature",
    [
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"max_grad_norm": 0.1},
        {"optim": "sgd"},
        {"max_steps": -1, "num_train_epochs": 1},
        {"weight_decay": 0.1, "label_smoothing_factor": 0.1},
        {"data_seed": 5},
        {CHECKPOINTING: True},
    ],
    ids=lambda feature: next(iter(feature)),
)
def test_features_of_trainer_work_within_a_client(tmp_path, feature):
    trainer = make_trainer(tmp_path, num_rounds=1, **feature)
    start = adapter_state(trainer)
    trainer.train()
    end = adapter_state(trainer)
    assert all(torch.isfinite(tensor).all() for tensor in end.values())
    assert any(not torch.equal(start[name], end[name]) for name in start)


def test_parameter_groups_of_an_optimizer_serve_every_client(tmp_path):
    class Rates(FederatedCallback):
        rates = []

        def on_epoch_begin(self, args, state, control, optimizer, **kwargs):
            self.rates.append([group["lr"] for group in optimizer.param_groups])

    model = get_peft_model(tiny_bert(), ravan())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [parameter for name, parameter in trained.items() if "ravan_" in name], "lr": 1e-2},
        {"params": [parameter for name, parameter in trained.items() if "ravan_" not in name], "lr": 1e-3},
    ]
    trainer = FederatedTrainer(
        model,
        arguments(tmp_path, num_rounds=2, num_clients=2, lr_scheduler_type="linear"),
        train_dataset=classification_dataset(),
        callbacks=[Rates()],
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups, "lr": 1e-3}),
    )
    trainer.train()
    assert Rates.rates == [[1e-2, 1e-3]] * 2 + [[5e-3, 5e-4]] * 2
    assert [record["learning_rate"] for record in trainer.state.log_history] == [1e-2, 5e-3]
    trainer.create_model_card()
    assert "0.01 and 0.001 by parameter group, linear over the rounds" in (tmp_path / "README.md").read_text()


def test_scalings_have_no_weight_decay(tmp_path):
    kinds = {True: set(), False: set()}

    class Watch(FederatedCallback):
        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            names = {id(parameter): name for name, parameter in model.named_parameters() if ".ravan_" in name}
            for group in optimizer.param_groups:
                found = {names[id(p)].split(".")[-2] for p in group["params"] if id(p) in names}
                kinds[group["weight_decay"] > 0] |= found

    make_trainer(tmp_path, callbacks=[Watch()], weight_decay=0.1).train()
    assert kinds == {True: {"ravan_H"}, False: {"ravan_s"}}


@pytest.mark.parametrize("merge_method", [None, "fedrpca"])
def test_lora_on_a_causal_language_model(tmp_path, merge_method):
    import datasets

    tokens = torch.randint(0, 64, (40, 8)).tolist()
    dataset = datasets.Dataset.from_dict(
        {"input_ids": tokens, "labels": tokens, "speaker": [i % 3 for i in range(40)]}
    )
    trainer = FederatedTrainer(
        get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM")),
        arguments(
            tmp_path, num_clients=None, partition="column", partition_column="speaker", merge_method=merge_method
        ),
        train_dataset=dataset,
    )
    assert list(trainer.clients) == ["0", "1", "2"]
    assert trainer.merge_method == (merge_method or "fedavg")
    trainer.train()
    losses = [record["train_loss"] for record in trainer.state.log_history]
    assert losses[1] < losses[0]
    if merge_method:
        assert all(".lora_" in name for name in trainer.last_merge.diagnostics["matrices"])


# ---- Errors ----------------------------------------------------------------------


def test_an_error_within_a_client_names_round_and_client(tmp_path):
    class Fail(FederatedCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("out of paper")

    trainer = make_trainer(tmp_path, callbacks=[Fail()])
    start, args, train_dataset = adapter_state(trainer), trainer.args, trainer.train_dataset
    with pytest.raises(RoundFailedError, match="'client_3' .RuntimeError: out of paper.") as caught:
        trainer.train()
    if hasattr(caught.value.__cause__, "__notes__"):
        assert "round 1, while client 'client_0' trained" in caught.value.__cause__.__notes__[0]
    assert_same(adapter_state(trainer), start)
    assert trainer.args is args and trainer.train_dataset is train_dataset


def test_an_error_after_the_merge_keeps_the_merge(tmp_path):
    class Fail(FederatedCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            raise RuntimeError("metric not found")

    trainer = make_trainer(tmp_path, callbacks=[Fail()], eval_strategy="epoch")
    start = adapter_state(trainer)
    with pytest.raises(RuntimeError, match="metric not found"):
        trainer.train()
    assert_same(adapter_state(trainer), trainer.last_merge.state)
    assert any(not torch.equal(start[name], tensor) for name, tensor in adapter_state(trainer).items())


def test_arguments_of_trainer_are_refused(tmp_path):
    model = get_peft_model(tiny_bert(), ravan())
    with pytest.raises(TypeError, match="needs `FederatedArguments`, got TrainingArguments"):
        FederatedTrainer(model, TrainingArguments(str(tmp_path)))


def test_an_optimizer_is_refused(tmp_path):
    model = get_peft_model(tiny_bert(), ravan())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`optimizers` cannot be given to the FederatedTrainer"):
        FederatedTrainer(
            model, arguments(tmp_path), train_dataset=classification_dataset(), optimizers=(optimizer, None)
        )


def test_a_model_without_an_adapter_is_refused_early(tmp_path):
    with pytest.raises(TypeError, match="get_peft_model"):
        FederatedTrainer(tiny_bert(), arguments(tmp_path), train_dataset=classification_dataset())


def test_training_needs_data(tmp_path):
    trainer = FederatedTrainer(get_peft_model(tiny_bert(), ravan()), arguments(tmp_path))
    with pytest.raises(ValueError, match="needs a `train_dataset`"):
        trainer.train()


# ---- What is saved ---------------------------------------------------------------


def test_the_saved_adapter_scores_the_same_in_a_fresh_base_model(tmp_path):
    trainer = make_trainer(tmp_path / "run", num_rounds=3)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter")
    args = arguments(tmp_path / "evaluation")
    reloaded = FederatedTrainer(
        model, args, eval_dataset=trainer.eval_dataset, compute_metrics=trainer.compute_metrics
    )
    assert reloaded.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_checkpoints_after_rounds(tmp_path):
    trainer = make_trainer(
        tmp_path, num_rounds=5, max_steps=1, num_clients=2, save_strategy="steps", save_steps=2, save_total_limit=2
    )
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    saved = load_file(tmp_path / "checkpoint-5" / "adapter_model.safetensors")
    assert_same(exchange_state(saved), adapter_state(trainer))
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert [record["round"] for record in state["log_history"]] == [1, 2, 3, 4, 5]


def test_the_card_says_how_the_adapter_was_made(tmp_path):
    trainer = make_trainer(tmp_path, partition="dirichlet", merge_method="fedrpca", eval_strategy="epoch")
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: peft" in card and "- federated-learning" in card
    assert "import peft_ravan  # registers RAVAN with PEFT" in card
    assert "| Merge method | [FedRPCA](https://huggingface.co/papers/2506.01194) |" in card
    assert "| Clients | 4 |" in card and "Dirichlet distribution, alpha = 0.5" in card
    assert "| round | clients | train_loss | eval_loss | eval_accuracy | upload (MB) |" in card
    assert "Which base model this adapter belongs to: its configuration names none." in card


def test_create_model_card_takes_metadata(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.create_model_card(license="mit", model_name="Ward notes", dataset_tags=["clinc/oos"], tags="medical")
    card = (tmp_path / "README.md").read_text()
    assert "license: mit" in card and "# Ward notes" in card and "- clinc/oos" in card and "- medical" in card
