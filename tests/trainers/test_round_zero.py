"""Round 0: the common bases are computed from the clients' gradients, only once, and their bytes are counted."""

import json
from dataclasses import replace

import datasets
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from peft_ravan import RavanConfig, initialize_bases_from_gradient, optimizer_parameter_groups
from peft_ravan.trainers import CheckpointError, FederatedCallback, FederatedTrainer, RoundFailedError
from peft_ravan.trainers.files import file_digest
from peft_ravan.trainers.records.reporting import federation_record
from peft_ravan.trainers.server.checkpoints import OWN_DIGEST, content_digest
from peft_ravan.trainers.server.round_zero import sample_bases_clients
from peft_ravan.tuner.gradient_bases import awaits_gradient, make_sketches, sketch_state

from ..conftest import VOCAB_SIZE, classification_dataset, tiny_bert, tiny_llama
from .helpers import (
    adapter_state,
    arguments,
    assert_same,
    comparable,
    interrupted,
    lora,
    make_trainer,
    ravan,
    resumable_trainer,
)


def gradient_svd(**kwargs) -> RavanConfig:
    defaults = {"r": 2, "num_heads": 2, "init_bases": "gradient_svd", "task_type": "SEQ_CLS"}
    return RavanConfig(**{**defaults, **kwargs})


def bases_of(trainer) -> dict[str, torch.Tensor]:
    return {
        name: buffer.clone()
        for name, buffer in trainer.model.named_buffers()
        if ".ravan_A." in name or ".ravan_B." in name
    }


def clients_of(*sizes) -> dict:
    dataset, start, clients = classification_dataset(sum(sizes)), 0, {}
    for index, size in enumerate(sizes):
        clients[f"client_{index}"] = dataset.select(range(start, start + size))
        start += size
    return clients


def opened(tmp_path, clients, adapter=None, model=None, **kwargs):
    """A trainer after round 0 and one round with a learning rate of 0, so that nothing else has changed."""
    defaults = {"num_clients": None, "num_rounds": 1, "max_steps": 1, "bases_warmup_steps": 0, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, adapter or gradient_svd(), model, train_dataset=clients, **{**defaults, **kwargs})
    trainer.train()
    return trainer


def opening(trainer) -> dict:
    [record] = [record for record in trainer.state.log_history if record["round"] == 0]
    return record


def batch_of(dataset):
    return dataset.with_format("torch")[:]


def assert_same_directions(first, second):
    """Check that both span the same space, up to the precision of sketches that are sent in bfloat16."""
    assert first.keys() == second.keys()
    for name, basis in first.items():
        product = basis @ second[name].T if ".ravan_A." in name else basis.T @ second[name]
        assert torch.linalg.svdvals(product).min() > 0.99, name


# ---- The bases -------------------------------------------------------------------


def test_one_client_makes_the_bases_of_its_batches(tmp_path):
    seen = []
    trainer = make_trainer(
        tmp_path, gradient_svd(), train_dataset=clients_of(40), num_clients=None, num_rounds=1, bases_warmup_steps=0,
        bases_batches=3,
    )  # fmt: skip
    compute_loss = trainer.compute_loss

    def spy(model, inputs, *args, **kwargs):
        if not model.training:
            seen.append(dict(inputs))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    assert len(seen) == 3
    model = get_peft_model(tiny_bert(), gradient_svd())
    initialize_bases_from_gradient(model, seen)
    expected = {name: buffer for name, buffer in model.named_buffers() if name in bases_of(trainer)}
    assert_same_directions(bases_of(trainer), expected)


def test_clients_make_the_bases_of_the_pooled_gradient(tmp_path):
    """With one batch each, the mean weighted by examples is the gradient of all examples, whatever the order."""
    clients = clients_of(8, 16, 24)
    model = get_peft_model(tiny_bert(), gradient_svd())
    initialize_bases_from_gradient(model, [batch_of(classification_dataset(48))])
    for order in (list(clients), list(reversed(clients))):
        trainer = opened(tmp_path, {name: clients[name] for name in order}, per_device_train_batch_size=24)
        expected = {name: buffer for name, buffer in model.named_buffers() if name in bases_of(trainer)}
        assert_same_directions(bases_of(trainer), expected)


