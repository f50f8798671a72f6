"""A client around any Trainer, with only its own data."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer

from peft_ravan.trainers import FederatedArguments, FederatedTrainer
from peft_ravan.trainers.client.local_client import LocalClient
from peft_ravan.trainers.client.settings import ClientSettings
from peft_ravan.trainers.client.store import ClientStore, ClientStoreError
from peft_ravan.trainers.exchange import ClientReply, ClientTask
from peft_ravan.trainers.runners import Runner
from peft_ravan.trainers.server.merging import MergeSettings
from peft_ravan.trainers.server.participation import Participation
from peft_ravan.trainers.server.server import Server
from peft_ravan.trainers.server.settings import ServerSettings
from peft_ravan.trainers.server.state import ServerState

from ..conftest import classification_dataset, tiny_bert
from .helpers import OverBytes, adapter_state, arguments, assert_same, lora, make_trainer, ravan


def alone(folder, dataset, adapter=None, settings=None, store=None, **kwargs) -> LocalClient:
    """A client in a process that knows neither the data nor the number of the others; `num_clients` is not used."""
    args = arguments(folder, **{"num_clients": 20, **kwargs})
    trainer = Trainer(get_peft_model(tiny_bert(), adapter or ravan()), args, train_dataset=dataset)
    return LocalClient(trainer, store, settings=settings)


def by_hand(clients: dict[str, LocalClient], state, num_rounds: int, as_bytes: bool = False, **settings) -> Server:
    """A federation without a FederatedTrainer: a server and independent clients."""
    sizes = {name: len(client.trainer.train_dataset) for name, client in clients.items()}
    config = next(iter(clients.values())).trainer.model.active_peft_config
    server = Server(ServerSettings(sizes, MergeSettings().of(config), **settings), ServerState(state))
    for round_number in range(1, num_rounds + 1):
        tasks = server.open(round_number)
        if as_bytes:
            replies = [clients[task.client].train(ClientTask.from_bytes(task.to_bytes())) for task in tasks]
            replies = [ClientReply.from_bytes(reply.to_bytes()) for reply in replies]
        else:
            replies = Runner().run(tasks, lambda task: clients[task.client].train(task))
        record = server.close(round_number, replies)
        assert not record["failed_clients"], record
    return server


@pytest.mark.parametrize("adapter", [ravan, lora])
@pytest.mark.parametrize(
    "options", [{}, {"scaffold": True, "local_parameters": ["classifier"], "optim": "sgd"}], ids=str
)
def test_independent_clients_give_the_same_result_as_a_federated_trainer(tmp_path, adapter, options):
    trainer = make_trainer(tmp_path / "one", adapter(), seed=3, clients_per_round=2, num_rounds=3, **options)
    state = {n: t for n, t in adapter_state(trainer).items() if not (options and "classifier" in n)}
    settings = ClientSettings(tuple(options.get("local_parameters", ())))
    clients = {
        name: alone(
            tmp_path / name,
            dataset,
            adapter(),
            settings,
            ClientStore(tmp_path / name),
            seed=3,
            optim=trainer.args.optim,
        )
        for name, dataset in trainer.clients.items()
    }
    trainer.train()
    server = by_hand(
        clients, state, 3, as_bytes=True, seed=3, scaffold=bool(options),
        participation=Participation(clients_per_round=2, seed=3),
    )  # fmt: skip
    assert_same(server.state.global_state, trainer.last_global_state)
    assert server.state.kept == trainer.last_server_state.kept


RUNS = {
    "budgets": {"client_budgets": "uniform", "head_selection": "gradient"},
    "scaffold": {"scaffold": True, "optim": "sgd"},
    "personal": {"local_parameters": ["classifier"], "clients_per_round": 2},
    "privacy": {"privacy": {"clip_norm": 1.0, "noise_multiplier": 0.5, "noise_seed": 11}},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_over_bytes_is_the_run_and_the_bytes_are_those_that_it_counts(tmp_path, monkeypatch, options):
    direct = make_trainer(tmp_path / "direct", **options)
    direct.train()
    runner = OverBytes()
    monkeypatch.setattr("peft_ravan.trainers.federated_mixin.make_runner", lambda parallel: runner)
    sent = make_trainer(tmp_path / "sent", **options)
    output = sent.train()
    assert_same(direct.last_global_state, sent.last_global_state)
    assert (output.metrics["download_bytes"], output.metrics["upload_bytes"]) == (runner.down, runner.up)


def task_of(client: LocalClient, **fields) -> ClientTask:
    return ClientTask(**{"round_number": 1, "client": "me", "state": client.adapter.read(), "seed": 5, **fields})


def test_a_trainer_is_as_before_after_a_task(tmp_path):
    client = alone(tmp_path, classification_dataset(40))
    trainer = client.trainer
    before, args = set(vars(trainer)), copy.copy(trainer.args)
    reply = client.train(task_of(client, max_steps=2, learning_rate_factor=0.5))
    assert reply.failure is None and reply.learning_rate == 0.5 * args.learning_rate
    assert set(vars(trainer)) - before <= {
        "_train_batch_size",
        "current_gradient_accumulation_steps",
        "is_fsdp_xla_enabled",
    } | {name for name in vars(trainer) if not callable(getattr(trainer, name))}
    assert trainer.args.to_dict() == args.to_dict() and trainer.state.global_step == 0
    assert not {"create_optimizer", "create_scheduler", "log", "floating_point_ops"} & set(vars(trainer))


def test_a_task_is_repeated_bit_for_bit(tmp_path):
    client = alone(tmp_path, classification_dataset(40))
    task = task_of(client, max_steps=2)
    first, second = client.train(task), client.train(task)
    assert_same(first.update, second.update)
    assert any(not torch.equal(tensor, task.state[name]) for name, tensor in first.update.items())


def test_what_goes_wrong_is_said_in_the_reply(tmp_path):
    client = alone(tmp_path, classification_dataset(40))
    state = {name: torch.zeros(1) for name in client.adapter.read()}
    reply = client.train(task_of(client, state=state))
    assert (
        reply.update is None
        and "has the shape [1], and that of the model" in reply.failure
        and reply.error is not None
    )
    some = dict(list(client.adapter.read().items())[1:])
    assert "lacks 'base_model.model" in client.train(task_of(client, state=some)).failure
    others = {**client.adapter.read(), "lm_head": torch.zeros(1)}
    assert "has 'lm_head'" in client.train(task_of(client, state=others)).failure
    slow = alone(tmp_path, classification_dataset(40), settings=ClientSettings(timeout=1e-9))
    assert "longer than `client_timeout`" in slow.train(task_of(slow)).failure


def test_a_client_that_keeps_state_needs_a_store(tmp_path):
    settings = ClientSettings(("classifier",))
    client = alone(tmp_path, classification_dataset(40), settings=settings)
    state = client.take_start()
    assert "has no store" in client.train(task_of(client, state=state, max_steps=1)).failure
    storing = alone(tmp_path, classification_dataset(40), settings=settings, store=ClientStore(tmp_path))
    with pytest.raises(ClientStoreError, match="'me' keeps could not be read"):
        storing.train(task_of(storing, round_number=4, state=state, kept_in=2))


def test_a_federated_trainer_has_the_clients_it_was_given_and_a_local_client_needs_none(tmp_path):
    """`num_clients` is the number in the federation; a process with a single client is not a federation."""
    one = {"north": classification_dataset(20)}
    args = FederatedArguments(str(tmp_path), num_clients=20, report_to="none", use_cpu=True, max_steps=1)
    with pytest.raises(ValueError, match="`num_clients` is 20, but the data has 1 clients"):
        FederatedTrainer(get_peft_model(tiny_bert(), ravan()), args, train_dataset=one)
    client = LocalClient(Trainer(get_peft_model(tiny_bert(), ravan()), args, train_dataset=one["north"]))
    reply = client.train(task_of(client))
    assert reply.failure is None and reply.num_examples == 20
