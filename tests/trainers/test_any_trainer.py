"""`federated` over any trainer: the clients train as that trainer does."""

import copy
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from peft import get_peft_model
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from peft_ravan.trainers import (
    FederatedArguments,
    FederatedArgumentsMixin,
    FederatedMixin,
    FederatedTrainer,
    federated,
    federated_arguments,
)
from peft_ravan.trainers.seeds import derive_seed

from ..conftest import classification_dataset, tiny_bert
from .helpers import adapter_state, arguments, assert_same, comparable, ravan


class SameTrainer(Trainer):
    """A trainer that changes nothing."""


@dataclass
class WeightedArguments(TrainingArguments):
    first_class_weight: float = field(default=1.0, metadata={"help": "Weight of class 0."})
    learning_rate: float = 1e-2


class WeightedTrainer(Trainer):
    """A typical custom trainer: another loss, an additional argument, and a metric in the log."""

    def __init__(self, model, args=None, seen=None, **kwargs):
        super().__init__(model, args, **kwargs)
        self.seen = seen

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.seen is not None and model.training:
            self.seen.append(num_items_in_batch)
        labels = inputs["labels"]
        outputs = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
        weight = torch.ones(outputs.logits.shape[-1])
        weight[0] = self.args.first_class_weight
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=weight)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        logs["logged_by_parent"] = 1.0
        super().log(logs, start_time)


def model():
    return get_peft_model(tiny_bert(), ravan())


def test_federated_over_trainer_is_the_federated_trainer(tmp_path):
    assert federated(Trainer) is FederatedTrainer is federated(FederatedTrainer)
    assert federated(SameTrainer) is federated(SameTrainer)
    made = []
    for trainer_class in (FederatedTrainer, federated(SameTrainer)):
        args = arguments(tmp_path, partition="dirichlet", clients_per_round=2, eval_strategy="epoch")
        made.append(
            trainer_class(
                model(), args, train_dataset=classification_dataset(), eval_dataset=classification_dataset(40)
            )
        )
        made[-1].train()
    assert_same(*map(adapter_state, made))
    assert comparable(made[0].state.log_history) == comparable(made[1].state.log_history)


def test_a_made_class_has_a_name_and_a_place():
    made = federated(WeightedTrainer)
    assert made.__name__ == "FederatedWeightedTrainer" and made.__module__ == __name__
    assert "WeightedTrainer" in made.__doc__ and issubclass(made, (FederatedMixin, WeightedTrainer))
    with pytest.raises(TypeError, match="`federated` needs `Trainer` or a subclass.*Pass the class"):
        federated(int)
    with pytest.raises(TypeError, match="`federated_arguments` needs `TrainingArguments`"):
        federated_arguments(dict)


def test_arguments_have_the_fields_of_both_and_the_defaults_of_each():
    made = federated_arguments(WeightedArguments)
    assert made is federated_arguments(WeightedArguments) is federated_arguments(made)
    assert federated_arguments(TrainingArguments) is FederatedArguments
    args = made("out", num_rounds=3, first_class_weight=0.5)
    assert isinstance(args, (WeightedArguments, FederatedArgumentsMixin))
    assert (args.num_rounds, args.first_class_weight, args.learning_rate) == (3, 0.5, 1e-2)
    assert args.save_strategy == "epoch" and args.lr_scheduler_type == "constant" and args.federated_seed == 42
    with pytest.raises(ValueError, match="`num_rounds` must be 1 or more"):
        made("out", num_rounds=0)
    [parsed] = HfArgumentParser(made).parse_args_into_dataclasses(["--output_dir", "out", "--num_rounds", "4"])
    assert parsed.num_rounds == 4
    for copied in (pickle.loads(pickle.dumps(args)), copy.copy(args), copy.deepcopy(args)):
        assert type(copied) is made and copied.to_dict() == args.to_dict()


