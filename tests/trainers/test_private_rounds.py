"""Private federations: plain ones without noise and clipping, otherwise they keep their guarantee or refuse."""

import json
import math
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import HfArgumentParser

from peft_ravan import RavanConfig
from peft_ravan.merging import MERGE_METHODS
from peft_ravan.trainers import FederatedArguments, FederatedCallback, FederatedTrainer, Privacy
from peft_ravan.trainers.client.live_adapter import LiveAdapter

from ..conftest import classification_dataset, tiny_bert
from .helpers import (
    adapter_state,
    arguments,
    assert_same,
    comparable,
    lora,
    make_trainer,
    ravan,
    resumable_trainer,
    resumed_after,
)


NO_NOISE = {"clip_norm": math.inf, "noise_multiplier": 0.0}
NOISE = {"clip_norm": 1.0, "noise_multiplier": 0.5, "noise_seed": 11}


def difference(first, second) -> torch.Tensor:
    return torch.cat([(first[name].double() - second[name].double()).flatten() for name in first])


# ---- Equivalences ----------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter, merge_method", [(ravan, None), (lora, None), (lora, "ffa_lora"), (lora, "rolora"), (lora, "fedsa_lora")]
)
def test_without_noise_and_clipping_it_is_the_mean_with_uniform_weights(tmp_path, adapter, merge_method):
    sizes = {"a": 16, "b": 48, "c": 80}
    clients = {name: classification_dataset(size, seed=size) for name, size in sizes.items()}
    options = {
        "train_dataset": clients,
        "num_clients": None,
        "num_rounds": 2,
        "optim": "sgd",
        "merge_method": merge_method,
    }

    def alike(client, round_number, update):
        return replace(update, num_examples=1)

    private = make_trainer(tmp_path, adapter(), privacy=NO_NOISE, **options)
    uniform = make_trainer(tmp_path, adapter(), client_fault=alike, **options)
    weighted = make_trainer(tmp_path, adapter(), **options)
    for trainer in (private, uniform, weighted):
        trainer.train()
    assert_same(adapter_state(private), adapter_state(uniform), atol=1e-6, rtol=1e-5)
    assert difference(adapter_state(private), adapter_state(weighted)).abs().max() > 1e-5
    assert private.state.log_history[-1]["epsilon"] == math.inf


@pytest.mark.parametrize("adapter", [ravan, lora])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, adapter):
    options = {"privacy": {**NOISE, "target_epsilon": 1e4}, "num_rounds": 3, "max_steps": 1}
    whole = resumable_trainer(tmp_path / "whole", adapter=adapter(), **options)
    whole.train()
    resumed = resumed_after(2, whole, tmp_path / "resumed", adapter=adapter(), **options)
    assert_same(adapter_state(whole), adapter_state(resumed))
    assert comparable(whole.state.log_history) == comparable(resumed.state.log_history)


def test_noise_comes_from_its_own_seed_or_from_nowhere_that_can_be_repeated(tmp_path):
    def state(**fields):
        trainer = make_trainer(tmp_path, privacy={**NOISE, **fields}, num_rounds=1, max_steps=1, num_clients=2)
        trainer.train()
        return adapter_state(trainer)

    assert_same(state(), state())
    for other in (12, None):
        assert difference(state(), state(noise_seed=other)).abs().min() > 0
    assert difference(state(noise_seed=None), state(noise_seed=None)).abs().min() > 0


# ---- The noise and the bound -----------------------------------------------------


def test_the_noise_of_a_round_has_the_standard_deviation_that_is_said(tmp_path):
    def state(noise_multiplier):
        privacy = {**NOISE, "clip_norm": 0.01, "noise_multiplier": noise_multiplier}
        trainer = make_trainer(tmp_path, privacy=privacy, num_rounds=1, max_steps=1, clients_per_round=2)
        trainer.train()
        return adapter_state(trainer)

    noise = difference(state(3.0), state(0.0))
    # 3 * 0.01 / 2, estimated from n entries up to 5 / sqrt(2 n)
    assert noise.std().item() == pytest.approx(0.015, rel=5 / math.sqrt(2 * len(noise))) and len(noise) > 400
    assert abs(noise.mean().item()) < 5 * 0.015 / math.sqrt(len(noise))


