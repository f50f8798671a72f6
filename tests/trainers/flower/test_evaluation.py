"""Clients are evaluated at their nodes, with the records of a FederatedTrainer."""

import math
import re

import pytest


pytest.importorskip("flwr")

from flwr.app import RecordDict

from peft_ravan import RavanConfig
from peft_ravan.trainers import make_clients, read_history
from peft_ravan.trainers.data.client_eval_data import make_client_eval_datasets
from peft_ravan.trainers.flower.codec import from_record, to_record
from peft_ravan.trainers.flower.evaluation_reply import EvaluationReply
from peft_ravan.trainers.messages import MessageError

from ...conftest import classification_dataset
from ..helpers import assert_same, comparable, logged, make_trainer, ravan
from .bad_clients import changed, faulty, raising
from .grid import InProcessGrid
from .helpers import NUM_CLIENTS, Federation, small


EVALUATED = {"eval_strategy": "epoch", "eval_on_start": True, "eval_clients": True}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def one_process(folder, **options):
    trainer = make_trainer(folder / "trainer", num_clients=NUM_CLIENTS, max_steps=1, **EVALUATED, **options)
    trainer.train()


def over_flower(folder, grid_class=InProcessGrid, make_adapter=ravan, has_server_data=True, **options):
    args = small(folder / "flower", **{**EVALUATED, **options})
    clients = make_clients(classification_dataset(), args)
    parts = make_client_eval_datasets(classification_dataset(80, seed=1), clients, args.partition_settings)
    client_options = {
        "load_eval_data": lambda context: parts[str(context.node_config["data"])],
        "compute_metrics": accuracy,
    }
    server = {"load_eval_data": lambda: classification_dataset(80, seed=1), "compute_metrics": accuracy}
    return Federation(
        args,
        make_adapter,
        grid_class=grid_class,
        client_options=client_options,
        min_nodes=1,
        **(server if has_server_data else {}),
    )


def of_clients(record):
    return {name: value for name, value in record.items() if name.startswith("eval_clients")}


RUNS = {
    "plain": {},
    "mean of rounds": {"average_rounds": 2},
    "personal parts": {"local_parameters": ["classifier"], "clients_per_round": 2, "num_rounds": 3},
    "personalization": {"personalization_steps": 1, "client_budgets": "uniform"},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_the_records_are_those_of_a_federated_trainer(tmp_path, options):
    one_process(tmp_path, **options)
    federation = over_flower(tmp_path, **options)
    federation.run()
    expected = comparable(read_history(tmp_path / "trainer"))
    assert comparable(federation.records) == expected
    assert all(
        {"eval_clients_worst_decile_accuracy", "eval_clients_mean_loss"} <= record.keys() for record in expected
    )


def test_the_server_needs_no_data_and_the_run_does_not_change(tmp_path):
    federation = over_flower(tmp_path, has_server_data=False)
    federation.run()
    one_process(tmp_path)
    for record, expected in zip(federation.records, read_history(tmp_path / "trainer"), strict=True):
        assert of_clients(record) == of_clients(expected) and not any(name.startswith("eval_loss") for name in record)
    plain = Federation(small(tmp_path / "plain"))
    plain.run()
    assert_same(federation.adapter(), plain.adapter())


FAULTS = {
    "lost": (lambda reply: None, "has not replied within 3600 seconds"),
    "raising": (raising, "out of paper"),
    "nothing": (lambda reply: RecordDict(), "must have the record"),
    "failed": (changed(metrics=None, failure="no room"), "no room"),
    "no metrics": (changed(metrics=None), "has no metrics"),
    "NaN": (changed(metrics={"loss": math.nan, "accuracy": 1.0}), "finite numbers"),
    "infinite": (changed(metrics={"loss": math.inf, "accuracy": 1.0}), "finite numbers"),
    "too large": (changed(metrics={"loss": 1e300, "accuracy": 1.0}), "finite numbers"),
    "a text": (changed(metrics={"loss": "low", "accuracy": 1.0}), "must be a number"),
    "other names": (changed(metrics={"loss": 1.0, "x": 1.0}), "most have \\['accuracy', 'loss'\\]"),
    "no examples": (changed(examples=0), "'examples' must be"),
    "another client": (changed(client="client_0"), "for client 'client_0'"),
    "another round": (changed(round_number=7), "round 7"),
}


@pytest.mark.parametrize("change, reason", FAULTS.values(), ids=FAULTS)
def test_a_bad_client_is_not_in_the_statistics(tmp_path, monkeypatch, change, reason):
    warnings = logged(monkeypatch, "flower.evaluation")
    options = {"num_rounds": 1, "eval_on_start": False}
    federation = over_flower(tmp_path, faulty(change, None, "evaluate", EvaluationReply), **options)
    federation.run()
    [record] = federation.records
    assert len(record["clients"]) == 3 and math.isfinite(record["eval_clients_mean_loss"])
    [warning] = warnings
    assert warning.startswith("Client 'client_1' was not evaluated") and re.search(reason, warning), warning


def test_a_node_without_data_to_evaluate_on_says_so(tmp_path, monkeypatch):
    warnings = logged(monkeypatch, "flower.evaluation")
    federation = Federation(small(tmp_path, num_rounds=1, eval_strategy="epoch", eval_clients=True))
    federation.run()
    [record] = federation.records
    assert len(record["clients"]) == 3 and not of_clients(record)
    assert len(warnings) == 3 and all("`load_eval_data`" in warning for warning in warnings)


def test_a_node_that_has_lost_its_bases_is_sent_them_before_it_trains(tmp_path, monkeypatch):
    class Restarted(InProcessGrid):
        """One node loses what it was sent before the first evaluation."""

        was_restarted = False

        def handle(self, message, context):
            if message.metadata.message_type.startswith("evaluate") and context.node_id == 107:
                if not self.was_restarted:
                    context.state.clear()
                self.was_restarted = True
            return super().handle(message, context)

    def adapter():
        return RavanConfig(r=2, num_heads=2, init_bases="gradient_svd", task_type="SEQ_CLS")

    warnings = logged(monkeypatch, "flower.evaluation")
    federation = over_flower(tmp_path, Restarted, adapter, has_server_data=False, eval_on_start=False)
    federation.run()
    assert len(warnings) == 1 and "has lost the bases" in warnings[0]
    assert [len(record["clients"]) for record in federation.records[1:]] == [3, 3]
    assert not federation.records[2]["failed_clients"]


@pytest.mark.parametrize("metrics", [{"a\nb": 1.0}, {"": 1.0}, {str(number): 1.0 for number in range(1001)}, [1.0]])
def test_metrics_with_other_names_or_too_many_are_refused(metrics):
    with pytest.raises(MessageError, match="The field 'metrics' must be"):
        from_record(to_record(EvaluationReply(1, "north", metrics)), EvaluationReply)
