"""The merge library within the rounds: methods that need the adapter's configuration, a frozen part, or a state."""

import pytest
import torch
from safetensors.torch import load_file

from peft_ravan.merging import MERGE_METHODS, SERVER_OPTIMIZERS
from peft_ravan.trainers import FederatedCallback

from .helpers import adapter_state, arguments, assert_same, lora, make_trainer, of_each_kind, ravan


@pytest.mark.parametrize("merge_method", of_each_kind(name for name in MERGE_METHODS if name != "fed_sb"))
def test_every_method_runs_on_lora(tmp_path, merge_method):
    trainer = make_trainer(tmp_path, lora(), merge_method=merge_method, max_steps=1)
    before = adapter_state(trainer)
    trainer.train()
    assert all(torch.isfinite(tensor).all() for tensor in adapter_state(trainer).values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in adapter_state(trainer).items())


def test_ffa_lora_freezes_a_and_does_not_upload_it(tmp_path):
    trainer = make_trainer(tmp_path, lora(), merge_method="ffa_lora")
    frozen = [name for name, parameter in trainer.model.named_parameters() if ".lora_A." in name]
    first_values = {name: trainer.model.get_parameter(name).clone() for name in frozen}
    trainer.train()
    assert frozen and all(torch.equal(trainer.model.get_parameter(name), first_values[name]) for name in frozen)
    assert not any("lora_A" in name for name in adapter_state(trainer))
    full = make_trainer(tmp_path, lora(), merge_method="fedit")
    full.train()
    assert trainer.state.log_history[-1]["upload_bytes"] < 0.7 * full.state.log_history[-1]["upload_bytes"]


class Uploads(FederatedCallback):
    """A client fault that changes nothing. Records the uploads of each round and the parameters in the optimizers."""

    def __init__(self):
        self.states, self.optimized = {}, {}

    def __call__(self, client, round_number, update):
        self.states.setdefault(round_number, []).append(dict(update.state))

    def on_round_begin(self, args, state, control, clients, **kwargs):
        self.round = state.global_step + 1

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self.optimized[self.round] = {n for n, p in model.named_parameters() if id(p) in trained}


def lora_parts(names):
    return {part for part in (".lora_A.", ".lora_B.") if any(part in name for name in names)}


@pytest.mark.parametrize(
    "merge_method, trained",
    [
        ("rolora", [".lora_B.", ".lora_A.", ".lora_B."]),
        ("fedsvd", [".lora_B."] * 3),
        ("fedit", [(".lora_A.", ".lora_B.")] * 3),
    ],
)
def test_clients_train_and_upload_what_is_not_frozen_in_the_round(tmp_path, merge_method, trained):
    uploads = Uploads()
    trainer = make_trainer(
        tmp_path, lora(), merge_method=merge_method, num_rounds=3, client_fault=uploads, callbacks=[uploads]
    )
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    trainer.train()
    for number, expected in enumerate(trained, start=1):
        expected = {expected} if isinstance(expected, str) else set(expected)
        assert len(uploads.states[number]) == 4
        assert all(lora_parts(state) == expected for state in uploads.states[number])
        assert lora_parts(uploads.optimized[number]) == expected
        assert any("classifier" in name for name in uploads.optimized[number])
    # the model is restored
    assert trainable == [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert lora_parts(adapter_state(trainer)) == {".lora_A.", ".lora_B."}


def test_rolora_moves_the_factor_of_the_round_only(tmp_path):
    trainers = [make_trainer(tmp_path, lora(), merge_method="rolora", num_rounds=number) for number in (1, 2)]
    start = adapter_state(trainers[0])
    for trainer in trainers:
        trainer.train()
    first, second = map(adapter_state, trainers)
    for name in start:
        if ".lora_" in name:
            assert torch.equal(start[name], first[name]) == (".lora_A." in name), name
            assert torch.equal(first[name], second[name]) == (".lora_B." in name), name


def test_the_first_round_of_rolora_is_one_of_ffa_lora(tmp_path):
    trainers = [
        make_trainer(tmp_path, lora(), merge_method=merge_method, num_rounds=1)
        for merge_method in ("rolora", "ffa_lora")
    ]
    for trainer in trainers:
        trainer.train()
    rolora, ffa_lora = map(adapter_state, trainers)
    assert_same({name: rolora[name] for name in ffa_lora}, ffa_lora)
    assert {name for name in rolora if name not in ffa_lora} == {name for name in rolora if ".lora_A." in name}
    rolora, ffa_lora = (trainer.state.log_history[-1] for trainer in trainers)
    # both upload B; RoLoRA also sends A to the clients, since other rounds change it
    assert rolora["upload_bytes"] == ffa_lora["upload_bytes"]
    assert ffa_lora["download_bytes"] < 1.1 * ffa_lora["upload_bytes"] < rolora["download_bytes"]


def test_fedsvd_gives_clients_an_orthonormal_a(tmp_path):
    trainer = make_trainer(tmp_path, lora(), merge_method="fedsvd")
    trainer.train()
    matrices = [tensor for name, tensor in adapter_state(trainer).items() if ".lora_A." in name]
    assert matrices
    for A in matrices:
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), atol=1e-5, rtol=0)


