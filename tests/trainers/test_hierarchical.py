"""
Federations of federations: an edge is a server of its own clients and a client of the root. It answers the root's task
with one reply, and the root ends up where a server of all clients would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from peft_ravan.trainers.compression import ExchangeSettings, changes, compress
from peft_ravan.trainers.exchange import ClientReply, ClientTask
from peft_ravan.trainers.server import MergeSettings, Server, ServerSettings, ServerState

from .helpers import assert_same


CORE, HEAD = "base_model.model.q.ravan_H", "base_model.model.classifier.weight"
REGIONS = {"north": {"a": 1, "b": 3}, "south": {"c": 2, "d": 2}}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
ALL = {client: n for clients in REGIONS.values() for client, n in clients.items()}


class Edge:
    """
    A server of some clients that answers the tasks of a root.

    Args:
        settings ([`ServerSettings`]): How it runs its rounds.
    """

    def __init__(self, settings: ServerSettings):
        self.settings = settings

    def train(self, task: ClientTask) -> ClientReply:
        before = ServerState(task.state, round=task.round_number - 1, control=task.control or {})
        server = Server(self.settings, before)
        tasks = server.open(task.round_number)
        record = server.close(task.round_number, replies_to(tasks, self.settings.client_sizes))
        control = server.state.control
        return ClientReply.to(
            task,
            update=server.state.global_state,
            num_examples=record["num_examples"],
            train_loss=record["train_loss"],
            learning_rate=record["learning_rate"],
            control_change={name: moved - before.control.get(name, 0) for name, moved in control.items()} or None,
        )


def start(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {CORE: torch.zeros(2, 2, 2, dtype=dtype), HEAD: torch.ones(3, 2, dtype=dtype)}


def settings(sizes: Mapping[str, int], method: str = "ravan", **more) -> ServerSettings:
    options = {name: more.pop(name) for name in ("options", "server_optimizer") if name in more}
    return ServerSettings(sizes, MergeSettings(method, **options), run="autumn", **more)


def noise(client: str, round_number: int, name: str, like: torch.Tensor) -> torch.Tensor:
    seed = int(hashlib.sha256(f"{client} {round_number} {name}".encode()).hexdigest()[:8], 16)
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def replies_to(tasks: Sequence[ClientTask], sizes: Mapping[str, int]) -> Iterator[ClientReply]:
    """What clients send. It depends on what they were sent, on their names and on the round."""
    for task in tasks:
        trained = {name: 0.5 * t + noise(task.client, task.round_number, name, t) for name, t in task.state.items()}
        if task.upload_dtype is not None:
            trained = compress(changes(trained, task.state), task.upload_dtype, task.seed)
        control_change = None
        if task.control is not None:
            control_change = {"h": noise(task.client, task.round_number, "control", torch.zeros(3).double())}
        yield ClientReply.to(
            task,
            update=trained,
            num_examples=sizes[task.client],
            train_loss=float(len(task.client) + ord(task.client)),
            learning_rate=0.1,
            control_change=control_change,
            upload_dtype=task.upload_dtype,
        )


def of_edges(tasks: Sequence[ClientTask], edges: Mapping[str, Edge]) -> Iterator[ClientReply]:
    """The replies of edges, which have travelled as bytes, as have the tasks."""
    for task in tasks:
        reply = edges[task.client].train(ClientTask.from_bytes(task.to_bytes()))
        yield ClientReply.from_bytes(reply.to_bytes())


def run_both(rounds: int = 3, dtype: torch.dtype = torch.float64, **more) -> tuple[Server, Server, list]:
    """A server of all clients, and one of edges, with their records."""
    exchange = more.pop("exchange", ExchangeSettings())
    flat = Server(settings(ALL, exchange=exchange, **more), ServerState(start(dtype)))
    root = Server(settings({region: sum(sizes.values()) for region, sizes in REGIONS.items()}, **more), flat.state)
    own = {"scaffold": more.get("scaffold", False)}  # optimizers, factors and means of rounds belong to the root
    edges = {region: Edge(settings(sizes, exchange=exchange, **own)) for region, sizes in REGIONS.items()}
    records = []
    for number in range(1, rounds + 1):
        of_flat = flat.close(number, replies_to(flat.open(number), ALL))
        records.append((of_flat, root.close(number, of_edges(root.open(number), edges))))
    return flat, root, records


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"server_optimizer": "fedadam"},
        {"average_rounds": None},
        {"method": "task_arithmetic", "options": {"scale": 1.5}},
    ],
    ids=["mean", "server optimizer", "mean of rounds", "task arithmetic"],
)
def test_a_root_of_edges_ends_up_where_a_server_of_all_clients_does(more):
    flat, root, records = run_both(**more)
    assert_same(flat.state.global_state, root.state.global_state, **CLOSE)
    assert_same(flat.state.running_mean, root.state.running_mean, **CLOSE)
    for one, two in records:
        assert two["clients"] == list(REGIONS) and one["num_examples"] == two["num_examples"] == 8
        assert one["train_loss"] == pytest.approx(two["train_loss"])
        # one task and one reply for each edge
        assert one["download_bytes"] / two["download_bytes"] == pytest.approx(2, rel=0.05)


def test_small_uploads_are_rounded_once_if_edges_send_float32():
    flat, root, _ = run_both(exchange=ExchangeSettings("int4", "float32"), dtype=torch.float32)
    assert_same(flat.state.global_state, root.state.global_state, rtol=1e-5, atol=1e-5)
    unrounded, _, _ = run_both(dtype=torch.float32)
    # the clients have rounded, and alike: the seeds of a round depend on the names of clients, and not on their server
    assert (flat.state.global_state[CORE] - unrounded.state.global_state[CORE]).abs().max() > 0.01


def test_an_edge_whose_clients_have_failed_costs_the_round_its_clients():
    root = Server(settings({"north": 4, "south": 4}), ServerState(start()))
    north, south = root.open(1)
    replies = [Edge(settings(REGIONS["north"])).train(north), ClientReply.to(south, failure="OSError: no route")]
    record = root.close(1, replies)
    alone = Server(settings(REGIONS["north"]), ServerState(start()))
    alone.close(1, replies_to(alone.open(1), ALL))
    assert record["num_examples"] == 4 and record["failed_clients"][0]["client"] == "south"
    assert_same(root.state.global_state, alone.state.global_state)


def test_control_variates_are_exact_if_edges_have_equally_many_clients():
    flat, root, _ = run_both(scaffold=True)
    assert flat.state.control["h"].abs().max() > 0.1
    assert_same(flat.state.control, root.state.control, **CLOSE)


def test_control_variates_are_not_exact_if_some_edges_have_more_clients(monkeypatch):
    # the root divides by the number of edges, so every edge counts as much as the others
    monkeypatch.setitem(REGIONS, "north", {"a": 1, "b": 3, "e": 2})
    monkeypatch.setitem(ALL, "e", 2)
    flat, root, _ = run_both(rounds=1, scaffold=True)
    assert (flat.state.control["h"] - root.state.control["h"]).abs().max() > 0.05


def test_the_examples_behind_each_head_cannot_be_sent_as_trained_heads():
    root = Server(settings({"north": 4, "south": 4}), ServerState(start()))
    replies = [Edge(settings(sizes)).train(task) for sizes, task in zip(REGIONS.values(), root.open(1), strict=True)]
    counted = replace(replies[0], trained_heads={CORE: torch.tensor([4, 1])})
    record = root.close(1, [ClientReply.from_bytes(reply.to_bytes()) for reply in (counted, replies[1])])
    assert record["clients"] == ["south"]
    assert "must be a bool tensor" in record["failed_clients"][0]["reason"]


def test_a_second_reply_of_an_edge_needs_a_name_of_its_own(monkeypatch):
    monkeypatch.setattr("peft_ravan.trainers.server.inbox.logger.warning", lambda text: None)
    root = Server(settings({"north/all": 1, "north/first": 3, "south": 4}), ServerState(start()))
    names = {task.client: task for task in root.open(1)}

    def reply(name: str, n: int, *heads: float | None) -> ClientReply:
        trained = torch.tensor([head is not None for head in heads])
        values = torch.tensor([head for head in heads if head is not None], dtype=torch.float64)
        update = {CORE: values.view(-1, 1, 1).expand(-1, 2, 2).clone(), HEAD: torch.full((3, 2), n).double()}
        return ClientReply.to(names[name], update=update, num_examples=n, trained_heads={CORE: trained})

    replies = [reply("north/all", 1, 2.0, 4.0), reply("north/first", 3, 6.0, None), reply("south", 4, 9.0, 9.0)]
    root.close(1, [replies[0], replace(replies[1], client="north/all"), *replies[1:]])
    merged = root.state.global_state
    # (1 * 2 + 3 * 6 + 4 * 9) / 8, (1 * 4 + 4 * 9) / 5, and (1 * 1 + 3 * 3 + 4 * 4) / 8
    assert merged[CORE][:, 0, 0].tolist() == [7.0, 8.0] and merged[HEAD][0, 0].item() == 3.25
