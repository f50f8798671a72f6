"""FedProx and SCAFFOLD compared with loops that follow their papers."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from peft_ravan.merging import UpdateError
from peft_ravan.trainers import FederatedCallback
from peft_ravan.trainers.client.objective import GradientCorrection, control_change, of_scaffold
from peft_ravan.trainers.server.checkpoints import read_server_state
from peft_ravan.trainers.server.control_variates import ControlVariates

from .helpers import (
    adapter_state,
    assert_same,
    kept_by_clients,
    lora,
    make_trainer,
    ravan,
    resumable_trainer,
    resumed_after,
)


class Quadratic(torch.nn.Module):
    """The loss 1/2 * ||w - target||^2, whose gradient is w - target."""

    def __init__(self, start: float):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([start]))


def local_steps(model, target, correction, steps=4, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    optimizer.register_step_pre_hook(correction)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (model.w - target).square()).sum().backward()
        optimizer.step()
    return model.w.item()


def test_fedprox_is_gradient_descent_on_the_proximal_objective():
    model, mu, w = Quadratic(1.0), 0.5, 1.0
    found = local_steps(model, target=3.0, correction=GradientCorrection(model, proximal_mu=mu))
    for _ in range(4):
        w -= 0.1 * ((w - 3.0) + mu * (w - 1.0))
    assert found == pytest.approx(w, abs=1e-6)


def test_scaffold_is_option_two_of_the_paper():
    # two clients with targets 1 and 5, written out: x and c of the server, c_i of the clients
    x, c, controls, targets, lr, steps = 0.0, 0.0, [0.0, 0.0], [1.0, 5.0], 0.1, 4
    server_control, kept, found_x = {}, [{}, {}], 0.0
    for _ in range(3):
        control = ControlVariates(server_control, num_clients=2)
        new_x, found, changes = [], [], []
        for index, target in enumerate(targets):
            y = x
            for _ in range(steps):
                y -= lr * ((y - target) - controls[index] + c)
            new_control = controls[index] - c + (x - y) / (steps * lr)
            changes.append(new_control - controls[index])
            controls[index] = new_control
            new_x.append(y)

            model = Quadratic(found_x)
            correction = GradientCorrection(model, 0.0, control.server, kept[index])
            found.append(local_steps(model, target, correction, steps, lr))
            control.receive(str(index), control_change(kept[index], correction.new_client_control()))
            control.add(str(index))
            kept[index] = correction.new_client_control()
        x, c = sum(new_x) / 2, c + sum(changes) / 2
        found_x, server_control = sum(found) / 2, control.moved()
        assert found_x == pytest.approx(x, abs=1e-5)
        assert server_control["w"].item() == pytest.approx(c, abs=1e-5)
        assert [part["w"].item() for part in kept] == pytest.approx(controls, abs=1e-5)


class Two(torch.nn.Module):
    """Two parameters, of which a loss may use only one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.tensor([1.0])) for _ in range(2))


