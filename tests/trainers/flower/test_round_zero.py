"""Bases from the clients' gradients are made over Flower as on one machine, and nodes are sent them once."""

import pytest
import torch


pytest.importorskip("flwr")

from flwr.app import Message
from safetensors.torch import load_file

from peft_ravan import RavanConfig
from peft_ravan.trainers import read_history
from peft_ravan.trainers.flower.codec import to_record
from peft_ravan.trainers.flower.introduction import Bases

from ..helpers import assert_same, comparable, logged, make_trainer
from .grid import CountingGrid, InProcessGrid
from .helpers import NUM_CLIENTS, Federation, small


def gradient_svd() -> RavanConfig:
    return RavanConfig(r=2, num_heads=2, init_bases="gradient_svd", task_type="SEQ_CLS")


def expected(folder, **options):
    trainer = make_trainer(folder, gradient_svd(), num_clients=NUM_CLIENTS, max_steps=1, **options)
    trainer.train()
    trainer.save_model()
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def of_trainer(tmp_path_factory) -> dict[str, torch.Tensor]:
    return expected(tmp_path_factory.mktemp("trainer"))


def test_round_zero_gives_the_bases_of_a_federated_trainer_and_sends_them_once(tmp_path):
    adapter = expected(tmp_path / "trainer", bases_batches=2)
    federation = Federation(small(tmp_path / "flower", bases_batches=2), gradient_svd, grid_class=CountingGrid)
    federation.run()
    assert_same(federation.adapter(), adapter)
    assert comparable(federation.records) == comparable(read_history(tmp_path / "trainer"))
    sent = [node for kind, node in federation.grid.handled if kind == "train.bases"]
    assert sorted(sent) == sorted(federation.grid.contexts)


def test_seeded_bases_never_travel(tmp_path):
    federation = Federation(small(tmp_path, num_rounds=1), grid_class=CountingGrid)
    federation.run()
    assert {kind for kind, _ in federation.grid.handled} == {"query", "train"}


class Killed(CountingGrid):
    def handle(self, message, context):
        if message.metadata.group_id == "2":
            raise KeyboardInterrupt
        return super().handle(message, context)


def test_a_resumed_run_sends_them_to_the_nodes_of_its_own_run(tmp_path, of_trainer):
    options = {"num_rounds": 2, "save_strategy": "epoch"}
    with pytest.raises(KeyboardInterrupt):
        Federation(small(tmp_path / "flower", **options), gradient_svd, grid_class=Killed).run()
    again = small(tmp_path / "flower", **options, resume_from_checkpoint=True)
    federation = Federation(again, gradient_svd, grid_class=CountingGrid)
    federation.run()
    assert_same(federation.adapter(), of_trainer)
    assert [kind for kind, _ in federation.grid.handled].count("train.bases") == NUM_CLIENTS


def test_a_node_that_is_started_again_is_sent_them_again(tmp_path, of_trainer):
    class Restarted(CountingGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = super().send_and_receive(messages, timeout=timeout)
            if 107 in self.contexts and any(message.metadata.group_id == "1" for message in replies):
                self.connect(900, self.contexts.pop(107).node_config)
            return replies

    federation = Federation(small(tmp_path / "flower", num_rounds=2), gradient_svd, grid_class=Restarted)
    federation.run()
    assert_same(federation.adapter(), of_trainer)
    assert ("train.bases", 900) in federation.grid.handled


def test_a_node_that_does_not_take_them_is_left_out(tmp_path, monkeypatch):
    class Refuses(InProcessGrid):
        def handle(self, message, context):
            if message.metadata.message_type == "train.bases" and context.node_id == 107:
                raise RuntimeError("out of paper")
            return super().handle(message, context)

    warnings = logged(monkeypatch, "flower.nodes")
    federation = Federation(small(tmp_path, num_rounds=1), gradient_svd, grid_class=Refuses)
    federation.run()
    record = federation.records[-1]
    assert record["clients"] == ["client_0", "client_2"]
    assert record["failed_clients"] == [{"client": "client_1", "reason": "Its node is not connected."}]
    assert len(warnings) == 1 and "has not taken the bases" in warnings[0] and "out of paper" in warnings[0]


def test_bases_of_another_adapter_are_refused_and_nothing_is_kept(tmp_path):
    federation = Federation(small(tmp_path), gradient_svd)
    theirs = Bases({"../../x": torch.zeros(3, 3)})
    [answer] = federation.grid.send_and_receive([Message(to_record(theirs), 107, "train.bases")])
    assert answer.has_error() and "are those of another adapter" in answer.error.reason
    assert not federation.grid.contexts[107].state


def test_bases_are_loaded_as_a_whole_or_not_at_all():
    own = {"a": torch.zeros(2, 3), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match="another adapter"):
        Bases({"a": torch.ones(2, 3), "b": torch.ones(4)}).load(own)
    assert not own["a"].any()
    Bases({"b": torch.ones(3), "a": torch.ones(2, 3)}).load(own)
    assert own["a"].all() and own["b"].all()
