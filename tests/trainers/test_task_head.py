"""The learning rate of the task head."""

import pytest
import torch
from peft import get_peft_model
from torch.optim.optimizer import register_optimizer_step_pre_hook

from peft_ravan import RavanConfig, optimizer_parameter_groups
from peft_ravan.trainers import FederatedTrainer

from ..conftest import classification_dataset, tiny_bert
from .helpers import adapter_state, arguments, assert_same, lora, make_trainer, ravan


def is_head(name: str) -> bool:
    return ".classifier." in name


@pytest.mark.parametrize("adapter", [None, lora()], ids=["ravan", "lora"])
def test_the_rate_of_the_adapter_as_that_of_the_head_changes_nothing(adapter, tmp_path):
    states = []
    for options in ({}, {"task_head_learning_rate": 1e-2}):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, adapter, **options)
        trainer.train()
        states.append(adapter_state(trainer))
    assert_same(*states)


@pytest.mark.parametrize("frozen", ["head", "adapter"])
def test_each_part_has_its_own_rate(frozen, tmp_path):
    rates = {"learning_rate": 1e-2, "task_head_learning_rate": 1e-2}
    rates["task_head_learning_rate" if frozen == "head" else "learning_rate"] = 0.0
    trainer = make_trainer(tmp_path, **rates)
    before = adapter_state(trainer)
    trainer.train()
    moved = {name for name, tensor in adapter_state(trainer).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if is_head(name) == (frozen == "adapter")}


def test_biases_of_the_head_still_have_no_weight_decay(tmp_path):
    trainer = make_trainer(tmp_path, task_head_learning_rate=0.5, learning_rate=0.0, weight_decay=0.1)
    groups = {}

    def remember(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            groups.update({tuple(p.shape): (group["lr"], group["weight_decay"]) for p in group["params"]})

    handle = register_optimizer_step_pre_hook(remember)
    try:
        trainer.train()
    finally:
        handle.remove()
    head = trainer.model.base_model.model.classifier.modules_to_save["default"]
    assert groups[tuple(head.weight.shape)] == (0.5, 0.1)
    assert groups[tuple(head.bias.shape)] == (0.5, 0.0)


def test_a_head_that_does_not_exist_is_named(tmp_path):
    adapter = RavanConfig(r=4, num_heads=2, target_modules=["query"])
    with pytest.raises(ValueError, match="trains no task head"):
        make_trainer(tmp_path, adapter, task_head_learning_rate=1e-2)


def test_parameter_groups_decide_the_rates_themselves(tmp_path):
    model = get_peft_model(tiny_bert(), ravan())
    groups = optimizer_parameter_groups(model, 1e-3)
    with pytest.raises(ValueError, match="Use one of both"):
        FederatedTrainer(
            model,
            arguments(tmp_path, task_head_learning_rate=1e-2),
            train_dataset=classification_dataset(),
            optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups, "lr": 1e-3}),
        )


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_rates_that_are_none(rate, tmp_path):
    with pytest.raises(ValueError, match="task_head_learning_rate"):
        arguments(tmp_path, task_head_learning_rate=rate)
