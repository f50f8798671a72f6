"""Helpers for the tests of the trainers: small federations, interruptions, and comparisons."""

import shutil
from collections.abc import Iterable

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from peft_ravan import RavanConfig
from peft_ravan.merging import MERGE_METHODS
from peft_ravan.trainers import FederatedArguments, FederatedCallback, FederatedTrainer
from peft_ravan.trainers.client.live_adapter import LiveAdapter
from peft_ravan.trainers.client.store import ClientStore
from peft_ravan.trainers.exchange import ClientReply, ClientTask
from peft_ravan.trainers.runners import Runner
from peft_ravan.trainers.server.state import ServerState

from ..conftest import classification_dataset, tiny_bert


FOUR_TARGETS = ["query", "key", "value", "attention.output.dense"]


def ravan(**kwargs) -> RavanConfig:
    return RavanConfig(
        r=4, num_heads=3, task_type="SEQ_CLS", target_modules="all-linear",
        # a name, since a regular expression is tried in a process of its own
        exclude_modules=["classifier"], **kwargs,
    )  # fmt: skip


def ravan_without_scaling() -> RavanConfig:
    return ravan(train_scaling=False)


def lora() -> LoraConfig:
    return LoraConfig(r=2, task_type="SEQ_CLS", target_modules=FOUR_TARGETS)


def arguments(tmp_path, **kwargs) -> FederatedArguments:
    defaults = {
        "num_rounds": 2,
        "num_clients": 4,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1e-2,
        "average_rounds": 1,
        "upload_dtype": "float32",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return FederatedArguments(str(tmp_path), **{**defaults, **kwargs})


def make_trainer(
    tmp_path,
    adapter=None,
    model=None,
    callbacks=None,
    train_dataset=None,
    client_fault=None,
    availability=None,
    adapter_name="default",
    **kwargs,
) -> FederatedTrainer:
    return FederatedTrainer(
        get_peft_model(model or tiny_bert(), adapter or ravan(), adapter_name=adapter_name),
        arguments(tmp_path, **kwargs),
        train_dataset=classification_dataset() if train_dataset is None else train_dataset,
        eval_dataset=classification_dataset(80, seed=1),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=callbacks,
        client_fault=client_fault,
        availability=availability,
    )


def of_each_kind(methods: Iterable[str]) -> list:
    """
    Names of merge methods for `parametrize`. Those that a round treats as it treats one before are left to the deep run:
    what distinguishes them is what they merge to, which has tests of its own.
    """
    parameters, kinds = [], set()
    for name in methods:
        method = MERGE_METHODS[name]
        kind = (
            method.frozen_parts, method.frozen_cycle, method.personal_parts, method.changes_model, method.restarts,
            method.streaming, bool(method.decomposes), method.takes("server_state"), method.takes("round_number"),
        )  # fmt: skip
        parameters.append(pytest.param(name, marks=pytest.mark.deep) if kind in kinds else name)
        kinds.add(kind)
    return parameters


class OverBytes(Runner):
    """Sends every task and every reply as bytes, and counts them."""

    def __init__(self):
        self.down = self.up = 0

    def run(self, tasks, work):
        for task in tasks:
            sent = task.to_bytes()
            back = work(ClientTask.from_bytes(sent)).to_bytes()
            self.down, self.up = self.down + len(sent), self.up + len(back)
            yield ClientReply.from_bytes(back)


def adapter_state(trainer) -> dict[str, torch.Tensor]:
    return LiveAdapter(trainer.model).read()


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **tolerance) -> None:
    assert first.keys() == second.keys()
    for name in first:
        if tolerance:
            torch.testing.assert_close(first[name], second[name], **tolerance)
        else:
            assert torch.equal(first[name], second[name]), name


def kept_by_clients(trainer, state: ServerState | None = None) -> dict[str, dict[str, torch.Tensor]]:
    """The state that each client keeps, from the rounds in which its update was merged."""
    state, store = state or trainer.last_server_state, ClientStore(trainer.args.output_dir)
    files = {client: state.kept.get(client) for client in trainer.clients}
    return {client: store.load(client, None if file is None else file.round) for client, file in files.items()}


def trainable_checkpoint(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def resumable_trainer(folder, **kwargs):
    """A run that depends on its history: clients are drawn, the server has a state, and the learning rate changes."""
    defaults = {
        "num_rounds": 4,
        "clients_per_round": 2,
        "max_steps": 2,
        "server_optimizer": "fedadam",
        "lr_scheduler_type": "linear",
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
    }
    return make_trainer(folder, **{**defaults, **kwargs})


def comparable(history):
    timed = ("_seconds", "_runtime", "_per_second", "_preparation_time")
    return [{key: value for key, value in record.items() if not key.endswith(timed)} for record in history]


class StopAfter(FederatedCallback):
    """An interruption at the end of a round, for tests in one process."""

    def __init__(self, round_number):
        self.round_number = round_number

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.round_number:
            raise KeyboardInterrupt


def interrupted(folder, after, **kwargs):
    trainer = resumable_trainer(folder, callbacks=[StopAfter(after), *kwargs.pop("callbacks", [])], **kwargs)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def resumed_after(number, whole, folder, **kwargs) -> FederatedTrainer:
    """
    Resume a run from what one that was not interrupted had written by the end of a round. So the rounds before are
    trained once. `test_resuming.py` has runs that are interrupted, and processes that are killed.
    """
    later = {f"checkpoint-{later}" for later in range(number + 1, whole.args.num_rounds + 1)}
    shutil.copytree(whole.args.output_dir, folder, ignore=lambda _, names: later.intersection(names))
    resumed = resumable_trainer(folder, **kwargs)
    torch.manual_seed(1234)  # the state of the process does not matter
    resumed.train(resume_from_checkpoint=True)
    return resumed


def logged(monkeypatch, module="resuming") -> list[str]:
    warnings = []
    monkeypatch.setattr(f"peft_ravan.trainers.{module}.logger.warning", warnings.append)
    return warnings


REPO = "tester/ward-notes"


FILES = {
    ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "federation.json", "rounds.jsonl",
    "ravan/adapter_config.json", "ravan/adapter_model.safetensors",
}  # fmt: skip


SMALL = {"num_rounds": 2, "max_steps": 1, "hub_model_id": REPO}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(14).reshape(2, 7) + 4).logits


def ravan_bert(**kwargs):
    config = RavanConfig(r=3, num_heads=2, task_type="SEQ_CLS", target_modules=FOUR_TARGETS, **kwargs)
    return get_peft_model(tiny_bert(), config)


class WithStatistics(nn.Module):
    """A base model and a head that both keep running statistics."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))

    def forward(self, x):
        return self.head(self.norm(self.body(x)))
