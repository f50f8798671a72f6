import collections

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from peft_ravan.trainers import FederatedArguments, FederatedCallback
from peft_ravan.trainers.client.live_adapter import LiveAdapter

from ..conftest import classification_dataset
from ..properties import examples
from .helpers import adapter_state, assert_same, make_trainer


CLIENTS = {f"client_{index}": 10 * (index + 1) for index in range(10)}


def args(**kwargs) -> FederatedArguments:
    return FederatedArguments("out", **kwargs)


# ---- The draw --------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, "examples", dict.fromkeys(CLIENTS, 1.0)])
def test_participation_is_drawn_anew_in_every_round_and_can_be_repeated(weights):
    arguments = args(clients_per_round=4, participation_weights=weights)
    rounds = [arguments.participation.sample(CLIENTS, number) for number in range(1, 41)]
    assert all(len(set(chosen)) == 4 and set(chosen) <= set(CLIENTS) for chosen in rounds)
    assert {client for chosen in rounds for client in chosen} == set(CLIENTS)
    # round 17 does not depend on the rounds before it, which is what makes a run resumable
    assert arguments.participation.sample(CLIENTS, 17) == rounds[16]
    other = args(clients_per_round=4, participation_weights=weights, seed=1)
    assert rounds != [other.participation.sample(CLIENTS, number) for number in range(1, 41)]


def test_by_default_everybody_takes_part():
    assert args().participation.sample(CLIENTS, 1) == list(CLIENTS)


@examples(50)
@given(
    order=st.permutations(list(CLIENTS)),
    absent=st.sets(st.sampled_from(list(CLIENTS)), max_size=9),
    clients_per_round=st.none() | st.integers(1, 10),
    weights=st.sampled_from([None, "examples"]),
    seed=st.integers(0, 2**31),
    round_number=st.integers(1, 1000),
)
def test_drawn_clients_are_available_and_do_not_depend_on_the_order(
    order, absent, clients_per_round, weights, seed, round_number
):
    arguments = args(clients_per_round=clients_per_round, participation_weights=weights, federated_seed=seed)

    def availability(client, number):
        assert number == round_number
        return client not in absent

    chosen = arguments.participation.sample(CLIENTS, round_number, availability)
    assert not set(chosen) & absent
    assert len(set(chosen)) == len(chosen) == min(clients_per_round or 10, 10 - len(absent))
    shuffled = arguments.participation.sample(
        {client: CLIENTS[client] for client in order}, round_number, availability
    )
    assert set(shuffled) == set(chosen) and shuffled == [client for client in order if client in chosen]


@pytest.mark.parametrize("weights", ["examples", {client: 7.0 * size for client, size in CLIENTS.items()}])
def test_weighted_draws_follow_the_weights(weights):
    arguments = args(clients_per_round=1, participation_weights=weights)
    drawn = collections.Counter(arguments.participation.sample(CLIENTS, number)[0] for number in range(1, 2001))
    expected = np.array(list(CLIENTS.values())) / sum(CLIENTS.values())
    observed = np.array([drawn[client] for client in CLIENTS]) / 2000
    assert np.abs(observed - expected).max() < 0.03


def test_several_are_drawn_as_if_one_after_another():
    """P(a and b) for weights 4, 2, 1, by hand: a then b, 4/7 * 2/3, or b then a, 2/7 * 4/5."""
    arguments = args(clients_per_round=2, participation_weights={"a": 4, "b": 2, "c": 1})
    clients = dict.fromkeys("abc", 1)
    share = np.mean([arguments.participation.sample(clients, number) == ["a", "b"] for number in range(1, 3001)])
    assert share == pytest.approx(4 / 7 * 2 / 3 + 2 / 7 * 4 / 5, abs=0.03)


def test_extreme_weights_are_no_trouble():
    weights = {**dict.fromkeys(CLIENTS, 1e-300), "client_3": 1e300, "client_4": 0.0}
    arguments = args(clients_per_round=9, participation_weights=weights)
    assert set(arguments.participation.sample(CLIENTS, 1)) == set(CLIENTS) - {"client_4"}
    arguments = args(clients_per_round=1, participation_weights=weights)
    assert all(arguments.participation.sample(CLIENTS, number) == ["client_3"] for number in range(1, 20))


def test_a_weight_of_zero_is_never_drawn_also_if_all_take_part():
    weights = {**dict.fromkeys(CLIENTS, 1), "client_0": 0}
    assert args(participation_weights=weights).participation.sample(CLIENTS, 1) == list(CLIENTS)[1:]


def test_a_round_with_too_few_is_skipped():
    def two(client, number):
        return client in ("client_2", "client_5")

    assert args(min_clients=2, clients_per_round=5).participation.sample(CLIENTS, 1, two) == ["client_2", "client_5"]
    with pytest.warns(UserWarning, match="Round 7 is skipped: 2 clients are available, and min_clients=3"):
        assert args(min_clients=3).participation.sample(CLIENTS, 7, two) == []
    with pytest.warns(UserWarning, match="Round 1 is skipped: 0 clients"):
        assert args().participation.sample(CLIENTS, 1, lambda client, number: False) == []