def test_a_client_trains_by_the_loss_of_the_trainer(tmp_path):
    """One client and one round give the same result as the trainer itself, and not that of Trainer."""
    common = {
        "max_steps": 3, "per_device_train_batch_size": 8, "first_class_weight": 5.0, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    args = federated_arguments(WeightedArguments)(str(tmp_path), num_rounds=1, upload_dtype="float32", **common)
    seen = []
    # by position, in the order of the trainer below
    trainer = federated(WeightedTrainer)(model(), args, seen, train_dataset={"only": classification_dataset()})
    trainer.train()
    alone = WeightedTrainer(
        model(),
        WeightedArguments(str(tmp_path), seed=derive_seed(42, "client", 1, "only"), **common),
        train_dataset=classification_dataset(),
    )
    alone.train()
    assert_same(adapter_state(trainer), adapter_state(alone))
    assert len(seen) == 3
    plain = WeightedTrainer(model(), alone.args, train_dataset=classification_dataset())
    plain.args.first_class_weight = 1.0
    plain.train()
    assert any(
        not torch.equal(*pair) for pair in zip(*(adapter_state(t).values() for t in (alone, plain)), strict=True)
    )


def test_what_the_trainer_adds_to_its_logs_is_in_the_records_of_rounds_once(tmp_path):
    class Logs(TrainerCallback):
        def __init__(self):
            self.logs = []

        def on_log(self, args, state, control, logs, **kwargs):
            self.logs.append(logs)

    logs = Logs()
    trainer = federated(WeightedTrainer)(
        model(),
        arguments(tmp_path, eval_strategy="epoch", logging_strategy="steps", logging_steps=1),
        train_dataset=classification_dataset(),
        eval_dataset=classification_dataset(40),
        callbacks=[logs],
    )
    trainer.args.first_class_weight = 1.0
    trainer.train()
    assert [record["round"] for record in trainer.state.log_history] == [1, 2] == [log["round"] for log in logs.logs]
    assert all(record["logged_by_parent"] == 1 and "eval_loss" in record for record in trainer.state.log_history)


def test_attributes_of_clients_are_put_back(tmp_path):
    class Counting(WeightedTrainer):
        client_attributes = ("counts",)

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.counts = {"steps": [0]}

        def training_step(self, *args, **kwargs):
            self.counts["steps"].append(len(self.counts["steps"]))
            assert len(self.counts["steps"]) <= 4, "the steps of another client"
            return super().training_step(*args, **kwargs)

    made = federated(Counting)
    made.client_attributes = ("counts",)
    args = federated_arguments(WeightedArguments)(
        str(tmp_path), num_rounds=2, num_clients=3, max_steps=3, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=8,
    )  # fmt: skip
    trainer = made(model(), args, train_dataset=classification_dataset())
    trainer.train()
    assert trainer.counts == {"steps": [0]} and not trainer.state.log_history[-1]["failed_clients"]


class OwnPreparation(Trainer):
    def __init__(self, model, args, train_dataset=None, **kwargs):
        super().__init__(model, args, train_dataset=train_dataset.map(lambda example: example), **kwargs)


@pytest.mark.parametrize(
    "trainer_class, args_class, error, message",
    [
        (WeightedTrainer, WeightedArguments, TypeError, "needs `FederatedArguments`, got WeightedArguments"),
        (OwnPreparation, FederatedArguments, ValueError, "cannot be repeated for each client.*`_prepare_dataset"),
    ],
)
def test_what_cannot_be_federated_is_refused(tmp_path, trainer_class, args_class, error, message):
    with pytest.raises(error, match=message):
        federated(trainer_class)(model(), args_class(str(tmp_path)), train_dataset=classification_dataset())


def test_arguments_by_position_are_those_of_the_trainer(tmp_path):
    trainer = FederatedTrainer(model(), arguments(tmp_path), None, classification_dataset())
    assert len(trainer.clients) == 4
    with pytest.raises(TypeError, match=r"FederatedTrainer takes \d+ arguments by position, got 20"):
        FederatedTrainer(*range(20))