@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_mixed_precision_and_parameter_groups(tmp_path, warmup_steps):
    """The directions are those of float32 up to the precision of bfloat16, and an optimizer may hold frozen cores."""
    model = get_peft_model(tiny_bert(), gradient_svd())
    trainer = FederatedTrainer(
        model,
        arguments(tmp_path, num_clients=None, num_rounds=1, max_steps=1, bf16=True, bases_warmup_steps=warmup_steps),
        train_dataset=clients_of(24, 24),
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": optimizer_parameter_groups(model, 1e-3, 1e-2)}),
    )
    trainer.train()
    assert not awaits_gradient(model)
    if warmup_steps == 0:
        exact = bases_of(opened(tmp_path, clients_of(24, 24)))
        assert all(
            torch.linalg.svdvals(basis @ exact[name].T)[0] > 0.99
            for name, basis in bases_of(trainer).items()
            if ".ravan_A." in name
        )


def test_the_mean_of_sketches_is_the_sketch_of_the_mean_gradient(tmp_path):
    uploads = []

    def keep(client, round_number, update):
        if round_number == 0:
            uploads.append(update)

    clients = clients_of(8, 24)
    trainer = make_trainer(
        tmp_path, gradient_svd(), train_dataset=clients, num_clients=None, num_rounds=1, bases_warmup_steps=0,
        per_device_train_batch_size=24, client_fault=keep,
    )  # fmt: skip
    trainer.train()
    reference = tiny_bert().eval()
    reference(**batch_of(classification_dataset(32))).loss.backward()
    sketches = make_sketches(get_peft_model(tiny_bert(), gradient_svd()))
    for name, sketch in sketches.items():
        sketch.add_gradient(reference.get_submodule(name).weight.grad)
    mean = {name: 0.25 * uploads[0].state[name] + 0.75 * uploads[1].state[name] for name in uploads[0].state}
    assert [update.num_examples for update in uploads] == [8, 24]
    assert_same(mean, sketch_state(sketches), atol=1e-4, rtol=2**-7)  # of bfloat16