def steps_without(model, correction, used, lr=0.1):
    """Steps on the losses 3 * a and 3 * a + 6 * b."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    optimizer.register_step_pre_hook(correction)
    for with_b in used:
        optimizer.zero_grad()
        (3 * model.a + (6 * model.b if with_b else 0)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("used", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_parameter_without_gradient_in_some_steps_has_a_gradient_of_zero_there(used):
    model = Two()
    server, client = {"b": torch.tensor([1.0])}, {"b": torch.tensor([0.5])}
    correction = GradientCorrection(model, 0.0, server, client)
    steps_without(model, correction, used)
    new = correction.new_client_control()
    assert new["a"].item() == pytest.approx(3.0) and new["b"].item() == pytest.approx(6 / 3)
    # option II of the paper: c_i - c + (x - y) / (K * lr)
    for name, start in (("a", 0.0), ("b", 0.5 - 1.0)):
        y = getattr(model, name).item()
        assert new[name].item() == pytest.approx(start + (1.0 - y) / (3 * 0.1), abs=1e-6)


def test_a_parameter_without_gradient_in_any_step_loses_its_control_variate():
    model, server, client = Two(), {}, {"b": torch.tensor([0.5])}
    correction = GradientCorrection(model, 0.0, server, client)
    steps_without(model, correction, (False, False))
    new = correction.new_client_control()
    assert set(new) == {"a"}
    assert {name: tensor.item() for name, tensor in control_change(client, new).items()} == {"a": 3.0, "b": -0.5}
    untouched = Two()
    steps_without(untouched, GradientCorrection(untouched, 0.5, {}, {}), (False, False))
    assert untouched.b.grad is None and untouched.b.item() == 1.0  # nothing pulls it, so no optimizer may move it


def test_fedprox_pulls_also_where_a_step_has_no_gradient():
    model = Two()
    steps_without(model, GradientCorrection(model, proximal_mu=0.5), (True, False))
    b = 1.0 - 0.1 * 6
    assert model.b.item() == pytest.approx(b - 0.1 * 0.5 * (b - 1.0))


def test_with_few_of_many_clients_the_control_of_the_server_moves_by_their_share():
    control = ControlVariates({}, num_clients=10)
    control.receive("a", control_change({}, {"w": torch.tensor([5.0])}))
    assert control.moved() == {}  # it is not yet known whether its update is merged
    control.add("a")
    assert control.moved()["w"].item() == 0.5


@pytest.mark.parametrize(
    "change",
    [None, {"w": torch.tensor([torch.nan])}, {"w": torch.zeros(2)}, {"w": torch.zeros(1, dtype=torch.int64)}],
    ids=["none", "NaN", "shape", "dtype"],
)
def test_a_change_of_a_control_variate_that_cannot_be_added_is_refused(change):
    with pytest.raises(UpdateError, match="'a'.* control variate"):
        ControlVariates({"w": torch.ones(1)}, num_clients=10).receive("a", change)


@pytest.mark.parametrize("adapter", [ravan, lora])
def test_a_strong_proximal_term_keeps_clients_at_the_global_adapter(tmp_path, adapter):
    moved = {}
    for mu in (0.0, 1e-9, 50.0):
        trainer = make_trainer(tmp_path, adapter(), proximal_mu=mu, optim="sgd", num_rounds=1, max_steps=5)
        start = adapter_state(trainer)
        trainer.train()
        end = adapter_state(trainer)
        moved[mu] = sum((tensor - start[name]).square().sum().item() for name, tensor in end.items())
    assert moved[1e-9] == pytest.approx(moved[0.0], rel=1e-3)
    assert moved[50.0] < 0.7 * moved[0.0]


def test_a_strong_proximal_term_keeps_the_heads_of_clients_with_budgets_too(tmp_path):
    moved = {}
    for mu in (0.0, 50.0):
        trainer = make_trainer(tmp_path, proximal_mu=mu, client_budgets=0.5, optim="sgd", num_rounds=1, max_steps=5)
        trainer.train()
        end = adapter_state(trainer)
        moved[mu] = sum(tensor.square().sum().item() for name, tensor in end.items() if "ravan_H" in name)
    assert 0 < moved[50.0] < 0.7 * moved[0.0]


def control_variates(trainer, round_number):
    """c, and the c_i of all clients, by the names of parameters."""
    state = read_server_state(f"{trainer.args.output_dir}/checkpoint-{round_number}").state
    return state.control, [of_scaffold(kept) for kept in kept_by_clients(trainer, state).values()]


def assert_c_is_the_mean(c, client_controls):
    assert c and any(tensor.abs().max() > 1e-4 for tensor in c.values())
    for name, tensor in c.items():
        mean = sum(control.get(name, torch.zeros_like(tensor)) for control in client_controls) / len(client_controls)
        torch.testing.assert_close(tensor, mean, atol=1e-7, rtol=1e-5)


def raises(update):
    raise RuntimeError("gone")


def has_another_shape(update):
    update.state[next(iter(update.state))] = torch.zeros(3)


def has_no_examples(update):
    return replace(update, num_examples=0)


@pytest.mark.parametrize("adapter, method", [(ravan, None), (lora, "fedrpca")], ids=["streaming", "all together"])
def test_a_client_that_is_not_merged_moves_no_control_variate(tmp_path, adapter, method):
    ends = {}
    for fault in (raises, has_another_shape, has_no_examples):

        def client_fault(client, round_number, update, fault=fault):
            if client == "client_1" and round_number == 2:
                return fault(update)

        trainer = make_trainer(
            tmp_path / fault.__name__, adapter(), scaffold=True, optim="sgd", num_rounds=2, client_fault=client_fault,
            save_strategy="epoch", merge_method=method,
        )  # fmt: skip
        trainer.train()
        assert [failed["client"] for failed in trainer.state.log_history[1]["failed_clients"]] == ["client_1"]
        c, client_controls = control_variates(trainer, 2)
        assert_c_is_the_mean(c, client_controls)
        ends[fault] = {**c, **{f"of client 1: {name}": tensor for name, tensor in client_controls[1].items()}}
    assert_same(ends[raises], ends[has_another_shape])
    assert_same(ends[raises], ends[has_no_examples])


def test_c_is_the_mean_of_all_clients_after_rounds_that_were_repeated(tmp_path):
    attempts = []

    class Attempts(FederatedCallback):
        def on_round_begin(self, args, state, control, clients, **kwargs):
            attempts.append((state.global_step + 1, clients))

    def client_fault(client, round_number, update):
        tried = [clients for number, clients in attempts if number == round_number]
        if len(tried) == 1 and client == tried[0][-1]:
            raise RuntimeError("gone")

    trainer = make_trainer(
        tmp_path, scaffold=True, optim="sgd", num_rounds=3, num_clients=12, clients_per_round=3, min_successful_clients=3,
        client_fault=client_fault, callbacks=[Attempts()], save_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    assert [record["attempts"] for record in trainer.state.log_history] == [2, 2, 2]
    for number in (1, 2, 3):
        assert_c_is_the_mean(*control_variates(trainer, number))
    _, client_controls = control_variates(trainer, 3)
    merged = {client for record in trainer.state.log_history for client in record["clients"]}
    kept = {client for client, control in zip(trainer.clients, client_controls, strict=True) if control}
    assert kept == merged < {client for _, clients in attempts for client in clients}


def test_scaffold_in_rounds_changes_what_clients_do_from_the_second_round_on(tmp_path):
    states = {}
    for scaffold in (False, True):
        for num_rounds in (1, 2):
            trainer = make_trainer(
                tmp_path / f"{scaffold}{num_rounds}", scaffold=scaffold, num_rounds=num_rounds, optim="sgd",
                partition="dirichlet", partition_alpha=0.1,
            )  # fmt: skip
            trainer.train()
            states[scaffold, num_rounds] = adapter_state(trainer)
    assert_same(states[False, 1], states[True, 1])  # all control variates start at zero
    assert any(not torch.equal(tensor, states[True, 2][name]) for name, tensor in states[False, 2].items())


def test_scaffold_counts_what_it_sends_and_keeps_control_variates_by_client(tmp_path):
    plain = make_trainer(tmp_path / "plain", num_rounds=2)
    scaffold = make_trainer(tmp_path / "scaffold", num_rounds=2, scaffold=True, clients_per_round=2)
    plain.train(), scaffold.train()
    uploads = [trainer.state.log_history[1]["upload_bytes"] for trainer in (plain, scaffold)]
    # 2 instead of 4 clients, each with its update and the change of its control variate, which has H and s apart
    assert uploads[1] == pytest.approx(uploads[0], rel=0.08)
    files = list((tmp_path / "scaffold" / "client_states").rglob("*.safetensors"))
    taken_part = {client for record in scaffold.state.log_history for client in record["clients"]}
    assert len({file.parent for file in files}) == len(taken_part)
    assert all(name.startswith("scaffold.") for name in load_file(files[0]))


def test_scaffold_resumed_is_scaffold_uninterrupted(tmp_path):
    options = {"scaffold": True, "proximal_mu": 0.1, "num_rounds": 3, "server_optimizer": None, "eval_strategy": "no"}
    whole = resumable_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = resumed_after(2, whole, tmp_path / "resumed", **options)
    assert_same(adapter_state(whole), adapter_state(resumed))