def test_a_hostile_client_moves_the_adapter_by_no_more_than_the_bound(tmp_path):
    def state(factor):
        def client_fault(client, round_number, update):
            if client == "client_2":
                return replace(
                    update, state={name: factor * t for name, t in update.state.items()}, num_examples=10**6
                )
            return update

        privacy = {"clip_norm": 0.1, "noise_multiplier": 0.0}
        trainer = make_trainer(tmp_path, privacy=privacy, client_fault=client_fault, num_rounds=1, max_steps=1)
        trainer.train()
        return adapter_state(trainer)

    honest = state(1.0)
    for factor in (1e30, -1e30, math.nan):
        assert difference(honest, state(factor)).norm() <= 2 * 0.1 / 4 * (1 + 1e-4)


def test_clients_with_budgets_are_divided_by_all_clients(tmp_path):
    """A head that one of two clients has trained moves by half of that client's change."""
    uploads = {}

    def client_fault(client, round_number, update):
        uploads[client] = update

    clients = {name: classification_dataset(16, seed=index) for index, name in enumerate("ab")}
    trainer = make_trainer(
        tmp_path, privacy=NO_NOISE, train_dataset=clients, num_clients=None, num_rounds=1, client_budgets={"a": 0.4},
        client_fault=client_fault,
    )  # fmt: skip
    trainer.train()
    [name, mask] = next(iter(uploads["a"].trained_heads.items()))
    [own], [other] = mask.nonzero(as_tuple=True)[0], (~mask).nonzero(as_tuple=True)[0][:1]
    merged, a, b = adapter_state(trainer)[name], uploads["a"].state[name], uploads["b"].state[name]
    torch.testing.assert_close(merged[own], (a[0] + b[own]) / 2)
    torch.testing.assert_close(merged[other], b[other] / 2)
    assert b[other].abs().max() > 0


def test_failures_change_neither_the_divisor_nor_the_clients(tmp_path):
    def fails_in_round_1(client, round_number, update):
        if round_number == 1:
            raise RuntimeError("the network is down")

    trainer = make_trainer(tmp_path, privacy=NOISE, client_fault=fails_in_round_1, max_steps=1, clients_per_round=2)
    start = adapter_state(trainer)
    states = []

    class Keep(FederatedCallback):
        def on_round_end(self, args, state, control, record, **kwargs):
            states.append(adapter_state(trainer))

    trainer.add_callback(Keep())
    trainer.train()
    first, second = trainer.state.log_history
    assert (first["clients"], len(first["failed_clients"]), first["attempts"]) == ([], 2, 1)
    assert difference(states[0], start).std().item() == pytest.approx(0.5 / 2, rel=0.1)  # noise, and nothing else
    assert len(second["clients"]) == 2 and second["epsilon"] > first["epsilon"] > 0


# ---- The end ---------------------------------------------------------------------


def test_the_run_ends_before_the_round_that_would_exceed_the_target(tmp_path):
    privacy = {"clip_norm": 1.0, "noise_multiplier": 10.0, "target_epsilon": 1.5}
    options = {"privacy": privacy, "num_rounds": 9, "max_steps": 1, "save_strategy": "epoch"}
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    spent = [record["epsilon"] for record in trainer.state.log_history]
    assert spent == sorted(spent) and spent[-1] <= 1.5 < trainer.privacy.next_epsilon(trainer.state.log_history)
    assert 1 < len(spent) < 9
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert [record["epsilon"] for record in resumed.state.log_history] == spent
    assert_same(adapter_state(trainer), adapter_state(resumed))


def test_the_noise_that_is_worked_out_lasts_for_all_rounds(tmp_path):
    trainer = make_trainer(tmp_path, privacy=Privacy(1.0, target_epsilon=3.0), num_rounds=3, max_steps=1)
    trainer.train()
    assert len(trainer.state.log_history) == 3
    assert trainer.state.log_history[-1]["epsilon"] == pytest.approx(3.0, abs=1e-4)


@pytest.mark.filterwarnings("ignore:Round . is skipped")
def test_a_round_that_is_skipped_costs_nothing(tmp_path):
    trainer = make_trainer(
        tmp_path, privacy=NOISE, availability=lambda client, number: number != 2, num_rounds=3, max_steps=1
    )
    trainer.train()
    first, skipped, third = trainer.state.log_history
    assert skipped["epsilon"] == first["epsilon"] < third["epsilon"] and "noise_multiplier" not in skipped