@pytest.mark.parametrize(
    "fields, availability, error, message",
    [
        ({"min_clients": 11}, None, ValueError, "`min_clients` is 11, but there are only 10 clients. Use fewer"),
        ({"participation_weights": {"client_0": 1}}, None, ValueError, "leave out 9 clients, such as 'client_1'"),
        (
            {"participation_weights": {**CLIENTS, "ward": 1}},
            None,
            ValueError,
            "name unknown 1 clients, such as 'ward'",
        ),
        (
            {"participation_weights": {**dict.fromkeys(CLIENTS, 0), "client_0": 1}, "clients_per_round": 2},
            None,
            ValueError,
            "`clients_per_round` is 2, but there are only 1 clients with a weight above 0",
        ),
        ({}, {"client_0": [1, 2]}, TypeError, "`availability` must be a function of the client's name"),
    ],
)
def test_what_cannot_be_drawn_is_refused(fields, availability, error, message):
    with pytest.raises(error, match=message):
        args(**fields).participation.check(CLIENTS, availability)


# ---- In a run --------------------------------------------------------------------


def every_other_round(client, round):
    return round % 2 == 0 or client == "client_0"


@pytest.mark.filterwarnings("ignore:Round . is skipped")
def test_skipped_rounds_are_recorded_and_change_nothing(tmp_path):
    class Adapters(FederatedCallback):
        def __init__(self):
            self.states, self.begun = [], []

        def on_round_begin(self, args, state, control, clients, **kwargs):
            self.begun.append(clients)

        def on_round_end(self, args, state, control, model, record, **kwargs):
            self.states.append(LiveAdapter(model).read())

    callback = Adapters()
    trainer = make_trainer(
        tmp_path, callbacks=[callback], availability=every_other_round, num_rounds=4, min_clients=2,
        eval_strategy="epoch", save_strategy="epoch", disable_tqdm=False, server_optimizer="fedavgm",
        clients_per_round=3,
    )  # fmt: skip
    start = adapter_state(trainer)
    output = trainer.train()
    trainer.save_model()
    history = trainer.state.log_history
    assert [len(record["clients"]) for record in history] == [0, 3, 0, 3]
    assert callback.begun == [record["clients"] for record in history]
    assert [record["round"] for record in history] == [1, 2, 3, 4]
    assert_same(callback.states[0], start)
    assert_same(callback.states[2], callback.states[1])
    assert history[0]["upload_bytes"] == history[0]["download_bytes"] == 0
    assert ["train_loss" in record for record in history] == [False, True, False, True]
    assert history[2]["eval_loss"] == history[1]["eval_loss"]
    assert output.training_loss == pytest.approx((history[1]["train_loss"] + history[3]["train_loss"]) / 2)
    card = (tmp_path / "README.md").read_text()
    assert "| Rounds | 4, 2 of them skipped |" in card and "| 1 | 0 |  | " in card


def test_a_run_without_enough_clients_ends_and_says_so(tmp_path):
    trainer = make_trainer(tmp_path, availability=lambda client, round: client == "client_1", min_clients=2)
    start = adapter_state(trainer)
    with (
        pytest.warns(UserWarning, match="Round . is skipped"),
        pytest.raises(RuntimeError, match="in none of the 2 rounds were min_clients=2 clients available"),
    ):
        trainer.train()
    assert_same(adapter_state(trainer), start)


def test_weights_and_availability_act_in_a_run_and_can_be_repeated(tmp_path):
    runs = []
    for _ in range(2):
        trainer = make_trainer(
            tmp_path, partition="pathological", participation_weights="examples", clients_per_round=2, num_rounds=3,
            max_steps=1, availability=lambda client, round: client != f"client_{round}",
        )  # fmt: skip
        trainer.train()
        runs.append([record["clients"] for record in trainer.state.log_history])
    assert runs[0] == runs[1]
    assert all(f"client_{number}" not in clients for number, clients in enumerate(runs[0], start=1))
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "| Clients per round | 2, drawn by their examples |" in card
    assert "| Data of the clients | at most 2 labels each |" in card


def test_what_cannot_be_drawn_is_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match="`min_clients` is 5, but there are only 4 clients"):
        make_trainer(tmp_path, min_clients=5)
    data = {name: classification_dataset(8) for name in ("a", "b", "c")}
    with pytest.raises(ValueError, match="`min_successful_clients` is 4, but there are only 3 clients"):
        make_trainer(tmp_path, num_clients=None, train_dataset=data, min_successful_clients=4)
    weights = {"a": 1.0, "b": 1.0, "c": 0.0}
    with pytest.raises(ValueError, match="`min_successful_clients` is 3, but there are only 2 clients with a weight"):
        make_trainer(
            tmp_path, num_clients=None, train_dataset=data, min_successful_clients=3, participation_weights=weights
        )
    with pytest.raises(ValueError, match="leave out 1 clients, such as 'b'"):
        make_trainer(
            tmp_path,
            num_clients=None,
            train_dataset={"a": classification_dataset(8), "b": classification_dataset(8)},
            participation_weights={"a": 1.0},
        )
