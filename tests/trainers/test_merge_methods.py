"""The merge library within the rounds: methods that need the adapter's configuration, a frozen part, or a memory."""

import pytest
import torch

from peft_ravan.merging import MERGE_METHODS, SERVER_OPTIMIZERS

from .helpers import adapter_state, arguments, assert_same, lora, make_trainer, ravan


IN_ROUNDS = [name for name, method in MERGE_METHODS.items() if not method.changes_model]


@pytest.mark.parametrize("merge_method", [name for name in IN_ROUNDS if name != "fed_sb"])
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


def test_a_server_optimizer_without_memory_is_the_plain_merge(tmp_path):
    plain = make_trainer(tmp_path)
    with_momentum = make_trainer(
        tmp_path, server_optimizer="fedavgm", server_optimizer_options={"learning_rate": 1.0, "momentum": 0.0}
    )
    plain.train(), with_momentum.train()
    assert_same(adapter_state(plain), adapter_state(with_momentum), atol=1e-6, rtol=1e-5)


def test_momentum_carries_over_from_round_to_round(tmp_path):
    rounds = {}
    for momentum in (0.0, 0.9):
        trainer = make_trainer(
            tmp_path, server_optimizer="fedavgm", server_optimizer_options=f'{{"momentum": {momentum}}}', num_rounds=1
        )
        trainer.train()
        rounds[momentum] = adapter_state(trainer)
    assert_same(rounds[0.0], rounds[0.9])  # in the first round there is nothing to remember

    trainers = [
        make_trainer(tmp_path, server_optimizer="fedavgm", server_optimizer_options={"momentum": momentum})
        for momentum in (0.0, 0.9)
    ]
    for trainer in trainers:
        trainer.train()
    without, with_momentum = map(adapter_state, trainers)
    assert any(not torch.allclose(without[name], with_momentum[name], atol=1e-4) for name in without)


@pytest.mark.parametrize("server_optimizer", list(SERVER_OPTIMIZERS))
def test_the_card_names_the_server_optimizer(tmp_path, server_optimizer):
    trainer = make_trainer(tmp_path, server_optimizer=server_optimizer, num_rounds=1, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert SERVER_OPTIMIZERS[server_optimizer].pretty_name in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("adapter", [ravan, lora])
def test_a_method_that_does_not_suit_the_adapter_is_told_by_what_does(tmp_path, adapter):
    merge_method, message = ("fedit", "method='ravan'") if adapter is ravan else ("fed_sb", "num_heads=1")
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, adapter(), merge_method=merge_method, max_steps=1).train()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"merge_method": "fedadam"}, "'fedadam' is a server optimizer.*server_optimizer='fedadam'"),
        ({"server_optimizer": "adam"}, "no server optimizer 'adam'. Choose one of: fedavgm"),
        ({"merge_method": "flora"}, "'flora'` changes the base model or the rank"),
    ],
)
def test_what_cannot_run_is_told_before_the_run(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_options_of_the_server_optimizer_are_checked_before_the_run(tmp_path):
    with pytest.raises(TypeError, match="'fedavgm' has no option 'beta_1'. Its options are: learning_rate, momentum"):
        arguments(tmp_path, server_optimizer="fedavgm", server_optimizer_options={"beta_1": 0.5})