# ---- Reports ---------------------------------------------------------------------


def test_the_card_has_the_guarantee_and_not_what_is_not_protected(tmp_path):
    privacy = {"clip_norm": 1.0, "noise_multiplier": 20.0, "secret_sampling": True}
    trainer = make_trainer(tmp_path, privacy=privacy, clients_per_round=2, max_steps=1)
    trainer.train()
    card = str(trainer._model_card())
    epsilon = trainer.state.log_history[-1]["epsilon"]
    assert f"| Differential privacy | ε = {epsilon:.3g} at δ = 1e-05" in card and "noise multiplier 20" in card
    assert "train_loss" not in card and "| Seed |" not in card
    plain = make_trainer(tmp_path, max_steps=1)
    plain.train()
    assert "train_loss" in str(plain._model_card()) and "| Seed |" in str(plain._model_card())


@pytest.mark.parametrize("privacy", [NO_NOISE, NOISE])
def test_the_similarity_of_updates_is_recorded_nowhere(tmp_path, privacy):
    trainer = make_trainer(tmp_path, privacy=privacy, max_steps=1)
    trainer.train()
    assert trainer.state.log_history and not [r for r in trainer.state.log_history if "update_cosine" in r]
    assert "update_cosine" not in trainer.last_merge.diagnostics and "update_cosine" not in trainer.history_table()


def test_the_seed_of_the_noise_is_written_nowhere(tmp_path):
    seed = 987654321
    args = arguments(tmp_path, privacy={**NOISE, "noise_seed": seed})
    assert args.privacy["noise_seed"] == seed
    assert str(seed) not in f"{args!r}{args}{args.to_json_string()}"
    trainer = make_trainer(tmp_path, privacy=args.privacy, max_steps=1, num_rounds=1, save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    for path in files:
        assert str(seed).encode() not in path.read_bytes() and seed.to_bytes(4, "little") not in path.read_bytes()


def test_it_can_be_parsed_from_a_command_line():
    line = ["--output_dir", "out", "--privacy", '{"clip_norm": 1, "target_epsilon": 4}']
    [args] = HfArgumentParser(FederatedArguments).parse_args_into_dataclasses(line)
    assert Privacy.parse(args.privacy) == Privacy(1.0, target_epsilon=4.0)
    json.dumps(args.to_dict()["privacy"])


# ---- Incompatible arguments ------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        *(
            ({"merge_method": name}, f"For '{name}' it would prove nothing")
            for name, method in MERGE_METHODS.items()
            if not method.plain_mean
        ),
        ({"scaffold": True}, "does not go with `scaffold`"),
        ({"participation_weights": "examples"}, "would reveal how much data clients have"),
        ({"min_successful_clients": 2}, "does not go with min_successful_clients=2"),
        ({"privacy": {**NOISE, "secret_sampling": True}}, "but all take part. Set `clients_per_round`"),
        (
            {
                "privacy": {**NOISE, "secret_sampling": True},
                "participation_weights": {"a": 1.0},
                "clients_per_round": 1,
            },
            "but `participation_weights` are given",
        ),
    ],
    ids=str,
)
def test_arguments_that_it_does_not_go_with_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FederatedArguments("out", **{"privacy": NOISE, **fields})


def test_secret_sampling_needs_clients_that_are_always_available(tmp_path):
    privacy = {**NOISE, "secret_sampling": True}
    with pytest.raises(ValueError, match="`availability` decides who can be drawn"):
        make_trainer(tmp_path, privacy=privacy, clients_per_round=2, availability=lambda client, number: True)


def test_a_round_0_without_noise_is_refused(tmp_path):
    adapter = RavanConfig(r=4, num_heads=2, init_bases="gradient_svd", task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="in a round 0, which has neither clipping nor noise"):
        make_trainer(tmp_path, adapter, privacy=NOISE)


def test_running_statistics_are_refused(tmp_path):
    model = tiny_bert()
    model.classifier = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 4))
    model = get_peft_model(model, ravan())
    assert any("running_var" in name for name in LiveAdapter(model).statistics)
    with pytest.raises(ValueError, match="running statistics that clients upload, such as .*running_mean"):
        FederatedTrainer(model, arguments(tmp_path, privacy=NOISE), train_dataset=classification_dataset(40))
