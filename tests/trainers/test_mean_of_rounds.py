"""The mean over rounds: what is evaluated and saved, while clients start from the last merged state."""

import math

import pytest
import torch
from peft import get_peft_model

from peft_ravan.trainers.client.live_adapter import LiveAdapter
from peft_ravan.trainers.records.callbacks import FederatedCallback
from peft_ravan.trainers.server.checkpoints import read_server_state, write_server_state
from peft_ravan.trainers.server.mean_of_rounds import POWER, earlier_states, mean_of_rounds, remembered
from peft_ravan.trainers.server.state import ServerState

from ..conftest import tiny_bert
from .helpers import (
    adapter_state,
    assert_same,
    comparable,
    lora,
    make_trainer,
    ravan,
    resumable_trainer,
    resumed_after,
)


class States(FederatedCallback):
    """The merged state of each round, as the server has it."""

    def __init__(self):
        self.trainer, self.merged = None, []

    def on_round_end(self, *args, **kwargs):
        self.merged.append(self.trainer.last_server_state.global_state)


def run(folder, adapter=None, **kwargs):
    states = States()
    states.trainer = make_trainer(
        folder, adapter, callbacks=[states], **{"num_rounds": 4, "clients_per_round": 2, "max_steps": 1, **kwargs}
    )
    states.trainer.train()
    return states.trainer, states.merged


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without a mean, and its merged states."""
    return run(tmp_path_factory.mktemp("plain"), eval_strategy="epoch")


def test_the_mean_is_that_of_the_states_so_far_and_then_of_the_last_ones():
    state = ServerState({"w": torch.tensor([100.0])})  # what training starts from is not in the mean
    means = []
    for number, value in enumerate((1.0, 3.0, 8.0, 4.0), start=1):
        earlier = earlier_states(state, 3)
        state = ServerState({"w": torch.tensor([value])}, num_merged=number, earlier=earlier)
        means.append(mean_of_rounds(state)["w"].item())
    assert means == [1.0, 2.0, 4.0, 5.0]


def test_by_default_later_rounds_weigh_more():
    """The n-th round has a weight in proportion to n (n + 1) ... (n + 7), whatever has been merged in all."""
    state, values = ServerState({"w": torch.tensor([100.0])}), torch.randn(12).double()
    for number, value in enumerate(values, start=1):
        merged = {"w": value[None].float(), "count": torch.tensor(number)}
        state = ServerState(merged, num_merged=number, **remembered(state, merged, None))
        weights = [math.prod(range(n, n + POWER)) for n in range(1, number + 1)]
        expected = torch.tensor(weights).double() @ values[:number] / sum(weights)
        found = mean_of_rounds(state)
        torch.testing.assert_close(found["w"].double(), expected[None], atol=1e-6, rtol=1e-5)
        assert found["count"].item() == number
    assert not state.earlier  # the mean is all that is kept


def test_the_default_is_a_mean_that_clients_are_not_sent(tmp_path, plain):
    last, states = plain
    mean, same_states = run(tmp_path, average_rounds=None, eval_strategy="epoch")
    for one, other in zip(states, same_states, strict=True):
        assert_same(one, other)
    in_model = adapter_state(mean)
    weights = [math.prod(range(n, n + POWER)) for n in range(1, 5)]
    for name in states[-1]:
        expected = sum(w * state[name].double() for w, state in zip(weights, states, strict=True)) / sum(weights)
        torch.testing.assert_close(in_model[name].double(), expected, atol=1e-6, rtol=1e-5)
    first, *_, end = mean.state.log_history
    assert first["eval_loss"] == last.state.log_history[0]["eval_loss"]
    assert end["eval_loss"] == pytest.approx(mean.evaluate()["eval_loss"]) and "eval_last_loss" not in end


def test_the_last_adapter_can_be_evaluated_beside_the_default_mean(tmp_path):
    options = {"eval_strategy": "epoch", "num_rounds": 2}
    last, _ = run(tmp_path / "last", average_rounds=1, eval_last=True, **options)
    mean, _ = run(tmp_path / "mean", average_rounds=None, eval_last=True, **options)
    for of_last, of_mean in zip(last.state.log_history, mean.state.log_history, strict=True):
        assert of_mean["eval_last_accuracy"] == of_last["eval_accuracy"]
        assert not any(name.startswith("eval_last") for name in of_last)  # the result is the last one
    assert mean.state.log_history[-1]["eval_loss"] != mean.state.log_history[-1]["eval_last_loss"]
    without, _ = run(tmp_path / "without", average_rounds=2, eval_last=False, **options)
    assert "eval_last_loss" not in without.state.log_history[-1]


def test_the_mean_of_one_round_by_default_is_that_round(tmp_path):
    last, _ = run(tmp_path / "last", num_rounds=1)
    mean, _ = run(tmp_path / "mean", num_rounds=1, average_rounds=None)
    assert_same(adapter_state(last), adapter_state(mean))


def test_factors_that_are_computed_anew_in_every_round_have_no_mean_by_default(tmp_path):
    options = {"merge_method": "flexlora", "num_rounds": 2}
    last, _ = run(tmp_path / "last", lora(), **options)
    default, _ = run(tmp_path / "default", lora(), average_rounds=None, **options)
    assert_same(adapter_state(last), adapter_state(default))


def test_the_mean_keeps_the_dtype():
    states = [{"w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)} for _ in range(3)]
    found = mean_of_rounds(ServerState(states[-1], earlier=tuple(states[:-1])))
    assert found["w"].dtype == torch.bfloat16 and found["w"].tolist() == [1.0, 2.0]


PRIVACY = {"privacy": {"clip_norm": 0.5, "noise_multiplier": 0.3, "noise_seed": 7}}


@pytest.mark.parametrize(
    "adapter, options",
    [
        (ravan, {}),
        (lora, {}),
        (ravan, PRIVACY),
        pytest.param(lora, PRIVACY, marks=pytest.mark.deep),
        (lora, {"local_parameters": ["classifier"]}),
        (ravan, {"server_optimizer": "fedavgm"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_clients_are_not_sent_the_mean(tmp_path, adapter, options):
    last, states = run(tmp_path / "last", adapter(), num_rounds=3, **options)
    mean, same_states = run(tmp_path / "mean", adapter(), num_rounds=3, average_rounds=2, **options)
    for one, other in zip(states, same_states, strict=True):
        assert_same(one, other)
    assert_same(last.last_global_state, mean.last_global_state)
    in_model = adapter_state(mean)
    for name in states[-1]:
        expected = sum(state[name].double() for state in states[1:]) / 2
        torch.testing.assert_close(in_model[name].double(), expected, atol=1e-7, rtol=1e-6)
    assert any(not torch.equal(in_model[name], states[-1][name]) for name in states[-1])


def test_the_mean_over_one_round_is_that_round(plain):
    trainer, states = plain
    assert trainer.args.average_rounds == 1
    assert_same(adapter_state(trainer), states[-1])


def test_both_are_evaluated(tmp_path, plain):
    last, _ = plain
    mean, _ = run(tmp_path, eval_strategy="epoch", average_rounds=2)
    for of_last, of_mean in zip(last.state.log_history, mean.state.log_history, strict=True):
        assert of_mean["eval_last_loss"] == of_last["eval_loss"]
        assert of_mean["eval_last_accuracy"] == of_last["eval_accuracy"]
    assert mean.state.log_history[0]["eval_loss"] == mean.state.log_history[0]["eval_last_loss"]
    assert mean.state.log_history[-1]["eval_loss"] != mean.state.log_history[-1]["eval_last_loss"]
    assert mean.evaluate()["eval_loss"] == pytest.approx(mean.state.log_history[-1]["eval_loss"])


def test_the_mean_of_ravan_is_the_mean_of_the_weights(tmp_path):
    trainer, states = run(tmp_path, average_rounds=4, local_parameters=None)
    weights = []
    reference = get_peft_model(tiny_bert(), ravan())
    layer = reference.base_model.model.bert.encoder.layer[0].attention.self.query
    for state in states:
        LiveAdapter(reference).load(state)
        weights.append(layer.get_delta_weight("default").detach().clone())
    found = trainer.model.base_model.model.bert.encoder.layer[0].attention.self.query.get_delta_weight("default")
    torch.testing.assert_close(found, sum(weights) / 4, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("average_rounds", [3, None])
def test_a_resumed_run_has_the_mean_of_the_uninterrupted_one(tmp_path, average_rounds):
    options = {"average_rounds": average_rounds, "max_steps": 1}
    whole = resumable_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = resumed_after(3, whole, tmp_path / "run", **options)
    assert_same(adapter_state(whole), adapter_state(resumed))
    assert comparable(whole.state.log_history) == comparable(resumed.state.log_history)


def test_earlier_states_are_saved_with_the_state_of_the_server(tmp_path):
    states = [{"w": torch.tensor([float(number)])} for number in range(3)]
    write_server_state(tmp_path, ServerState(states[-1], num_merged=3, earlier=tuple(states[:-1])), {})
    saved = read_server_state(tmp_path).state
    assert saved.num_merged == 3 and mean_of_rounds(saved)["w"].item() == 1.0


def test_the_best_mean_is_the_one_that_is_loaded_at_the_end(tmp_path):
    trainer = resumable_trainer(
        tmp_path, average_rounds=2, load_best_model_at_end=True, metric_for_best_model="accuracy", num_rounds=3,
        max_steps=1,
    )  # fmt: skip
    scores = iter([0.1, 0.0, 0.9, 0.0, 0.3, 0.0])  # of the mean and of the last state in turns
    trainer.compute_metrics = lambda prediction: {"accuracy": next(scores)}
    means = {}

    class Keep(FederatedCallback):
        def on_round_end(self, args, state, control, record, **kwargs):
            means[record["round"]] = adapter_state(trainer)

    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert_same(adapter_state(trainer), means[2])


def test_factors_that_are_computed_anew_in_every_round_have_no_mean(tmp_path):
    with pytest.raises(ValueError, match="`average_rounds` does not work with merge_method='flexlora' on LoRA"):
        make_trainer(tmp_path, lora(), average_rounds=2, merge_method="flexlora")
    with pytest.raises(ValueError, match="`average_rounds` must be 1 or more, got 0"):
        make_trainer(tmp_path, average_rounds=0)


@pytest.mark.parametrize(
    ("average_rounds", "result"),
    [(3, "mean of the last 3 rounds"), (None, "mean of all rounds, weighted towards the last ones")],
)
def test_the_card_says_that_the_result_is_a_mean(tmp_path, average_rounds, result):
    trainer, _ = run(tmp_path, average_rounds=average_rounds, num_rounds=1)
    trainer.save_model(str(tmp_path / "saved"))
    assert result in (tmp_path / "saved" / "README.md").read_text()