def test_scaffold_keeps_the_control_variates_of_what_rests(tmp_path):
    trainer = make_trainer(
        tmp_path, lora(), merge_method="rolora", scaffold=True, optim="sgd", num_rounds=3, save_strategy="epoch"
    )
    trainer.train()
    controls = [
        {
            n: t
            for n, t in load_file(tmp_path / f"checkpoint-{number}" / "federation_state.safetensors").items()
            if n.startswith("control.")
        }
        for number in (1, 2, 3)
    ]
    assert [lora_parts(control) for control in controls] == [
        {".lora_B."},
        {".lora_A.", ".lora_B."},
        {".lora_A.", ".lora_B."},
    ]
    for number, resting in ((1, ".lora_B."), (2, ".lora_A.")):
        for name in controls[number]:
            if ".lora_" in name and name in controls[number - 1]:
                assert torch.equal(controls[number][name], controls[number - 1][name]) == (resting in name), name


def test_a_server_optimizer_without_memory_is_the_plain_merge(tmp_path):
    plain = make_trainer(tmp_path)
    with_momentum = make_trainer(
        tmp_path, server_optimizer="fedavgm", server_optimizer_options={"learning_rate": 1.0, "momentum": 0.0}
    )
    plain.train(), with_momentum.train()
    assert_same(adapter_state(plain), adapter_state(with_momentum), atol=1e-6, rtol=1e-5)


def test_momentum_carries_over_from_round_to_round(tmp_path):
    class States(FederatedCallback):
        def on_round_end(self, *args, **kwargs):
            states.append(adapter_state(trainer))

    rounds = []
    for momentum in (0.0, 0.9):
        states = []
        trainer = make_trainer(
            tmp_path, server_optimizer="fedavgm", server_optimizer_options=f'{{"momentum": {momentum}}}',
            callbacks=[States()],
        )  # fmt: skip
        trainer.train()
        rounds.append(states)
    (first, without), (first_with_momentum, with_momentum) = rounds
    assert_same(first, first_with_momentum)  # in the first round there is nothing to remember
    assert any(not torch.allclose(without[name], with_momentum[name], atol=1e-4) for name in without)


@pytest.mark.parametrize("server_optimizer", list(SERVER_OPTIMIZERS))
def test_the_card_names_the_server_optimizer(tmp_path, server_optimizer):
    trainer = make_trainer(tmp_path, server_optimizer=server_optimizer, num_rounds=1, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert SERVER_OPTIMIZERS[server_optimizer].pretty_name in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("adapter", [ravan, lora])
def test_a_method_that_does_not_suit_the_adapter_is_refused_with_what_does(tmp_path, adapter):
    merge_method, message = ("fedit", "method='ravan'") if adapter is ravan else ("fed_sb", "num_heads=1")
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, adapter(), merge_method=merge_method, max_steps=1).train()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"merge_method": "fedadam"}, "'fedadam' is a server optimizer.*server_optimizer='fedadam'"),
        ({"server_optimizer": "adam"}, "no server optimizer 'adam'. Did you mean `fedadam`. Choose one of: fedavgm"),
        (
            {"merge_method": "flora", "server_optimizer": "fedadam"},
            "FLoRA starts A and B anew after a merge, so a server optimizer has no difference to follow",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_the_run(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_options_of_the_server_optimizer_are_checked_before_the_run(tmp_path):
    with pytest.raises(TypeError, match="'fedavgm' has no option 'beta_1'. Its options are: learning_rate, momentum"):
        arguments(tmp_path, server_optimizer="fedavgm", server_optimizer_options={"beta_1": 0.5})
