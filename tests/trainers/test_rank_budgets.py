"""Clients that train only the leading ranks of a LoRA adapter, within the rounds of a federation."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, default_data_collator

from peft_ravan import RavanConfig
from peft_ravan.merging import MERGE_METHODS, ClientUpdate, ServerStep, lora_state_for_client, merge
from peft_ravan.trainers.client.live_adapter import LiveAdapter
from peft_ravan.trainers.client.local_client import LocalClient
from peft_ravan.trainers.exchange import Budget, ClientReply, ClientTask, share_of
from peft_ravan.trainers.leading_ranks import leading_part, with_zeros
from peft_ravan.trainers.runners import Runner
from peft_ravan.trainers.server.budgets import BUDGET_DISTRIBUTIONS, draw_client_budgets
from peft_ravan.trainers.server.merging import MergeSettings
from peft_ravan.trainers.server.server import Server
from peft_ravan.trainers.server.settings import ServerSettings
from peft_ravan.trainers.server.state import ServerState

from ..conftest import classification_dataset, randomize_adapter, tiny_bert
from .helpers import (
    FOUR_TARGETS,
    OverBytes,
    adapter_state,
    arguments,
    assert_same,
    comparable,
    make_trainer,
    resumable_trainer,
    resumed_after,
)


RANK, NUM_TARGETS = 4, 4
# client_0 has rank 1, client_1 rank 2, client_2 rank 3 and client_3 all
SHARES = {"client_0": 0.1, "client_1": 0.5, "client_2": 0.75}
IN_ROUNDS = [name for name, method in MERGE_METHODS.items() if method.different_ranks]


def lora(**kwargs) -> LoraConfig:
    defaults = {"r": RANK, "lora_alpha": 8, "task_type": "SEQ_CLS", "target_modules": FOUR_TARGETS}
    return LoraConfig(**{**defaults, **kwargs})


class Uploads:
    """Keeps what clients upload, as a fault that changes nothing."""

    def __init__(self):
        self.states: dict[str, dict[str, torch.Tensor]] = {}
        self.num_examples: dict[str, int] = {}

    def __call__(self, client, round_number, update: ClientUpdate):
        self.states[client] = {name: tensor.clone() for name, tensor in update.state.items()}
        self.num_examples[client] = update.num_examples

    def ranks(self, client) -> set[int]:
        return {len(tensor) for name, tensor in self.states[client].items() if ".lora_A." in name} | {
            tensor.shape[1] for name, tensor in self.states[client].items() if ".lora_B." in name
        }


def trainer_with_budgets(tmp_path, adapter=None, merge_method="hetlora", **kwargs):
    """A trainer whose global adapter has products in all ranks."""
    defaults = {"num_rounds": 1, "max_steps": 2, "client_budgets": SHARES, "merge_method": merge_method}
    trainer = make_trainer(tmp_path, adapter or lora(), **{**defaults, **kwargs})
    randomize_adapter(trainer.model, scale=0.05)
    return trainer


def run(tmp_path, adapter=None, merge_method="hetlora", **kwargs):
    trainer = trainer_with_budgets(tmp_path, adapter, merge_method, **kwargs)
    trainer.train()
    return trainer


# ---- What a share means ---------------------------------------------------------------


@pytest.mark.parametrize(
    "share, rank, expected",
    [
        (0.01, 4, 1),
        (0.25, 4, 1),
        (0.374, 4, 1),
        (0.375, 4, 2),
        (0.5, 4, 2),
        (0.625, 4, 3),
        (0.29, 50, 15),
        (1.0, 4, 4),
    ],
)
def test_a_share_of_a_rank_is_rounded_as_one_of_heads(share, rank, expected):
    assert share_of(share, rank) == expected


A, B, HEAD = "layer.lora_A.weight", "layer.lora_B.weight", "head.weight"
EMBEDDING_A, EMBEDDING_B = "words.lora_embedding_A", "words.lora_embedding_B"
STATE = {
    A: torch.arange(12.0).reshape(4, 3),
    B: torch.arange(8.0).reshape(2, 4),
    EMBEDDING_A: torch.arange(10.0).reshape(2, 5),  # of rank 2
    EMBEDDING_B: torch.arange(6.0).reshape(3, 2),
    HEAD: torch.ones(4, 4),
}


def test_the_leading_part_has_the_first_rows_of_A_and_columns_of_B_of_each_rank():
    part = leading_part(STATE, 0.5)
    assert {name: tensor.tolist() for name, tensor in part.items()} == {
        A: [[0, 1, 2], [3, 4, 5]],
        B: [[0, 1], [4, 5]],
        EMBEDDING_A: [[0, 1, 2, 3, 4]],
        EMBEDDING_B: [[0], [2], [4]],
        HEAD: [[1] * 4] * 4,
    }
    assert_same(leading_part(STATE, 1.0), STATE)
    cores = {"layer.ravan_H": torch.ones(4, 2, 2)}
    assert_same(leading_part(cores, 0.25), cores)


def test_zeros_stand_in_for_the_other_ranks():
    shapes = {name: tensor.shape for name, tensor in STATE.items()}
    for given in (STATE, leading_part(STATE, 0.5)):
        filled = with_zeros(given, shapes, 0.5)
        assert {name: tensor.shape for name, tensor in filled.items()} == shapes
        assert_same(leading_part(filled, 0.5), leading_part(STATE, 0.5))
        assert not filled[A][2:].any() and not filled[B][:, 2:].any() and not filled[EMBEDDING_A][1:].any()
    assert_same(with_zeros(STATE, shapes, 1.0), STATE)
    # another rank than the client was asked for stays what it is, so that loading it is refused
    assert with_zeros(leading_part(STATE, 0.75), shapes, 0.5)[A].shape == (3, 3)


# ---- Equivalences ---------------------------------------------------------------------


def test_a_budget_of_all_ranks_is_no_budget_bit_for_bit(tmp_path):
    without = run(tmp_path, client_budgets=None, num_rounds=2)
    trainer = run(tmp_path, client_budgets={"client_0": 1.0, "client_1": 0.99}, num_rounds=2)
    assert_same(adapter_state(trainer), adapter_state(without))
    for record, plain in zip(trainer.state.log_history, without.state.log_history, strict=True):
        assert record.pop("ranks_trained") == [RANK * NUM_TARGETS] * 4
        assert plain["download_bytes"] < record.pop("download_bytes") < plain.pop("download_bytes") + 4 * 150
        assert comparable([record]) == comparable([plain])


class Mixed(nn.Module):
    """An embedding, a convolution and a linear layer, each of which LoRA adapts in its own way."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 6)
        self.conv = nn.Conv2d(1, 5, kernel_size=3, padding=1)
        self.out = nn.Linear(5, 3)

    def forward(self, x, labels):
        hidden = torch.tanh(self.conv(self.words(x)[:, None]))
        logits = self.out(hidden.mean(dim=(2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def mixed_dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 10, (24, 7), generator=generator)
    return Dataset.from_dict({"x": words.tolist(), "labels": (words.sum(1) % 3).tolist()})


def mixed_lora(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["words", "conv", "out"], **kwargs})


def seeded(make):
    torch.manual_seed(0)
    return make()


class InOrder(Trainer):
    """Reads its data in order, so that a loop can be written without Trainer's samplers."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def narrow_model(model, state, config: LoraConfig, share: float):
    """LoRA with the leading ranks of a state only, and the scaling of the whole one."""
    ranks = {}
    for name, tensor in state.items():
        if ".lora_A" in name or ".lora_embedding_A" in name:
            module = name.removeprefix("base_model.model.").split(".lora_")[0]
            ranks[module] = (len(tensor), share_of(share, len(tensor)))
    narrow = copy.copy(config)
    narrow.rank_pattern = {module: rank for module, (_, rank) in ranks.items()}
    power = 0.5 if config.use_rslora else 1.0
    narrow.alpha_pattern = {
        module: config.alpha_pattern.get(module, config.lora_alpha) * (rank / whole) ** power
        for module, (whole, rank) in ranks.items()
    }
    model = get_peft_model(model, narrow)
    result = set_peft_model_state_dict(model, leading_part(state, share))
    assert not result.unexpected_keys
    return model


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"conv": 2}, "alpha_pattern": {"out": 3}},
        {"lora_bias": True, "target_modules": ["conv", "out"]},
        {"use_dora": True, "target_modules": ["conv", "out"]},
    ],
    ids=str,
)
def test_a_client_is_a_loop_over_lora_of_its_own_rank_with_the_scaling_of_the_global_one(tmp_path, options, optim):
    config, share, dataset = mixed_lora(**options), 0.5, mixed_dataset()
    args = arguments(
        tmp_path, max_steps=3, optim=optim, weight_decay=0.1, learning_rate=0.05, remove_unused_columns=False
    )
    model = get_peft_model(seeded(Mixed), config)
    randomize_adapter(model, scale=0.3)
    client = LocalClient(InOrder(model, args, train_dataset=dataset, data_collator=default_data_collator))
    state = client.take_start()
    budget = Budget(share, "random", "layer", 0)
    reply = client.train(ClientTask(1, "north", leading_part(state, share), 7, budget=budget))
    assert reply.failure is None, reply.failure

    narrow = narrow_model(seeded(Mixed), state, config, share)
    assert sum(p.numel() for p in narrow.parameters() if p.requires_grad) < 0.7 * sum(
        tensor.numel() for tensor in state.values()
    )
    decayed = [p for n, p in narrow.named_parameters() if p.requires_grad and not n.endswith("bias")]
    others = [p for n, p in narrow.named_parameters() if p.requires_grad and n.endswith("bias")]
    kind = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}[optim]
    optimizer = kind([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.05)
    for batch in DataLoader(dataset, batch_size=8, collate_fn=default_data_collator):  # three of them
        optimizer.zero_grad()
        narrow(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_([*decayed, *others], args.max_grad_norm)
        optimizer.step()
    trained = get_peft_model_state_dict(narrow)
    assert_same(dict(sorted(reply.update.items())), dict(sorted(trained.items())), atol=1e-5, rtol=1e-4)
    assert all((reply.update[name] != tensor).any() for name, tensor in leading_part(state, share).items())


def test_dropout_is_that_of_lora_of_its_own_rank(tmp_path):
    adapter, uploads = lora(lora_dropout=0.4), Uploads()
    trainer = trainer_with_budgets(tmp_path, adapter, client_budgets=0.5, num_clients=2, client_fault=uploads)
    state = adapter_state(trainer)
    own = Uploads()
    narrow = make_trainer(
        tmp_path, lora(r=2, lora_alpha=4, lora_dropout=0.4), num_rounds=1, max_steps=2, num_clients=2, client_fault=own,
        merge_method="hetlora",
    )  # fmt: skip
    LiveAdapter(narrow.model).load(leading_part(state, 0.5))
    trainer.train(), narrow.train()
    for client in ("client_0", "client_1"):
        assert_same(uploads.states[client], own.states[client], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("adapter", [{}, {"use_rslora": True}, {"rank_pattern": {"query": 2}}], ids=str)
@pytest.mark.parametrize("merge_method", [name for name in IN_ROUNDS if name != "flora"])
def test_a_round_is_the_merge_of_what_clients_of_these_ranks_have_uploaded(tmp_path, merge_method, adapter):
    uploads, config = Uploads(), lora(**adapter)
    trainer = trainer_with_budgets(
        tmp_path, config, merge_method, client_fault=uploads, partition="dirichlet", num_clients=5
    )
    state = adapter_state(trainer)
    trainer.train()
    updates = []
    for client in trainer.clients:
        ranks = {name: len(t) for name, t in uploads.states[client].items() if ".lora_A." in name}
        share = SHARES.get(client, 1.0)
        assert ranks == {name: share_of(share, len(state[name])) for name in ranks}
        # alpha such that the client has the scaling of the global adapter
        modules = {name.removeprefix("base_model.model.").split(".lora_")[0]: rank for name, rank in ranks.items()}
        power = 0.5 if config.use_rslora else 1.0
        own = LoraConfig(
            r=RANK, use_rslora=config.use_rslora, rank_pattern=modules,
            alpha_pattern={
                module: 8 * (rank / (2 if adapter.get("rank_pattern") and "query" in module else RANK)) ** power
                for module, rank in modules.items()
            },
        )  # fmt: skip
        updates.append(ClientUpdate(uploads.states[client], uploads.num_examples[client], client, config=own))
    expected = merge(state, updates, merge_method, config=trainer.model.active_peft_config)
    assert_same(trainer.last_global_state, expected.state, atol=1e-6, rtol=1e-5)
    assert any((state[name] != expected.state[name]).any() for name in state)


def test_flora_adds_the_mean_of_products_of_different_ranks_to_the_base_weights(tmp_path):
    uploads = Uploads()
    trainer = trainer_with_budgets(tmp_path, merge_method="flora", client_fault=uploads, num_clients=5)
    model = trainer.model
    before = {name: tensor.clone() for name, tensor in model.named_parameters() if name.endswith("base_layer.weight")}
    assert len(before) == NUM_TARGETS
    trainer.train()
    total = sum(uploads.num_examples.values())
    for name, weight in before.items():
        module = name.removesuffix("base_layer.weight")
        expected = weight.clone()
        for client, state in uploads.states.items():
            B, A = state[f"{module}lora_B.weight"], state[f"{module}lora_A.weight"]
            assert len(A) == share_of(SHARES.get(client, 1.0), RANK)
            expected += uploads.num_examples[client] / total * (8 / RANK) * B @ A
        assert_same({name: trainer.last_global_state[name]}, {name: expected}, atol=1e-6, rtol=1e-5)
        assert (expected - weight).abs().max() > 1e-3


def test_clients_get_what_lora_state_for_client_gives_them_with_the_scaling_of_the_global_adapter(tmp_path):
    trainer = trainer_with_budgets(tmp_path)
    state, config = adapter_state(trainer), trainer.model.active_peft_config
    of_rank_2 = lora(r=2, lora_alpha=4)
    assert_same(leading_part(state, 0.5), lora_state_for_client(state, config, of_rank_2))


# ---- Training and uploads -------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1},
        {"proximal_mu": 0.1},
        {"max_grad_norm": 0.0, "optim": "adafactor"},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_the_other_ranks_stay_zero_while_a_client_trains(tmp_path, options):
    seen = {}

    class Watch(Uploads):
        def __call__(self, client, round_number, update):
            super().__call__(client, round_number, update)
            seen[client] = LiveAdapter(trainer.model).read()

    uploads = Watch()
    trainer = trainer_with_budgets(tmp_path, client_fault=uploads, num_rounds=2, **options)
    trainer.train()
    for client, rank in {"client_0": 1, "client_1": 2, "client_2": 3, "client_3": 4}.items():
        assert uploads.ranks(client) == {rank}
        for name, tensor in seen[client].items():
            if ".lora_" in name:
                tensor = tensor if ".lora_A." in name else tensor.T
                assert tensor[:rank].any(dim=1).all() and not tensor[rank:].any()
    assert [record["ranks_trained"] for record in trainer.state.log_history] == [[4, 8, 12, 16]] * 2
    json.dumps(trainer.state.log_history)


@pytest.mark.parametrize("dtypes", [{}, {"upload_dtype": "int4", "download_dtype": "int8"}], ids=str)
def test_uploads_and_downloads_shrink_with_the_budget(tmp_path, dtypes):
    records = {
        share: run(tmp_path, client_budgets=share, max_steps=1, **dtypes).state.log_history[0]
        for share in (0.25, 0.5, 1.0)
    }
    # the queries and values of two layers of width 32, of 4 clients
    per_rank = 4 * NUM_TARGETS * (32 + 32)
    for name, bytes_per_number in (("upload_bytes", 0.53), ("download_bytes", 1.03)):
        size = per_rank * (bytes_per_number if dtypes else 4)
        assert records[0.5][name] - records[0.25][name] == pytest.approx(size, rel=0.1)
        # two ranks more, and the lists of the tensors are about as long
        assert records[1.0][name] - records[0.5][name] == pytest.approx(2 * size, rel=0.1)


@pytest.mark.parametrize("merge_method", IN_ROUNDS)
def test_methods_that_merge_different_ranks(tmp_path, merge_method):
    trainer = run(tmp_path, merge_method=merge_method, client_budgets="uniform", num_clients=5, num_rounds=2)
    assert all(torch.isfinite(tensor).all() for tensor in adapter_state(trainer).values())
    assert not any(record["failed_clients"] for record in trainer.state.log_history)
    assert all(math.isfinite(record["train_loss"]) for record in trainer.state.log_history)


def test_all_methods_are_there():
    assert sorted(IN_ROUNDS) == ["flexlora", "flora", "hetlora", "krum", "median", "multi_krum", "trimmed_mean"]


@pytest.mark.parametrize("server_optimizer", ["fedadam", "fedavgm"])
@pytest.mark.parametrize("merge_method", ["hetlora", "flexlora"])
def test_a_server_optimizer_steps_towards_the_merge_at_the_global_rank(tmp_path, merge_method, server_optimizer):
    uploads = Uploads()
    trainer = trainer_with_budgets(
        tmp_path, merge_method=merge_method, client_fault=uploads, server_optimizer=server_optimizer
    )
    state = adapter_state(trainer)
    trainer.train()
    updates = []
    for client in trainer.clients:
        rank = share_of(SHARES.get(client, 1.0), RANK)
        config = lora(r=rank, lora_alpha=2 * rank)
        updates.append(ClientUpdate(uploads.states[client], uploads.num_examples[client], client, config=config))
    step = ServerStep(server_optimizer)
    expected = merge(state, updates, merge_method, config=trainer.model.active_peft_config, server_step=step)
    assert_same(trainer.last_global_state, expected.state, atol=1e-6, rtol=1e-5)


def test_budgets_are_drawn_from_a_distribution(tmp_path):
    for distribution in BUDGET_DISTRIBUTIONS:
        trainer = trainer_with_budgets(tmp_path, client_budgets=distribution, federated_seed=7)
        assert trainer.client_budgets == draw_client_budgets(trainer.clients, distribution, 7)
    trainer.train()
    assert trainer.state.log_history[0]["ranks_trained"] == [
        NUM_TARGETS * share_of(share, RANK) for share in trainer.client_budgets.values()
    ]
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Ranks a client trains" in card and "the leading ones at every target" in card


@pytest.mark.parametrize("merge_method", ["hetlora", "flexlora"])
def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, merge_method):
    options = {"adapter": lora(), "client_budgets": "uniform", "merge_method": merge_method, "num_rounds": 3}
    whole = resumable_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = resumed_after(2, whole, tmp_path / "parts", **options)
    assert_same(adapter_state(resumed), adapter_state(whole))
    assert comparable(resumed.state.log_history) == comparable(whole.state.log_history)


def test_personal_products_are_trained_at_the_rank_of_the_client_and_stay_with_it(tmp_path):
    uploads = Uploads()
    trainer = trainer_with_budgets(
        tmp_path, client_fault=uploads, client_budgets=0.5, local_parameters=["(key|output).*lora_"], num_rounds=2
    )
    trainer.train()
    assert all(uploads.ranks(client) == {2} for client in trainer.clients)
    assert not any("key" in name or "output" in name for name in uploads.states["client_0"] if ".lora_" in name)
    for client in trainer.clients:
        kept = trainer._store.load(client, 2)
        assert len(kept) == 4
        for name, tensor in kept.items():
            tensor = tensor if ".lora_A." in name else tensor.T
            assert tensor[:2].any() and not tensor[2:].any()


def test_clients_are_personalized_within_their_budgets_and_evaluated_as_they_are_without(tmp_path):
    trainer = run(tmp_path, client_budgets=0.5, num_clients=2)
    state = adapter_state(trainer)
    plain = trainer.evaluate_clients()
    steps = trainer.evaluate_clients(personalization_steps=2)
    assert_same(adapter_state(trainer), state)
    full = run(tmp_path, client_budgets=None, num_clients=2)
    LiveAdapter(full.model).load(state)
    # without training, it is the adapter of all ranks that is evaluated
    assert full.evaluate_clients()["loss"].tolist() == plain["loss"].tolist()
    assert full.evaluate_clients(personalization_steps=2)["loss"].tolist() != steps["loss"].tolist()
    LiveAdapter(full.model).load(with_zeros(state, {name: tensor.shape for name, tensor in state.items()}, 0.5))
    # training starts from the leading ranks, and the others stay zero, so a client without a budget does the same
    after = full.evaluate_clients(personalization_steps=2)
    assert after["loss"].tolist() == pytest.approx(steps["loss"].tolist(), abs=1e-6)


# ---- Servers and clients ----------------------------------------------------------------


def make_server(state, config, shares, **kwargs) -> Server:
    settings = ServerSettings(
        dict.fromkeys(shares, 10), MergeSettings("hetlora", **kwargs).of(config), client_budgets=shares
    )
    return Server(settings, ServerState(state))


def small_state() -> dict[str, torch.Tensor]:
    prefix = "base_model.model."
    return {prefix + A: torch.ones(4, 3), prefix + B: torch.ones(2, 4)}


def test_clients_of_one_rank_are_sent_the_same_tensors(tmp_path):
    server = make_server(small_state(), lora(), {"north": 0.5, "south": 0.51, "east": 1.0})
    north, south, east = server.open(1)
    assert north.state is south.state and [len(t.state[f"base_model.model.{A}"]) for t in (north, east)] == [2, 4]


def test_an_upload_of_another_rank_than_the_client_was_asked_for_fails_only_this_client():
    server = make_server(small_state(), lora(), {"north": 0.5, "south": 0.5, "west": 1.0})
    tasks = server.open(1)
    replies = [
        ClientReply.to(task, update=leading_part(small_state(), share), num_examples=10)
        for task, share in zip(tasks, (0.5, 0.75, 0.75), strict=True)
    ]
    record = server.close(1, replies)
    assert record["clients"] == ["north"] and record["ranks_trained"] == [2]
    for failed, name in zip(record["failed_clients"], ("south", "west"), strict=True):
        assert failed["client"] == name
        rank = {"south": 2, "west": 4}[name]
        assert (
            f"must have shape ({rank}, 3), as in the part of the adapter that it was sent, got (3, 3)"
            in failed["reason"]
        )


def test_a_task_of_another_rank_than_the_budget_fails_the_client(tmp_path):
    trainer = Trainer(
        get_peft_model(tiny_bert(), lora()), arguments(tmp_path), train_dataset=classification_dataset(16)
    )
    client = LocalClient(trainer)
    state = client.take_start()
    task = ClientTask(1, "north", leading_part(state, 0.75), 7, budget=Budget(0.5, "random", "layer", 0))
    assert "has the shape [3, 32], and that of the model [4, 32]" in client.train(task).failure


def test_budgets_travel_as_bytes(tmp_path):
    here = run(tmp_path, num_rounds=2)
    there = trainer_with_budgets(tmp_path, num_rounds=2)
    there._runner = runner = OverBytes()
    there.train()
    assert_same(adapter_state(here), adapter_state(there))
    for name, counted in (("download_bytes", runner.down), ("upload_bytes", runner.up)):
        assert sum(record[name] for record in there.state.log_history) == counted
    assert isinstance(here._runner, Runner)


# ---- Refusals -----------------------------------------------------------------------------


RAVAN = RavanConfig(r=3, num_heads=2, task_type="SEQ_CLS")


@pytest.mark.parametrize(
    "adapter, options, message",
    [
        (lora(), {"merge_method": None}, "merge_method='fedavg' needs the same LoRA rank of every client. Choose one of: .*flexlora, hetlora"),
        (lora(), {"merge_method": "fedrpca"}, "merge_method='fedrpca' needs the same LoRA rank"),
        (IA3Config(task_type="SEQ_CLS"), {}, "heads of a Ravan adapter or of the rank of LoRA, but this adapter is IA3"),
        (lora(), {"head_selection": "weight"}, "head_selection='weight' is for heads .* LoRA, .* leading ranks"),
        (lora(), {"head_allocation": "global"}, "head_allocation='global' is for heads .* LoRA, .* leading ranks"),
        (lora(), {"scaffold": True}, "`scaffold` needs the gradients of the whole adapter"),
        (lora(), {"max_update_norm": 1.0}, "`client_budgets` below 1 .* LoRA .*`max_update_norm`"),
        (lora(use_dora=True), {}, "`client_budgets` below 1 .* DoRA"),
        (lora(target_parameters=["pooler.dense.weight"]), {}, "`client_budgets` below 1 .* `target_parameters`"),
        (lora(), {"client_budgets": {"ward": 0.5}}, "names the client 'ward'"),
        (lora(), {"privacy": {"clip_norm": 1.0, "noise_multiplier": 1.0}}, "plain mean"),
        (RAVAN, {"merge_method": "krum"}, "merge_method='krum' needs all heads"),
    ],
)  # fmt: skip
def test_what_does_not_work_is_refused_before_the_run(tmp_path, adapter, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, adapter, **{"client_budgets": 0.5, "merge_method": "hetlora", **options})


def test_what_needs_equal_ranks_works_with_budgets_of_1(tmp_path):
    make_trainer(tmp_path, lora(), client_budgets=1.0, merge_method="fedavg", max_update_norm=1.0)
    make_trainer(tmp_path, lora(use_dora=True), client_budgets=1.0, merge_method="fedavg")


def test_grouped_convolutions_are_refused(tmp_path):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, kernel_size=1, groups=2)

        def forward(self, x, labels):
            return {"loss": self.conv(x).sum()}

    dataset = Dataset.from_dict({"x": [[[[0.0]]] * 4] * 16, "labels": [0, 1] * 8})
    with pytest.raises(ValueError, match="`client_budgets` below 1 .*Grouped convolutions"):
        make_trainer(
            tmp_path, LoraConfig(r=4, target_modules=["conv"]), model=Grouped(), train_dataset=dataset,
            client_budgets=0.5, merge_method="hetlora", num_clients=2,
        )  # fmt: skip


def test_neither_secure_aggregation_nor_privacy_has_a_method_for_different_ranks():
    """So their own checks of the merge method refuse budgets of LoRA."""
    methods = [MERGE_METHODS[name] for name in IN_ROUNDS]
    assert not any(method.secure_aggregation or method.plain_mean for method in methods)