def test_the_head_is_warmed_up_alone_and_the_federation_starts_from_it(tmp_path):
    uploads = []

    def keep(client, round_number, update):
        if round_number == 0:
            uploads.append(update)

    trainer = make_trainer(
        tmp_path, gradient_svd(), train_dataset=clients_of(30, 10), num_clients=None, client_fault=keep,
        bases_warmup_steps=4, num_rounds=1, client_budgets=0.5, lr_scheduler_type="linear", warmup_steps=1,
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    starts = []

    class Start(FederatedCallback):
        def on_round_begin(self, args, state, control, clients, **kwargs):
            starts.append(adapter_state(trainer))
            assert all(
                parameter.requires_grad for name, parameter in trainer.model.named_parameters() if "ravan" in name
            )

    trainer.add_callback(Start())
    trainer.train()
    heads, sketches = uploads[:2], uploads[2:]
    assert len(sketches) == 2 and all("classifier" in name for update in heads for name in update.state)
    for name in heads[0].state:
        assert not torch.equal(heads[0].state[name], heads[1].state[name])
        mean = 0.75 * heads[0].state[name] + 0.25 * heads[1].state[name]
        torch.testing.assert_close(starts[0][name], mean)
        assert not torch.allclose(mean, before[name.replace("classifier.", "classifier.modules_to_save.default.")])
    assert all(not tensor.any() for name, tensor in starts[0].items() if name.endswith("ravan_H"))
    record = opening(trainer)
    assert record["learning_rate"] == 1e-2 and record["train_loss"] > 0


def test_gradients_are_those_at_the_warmed_up_head(tmp_path):
    clients = clients_of(40)
    heads = []

    def keep(client, round_number, update):
        if round_number == 0:
            heads.append(update.state)

    trainer = make_trainer(
        tmp_path, gradient_svd(), train_dataset=clients, num_clients=None, num_rounds=1, client_fault=keep,
        bases_warmup_steps=5, per_device_train_batch_size=40,
    )  # fmt: skip
    trainer.train()
    model = get_peft_model(tiny_bert(), gradient_svd())
    for name in ("weight", "bias"):
        parameter = getattr(model.base_model.model.classifier.modules_to_save["default"], name)
        parameter.data.copy_(heads[0][f"base_model.model.classifier.{name}"])
    initialize_bases_from_gradient(model, [batch_of(clients["client_0"])])
    expected = {name: buffer for name, buffer in model.named_buffers() if name in bases_of(trainer)}
    assert_same_directions(bases_of(trainer), expected)


@pytest.mark.parametrize("adapter", [ravan(), lora()], ids=["ravan", "lora"])
def test_other_adapters_have_no_round_zero(tmp_path, adapter):
    trainer = make_trainer(tmp_path, adapter, num_rounds=1, max_steps=1)
    trainer.train()
    assert [record["round"] for record in trainer.state.log_history] == [1]


def test_bases_that_were_made_before_are_kept(tmp_path):
    trainer = make_trainer(tmp_path, gradient_svd(), num_rounds=1, max_steps=1)
    initialize_bases_from_gradient(trainer.model, [batch_of(classification_dataset(16))])
    before = bases_of(trainer)
    trainer.train()
    assert [record["round"] for record in trainer.state.log_history] == [1]
    assert_same(bases_of(trainer), before)


def test_an_adapter_that_was_trained_on_bases_that_stand_in_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, gradient_svd(init_weights=False), num_rounds=1, max_steps=1)
    before = adapter_state(trainer)
    with pytest.raises(ValueError, match="was trained already"):
        trainer.train()
    assert_same(adapter_state(trainer), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bases_that_stand_in_are_known(dtype):
    model = get_peft_model(tiny_bert(), gradient_svd()).to(dtype)
    assert awaits_gradient(model)
    with torch.no_grad():
        names = [name.removesuffix(".columns") for name in sketch_state(make_sketches(model)) if "columns" in name]
        gradients = {name: torch.randn_like(model.get_base_model().get_submodule(name).weight) for name in names}
    initialize_bases_from_gradient(model, {name: gradient.float() for name, gradient in gradients.items()})
    assert not awaits_gradient(model)


# ---- What it costs ---------------------------------------------------------------


def wide_bert() -> BertForSequenceClassification:
    """A model so wide that the names in a file take little space compared with the numbers."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB_SIZE, hidden_size=256, num_hidden_layers=1, num_attention_heads=2, intermediate_size=512,
            max_position_embeddings=16, num_labels=4,
        )
    )  # fmt: skip


def test_bytes_are_those_of_sketches_heads_and_bases(tmp_path):
    adapter = gradient_svd(r=8, target_modules=["intermediate.dense", "output.dense"])
    clients = clients_of(8, 8, 8, 8)
    record = opening(opened(tmp_path, clients, adapter, wide_bert(), bases_clients=2))
    targets = [(256, 512), (512, 256), (256, 256)]  # d_in, d_out
    # h*r and an oversampling of 10 for the rows, and of 20 for the columns
    sketches = 2 * sum(d_out * (16 + 10) + d_in * (16 + 20) for d_in, d_out in targets)  # bytes, in bfloat16
    bases, head = 4 * sum((d_in + d_out) * 16 for d_in, d_out in targets), 4 * (256 * 4 + 4)
    assert record["upload_bytes"] == pytest.approx(2 * sketches, rel=0.01)
    assert record["upload_bytes"] < 0.1 * 2 * 4 * sum(d_in * d_out for d_in, d_out in targets)
    # the bases are sent to all four, which will take part in later rounds
    assert record["download_bytes"] == pytest.approx(2 * head + 4 * bases, rel=0.01)

    warmed = opening(opened(tmp_path, clients, adapter, wide_bert(), bases_clients=2, bases_warmup_steps=1))
    assert warmed["upload_bytes"] == pytest.approx(2 * (sketches + head), rel=0.01)
    assert warmed["download_bytes"] == pytest.approx(2 * 2 * head + 4 * bases, rel=0.01)


def test_fewer_directions_make_smaller_sketches(tmp_path):
    """The leading ones are still found; the others are arbitrary, but make the bases orthonormal."""
    adapter = {"r": 8, "target_modules": ["intermediate.dense", "output.dense"], "bases_scale": "paper"}
    all_found = opened(tmp_path, clients_of(8, 8), gradient_svd(**adapter), wide_bert())
    leading = opened(tmp_path, clients_of(8, 8), gradient_svd(**adapter), wide_bert(), bases_rank=2)
    targets = [(256, 512), (512, 256), (256, 256)]  # d_in, d_out
    sketches = 2 * sum(d_out * (2 + 10) + d_in * (2 + 20) for d_in, d_out in targets)  # bytes, in bfloat16
    assert opening(leading)["upload_bytes"] == pytest.approx(2 * sketches, rel=0.02)
    for name, basis in bases_of(leading).items():
        other = bases_of(all_found)[name]
        rows, other = (basis, other) if ".ravan_A." in name else (basis.T, other.T)  # [h*r, d]
        torch.testing.assert_close(rows @ rows.T, torch.eye(16), atol=1e-5, rtol=0)
        assert torch.linalg.svdvals(rows[:2] @ other[:2].T).min() > 0.9


def test_it_shares_the_record_of_the_first_evaluation(tmp_path):
    trainer = opened(tmp_path, clients_of(20, 20, 20), bases_clients=2, eval_on_start=True)
    record = opening(trainer)
    assert [entry["round"] for entry in trainer.state.log_history] == [0, 1]
    assert len(record["clients"]) == 2 and record["num_examples"] == 40 and record["failed_clients"] == []
    assert record["round_seconds"] > 0 and "eval_accuracy" in record


def test_without_a_task_head_nothing_is_warmed_up(tmp_path):
    tokens = torch.randint(0, VOCAB_SIZE, (32, 8)).tolist()
    data = datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    trainer = FederatedTrainer(
        get_peft_model(tiny_llama(), gradient_svd(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])),
        arguments(tmp_path, num_clients=2, num_rounds=1, max_steps=1),
        train_dataset=data,
    )
    trainer.train()
    record = opening(trainer)
    assert record["learning_rate"] == 0 and not awaits_gradient(trainer.model)
    assert record["download_bytes"] < 2 * (4 * sum(map(torch.numel, bases_of(trainer).values())) + 3000)


def test_the_totals_and_the_card_include_it(tmp_path):
    trainer = make_trainer(tmp_path, gradient_svd(), num_rounds=1, max_steps=1, bases_clients=3)
    metrics = trainer.train().metrics
    history = trainer.state.log_history
    assert metrics["upload_bytes"] == sum(record["upload_bytes"] for record in history)
    assert metrics["download_bytes"] == sum(record["download_bytes"] for record in history)
    assert metrics["train_loss"] == history[1]["train_loss"]
    record = federation_record(trainer.federation, trainer.state.log_history)
    assert record.facts["Rounds"] == 1 and "gradients of 3 clients, in a round 0" in record.facts["Bases"]
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"{history[0]['upload_bytes'] / 1e6:.2f} MB of uploads" in card
    assert "\n| 0 | 3 |" in card and "\n| 1 | 4 |" in card


# ---- Clients ---------------------------------------------------------------------


def of_ten(tmp_path, **kwargs):
    return arguments(tmp_path, num_clients=10, bases_clients=4, **kwargs)


def test_clients_are_drawn_from_the_seed_and_with_their_weights(tmp_path):
    sizes = {f"client_{index}": 10 for index in range(10)}

    def draw(**kwargs) -> list[str]:
        args = of_ten(tmp_path, **kwargs)
        return sample_bases_clients(sizes, args.participation, args.bases_clients)

    assert draw() == draw()
    draws = {tuple(draw(federated_seed=seed)) for seed in range(5)}
    assert len(draws) == 5 and {len(drawn) for drawn in draws} == {4}
    weights = {name: float(index < 5) for index, name in enumerate(sizes)}
    assert set(draw(participation_weights=weights)) <= set(list(sizes)[:5])
    participation = arguments(tmp_path, num_clients=10, clients_per_round=3).participation
    assert len(sample_bases_clients(sizes, participation, None)) == 3


def failing(*clients, how="raise", phase="rows"):
    def fault(client, round_number, update):
        if round_number or client not in clients or (phase == "rows") != any(".rows" in name for name in update.state):
            return None
        if how == "raise":
            raise ConnectionError("gone")
        return replace(update, state={name: tensor * torch.nan for name, tensor in update.state.items()})

    return fault


@pytest.mark.parametrize("how, reason", [("raise", "ConnectionError: gone"), ("nan", "NaN or infinite")])
@pytest.mark.parametrize("phase", ["head", "rows"])
def test_a_client_that_fails_costs_its_own_contribution(tmp_path, how, reason, phase):
    clients = clients_of(24, 24, 24)
    fault = failing("client_1", how=how, phase=phase)
    trainer = make_trainer(
        tmp_path, gradient_svd(), train_dataset=clients, num_clients=None, num_rounds=1, max_steps=1,
        client_fault=fault, bases_warmup_steps=1 if phase == "head" else 0,
    )  # fmt: skip
    trainer.train()
    record = opening(trainer)
    assert record["clients"] == ["client_0", "client_2"] and record["num_examples"] == 48
    [failure] = record["failed_clients"]
    assert failure["client"] == "client_1" and reason in failure["reason"]
    others = {name: clients[name] for name in ("client_0", "client_2")}
    if phase == "rows":
        assert_same(bases_of(trainer), bases_of(opened(tmp_path, others)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("how", ["raise", "nan"])
@pytest.mark.parametrize("phase", ["head", "rows"])
def test_without_enough_clients_nothing_has_changed(tmp_path, how, phase):
    trainer = make_trainer(
        tmp_path, gradient_svd(), train_dataset=clients_of(16, 16), num_clients=None, bases_warmup_steps=1,
        client_fault=failing("client_0", "client_1", how=how, phase=phase),
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(RoundFailedError, match="Round 0, which makes the bases: .*'client_0'.*bases_clients"):
        trainer.train()
    assert_same(dict(trainer.model.state_dict()), before)


def test_a_slow_client_is_given_up(tmp_path):
    with pytest.raises(RoundFailedError, match="client_timeout"):
        opened(tmp_path, clients_of(16), client_timeout=1e-9)


@pytest.mark.parametrize(
    "kwargs", [{"bases_clients": 0}, {"bases_clients": 5}, {"bases_batches": 0}, {"bases_warmup_steps": -1}], ids=str
)
def test_arguments_out_of_range(tmp_path, kwargs):  # num_clients is 4
    [name] = kwargs
    with pytest.raises(ValueError, match=f"`{name}` must (not )?be"):
        arguments(tmp_path, **kwargs)


# ---- Resuming --------------------------------------------------------------------


def test_a_resumed_run_has_the_bases_and_is_the_uninterrupted_run(tmp_path):
    kwargs = {"bases_clients": 3, "bases_warmup_steps": 2, "num_rounds": 3, "eval_on_start": True}
    whole = resumable_trainer(tmp_path / "whole", adapter=gradient_svd(), **kwargs)
    whole.train()
    interrupted(tmp_path / "resumed", 1, adapter=gradient_svd(), **kwargs)
    resumed = resumable_trainer(tmp_path / "resumed", adapter=gradient_svd(), **kwargs)
    addresses = {name: buffer.data_ptr() for name, buffer in resumed.model.named_buffers()}
    torch.manual_seed(1234)
    resumed.train(resume_from_checkpoint=True)
    assert addresses == {name: buffer.data_ptr() for name, buffer in resumed.model.named_buffers()}
    assert_same(bases_of(whole), bases_of(resumed))
    assert_same(adapter_state(whole), adapter_state(resumed))
    assert comparable(whole.state.log_history) == comparable(resumed.state.log_history)
    assert [record["round"] for record in resumed.state.log_history] == [0, 1, 2, 3]
    first, second = (
        load_file(tmp_path / run / "checkpoint-3" / "adapter_model.safetensors") for run in ("whole", "resumed")
    )
    assert_same(first, second)


class StopInRoundZero(FederatedCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_a_run_that_was_interrupted_in_round_zero_starts_it_again(tmp_path):
    trainer = make_trainer(tmp_path, gradient_svd(), callbacks=[StopInRoundZero()])
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same(dict(trainer.model.state_dict()), before)
    trainer.pop_callback(StopInRoundZero)
    trainer.train()
    whole = make_trainer(tmp_path, gradient_svd())
    whole.train()
    assert_same(bases_of(trainer), bases_of(whole))
    assert_same(adapter_state(trainer), adapter_state(whole))


def test_a_second_run_keeps_the_bases(tmp_path):
    trainer = make_trainer(tmp_path, gradient_svd(), num_rounds=1, max_steps=1)
    trainer.train()
    bases = bases_of(trainer)
    trainer.train()
    assert_same(bases_of(trainer), bases)
    assert [record["round"] for record in trainer.state.log_history] == [1]


def test_a_checkpoint_without_its_bases_or_with_others_is_refused(tmp_path):
    kwargs = {"num_rounds": 1, "max_steps": 1, "adapter": gradient_svd()}
    resumable_trainer(tmp_path, **kwargs).train()
    other = resumable_trainer(tmp_path, **kwargs)
    initialize_bases_from_gradient(other.model, [batch_of(classification_dataset(16))])
    with pytest.raises(CheckpointError, match="the bases in .* are not those of the model"):
        other.train(resume_from_checkpoint=True)

    folder = tmp_path / "checkpoint-1"
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "ravan_A" not in name}, file)
    state = json.loads((folder / "federation_state.json").read_text())
    state["files"][file.name] = file_digest(file)
    del state[OWN_DIGEST]
    (folder / "federation_state.json").write_text(json.dumps({**state, OWN_DIGEST: content_digest(state)}))
    trainer = resumable_trainer(tmp_path, **kwargs)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(CheckpointError, match="were made from gradients, and are not in the checkpoint"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert_same(dict(trainer.model.state_dict()), before)
