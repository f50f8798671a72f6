"""Clients that train only some heads, within the rounds of a federation."""

import json
import math

import datasets
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import HfArgumentParser

from peft_ravan import RavanConfig, optimizer_parameter_groups
from peft_ravan.merging import MERGE_METHODS
from peft_ravan.trainers import FederatedArguments, FederatedCallback, FederatedTrainer
from peft_ravan.trainers.client.live_adapter import LiveAdapter
from peft_ravan.trainers.exchange import HEAD_SELECTIONS
from peft_ravan.trainers.server.budgets import BUDGET_DISTRIBUTIONS, draw_client_budgets

from ..conftest import CHECKPOINTING, classification_dataset, randomize_adapter, tiny_bert
from .helpers import FOUR_TARGETS, WithStatistics, adapter_state, arguments, assert_same, make_trainer, ravan_bert


NUM_HEADS, RANK, NUM_TARGETS = 4, 3, 4


def ravan(**kwargs) -> RavanConfig:
    defaults = {"r": RANK, "num_heads": NUM_HEADS, "task_type": "SEQ_CLS", "target_modules": FOUR_TARGETS}
    return RavanConfig(**{**defaults, **kwargs})


class Watch(FederatedCallback):
    """Records what each client trained, and the shapes of its gradients and its optimizer state."""

    def __init__(self):
        self.masks, self.starts, self.ends, self.moments, self.gradients = [], [], [], [], []

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            self.starts.append(dense_heads(model))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({n: p.grad.shape for n, p in model.named_parameters() if p.grad is not None})

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.moments.append([entry["exp_avg"].shape for entry in optimizer.state.values()])

    def on_client_end(self, args, state, control, client, model, **kwargs):
        self.masks.append((client, model.trained_heads()))
        self.ends.append(dense_heads(model))


def dense_heads(model) -> dict[str, torch.Tensor]:
    """The products s*H of all heads, as the forward pass uses them."""
    layers = {name: model.get_base_model().get_submodule(name) for name in model.trained_heads()}
    tensors = {name: layer.adapter_tensors("default") for name, layer in layers.items()}
    return {name: (s[:, None, None] * H).detach().clone() for name, (_, _, H, s) in tensors.items()}


def run(tmp_path, adapter=None, callbacks=(), **kwargs):
    trainer = make_trainer(tmp_path, adapter or ravan(), callbacks=list(callbacks), **kwargs)
    trainer.train()
    return trainer


# ---- All heads ------------------------------------------------------------------------


@pytest.mark.parametrize("head_selection", HEAD_SELECTIONS)
def test_a_budget_of_all_heads_is_no_budget_bit_for_bit(tmp_path, head_selection):
    few = {"partition": "dirichlet", "num_clients": 2, "max_steps": 2}
    without = run(tmp_path, **few)
    for head_allocation in ("layer", "global"):
        # and a share so close to 1 that it means all heads, although they are selected as for any other share
        budgets = {"client_0": 1.0, "client_1": 0.999}
        trainer = run(
            tmp_path, client_budgets=budgets, head_selection=head_selection, head_allocation=head_allocation, **few
        )
        assert_same(adapter_state(trainer), adapter_state(without))
        for record, plain in zip(trainer.state.log_history, without.state.log_history, strict=True):
            assert record.pop("heads_trained") == [NUM_HEADS * NUM_TARGETS] * 2
            # the choice of heads is sent, too
            assert plain["download_bytes"] < record.pop("download_bytes") < plain["download_bytes"] + 2 * 150
            assert {**record, "round_seconds": 0} == {
                **{k: v for k, v in plain.items() if k != "download_bytes"},
                "round_seconds": 0,
            }


def test_dropout_and_gradient_accumulation_are_not_disturbed_by_the_scores(tmp_path):
    adapter = ravan(ravan_dropout=0.3)
    runs = [
        run(tmp_path, adapter, gradient_accumulation_steps=2, num_rounds=1, **budgets)
        for budgets in ({}, {"client_budgets": 0.999, "head_selection": "gradient"})
    ]
    assert_same(*map(adapter_state, runs))


# ---- Some heads -----------------------------------------------------------------------


@pytest.mark.parametrize("head_selection", HEAD_SELECTIONS)
def test_clients_train_upload_and_keep_moments_of_their_heads_only(tmp_path, head_selection):
    watch = Watch()
    share = {"client_0": 0.25, "client_1": 0.5, "client_2": 0.75}  # and client_3 all
    trainer = run(tmp_path, callbacks=[watch], num_rounds=2, client_budgets=share, head_selection=head_selection)
    assert [record["heads_trained"] for record in trainer.state.log_history] == [[4, 8, 12, 16]] * 2
    assert len(watch.masks) == 8
    for (client, masks), start, end in zip(watch.masks, watch.starts, watch.ends, strict=True):
        for name, mask in masks.items():
            assert mask.sum() == share.get(client, 1.0) * NUM_HEADS
            changed = (start[name] != end[name]).any(dim=2).any(dim=1)
            assert torch.equal(changed, mask)
    # per step: the matrices of the heads before their scalings at each target, then the head of the task
    for step, (moments, gradients) in enumerate(zip(watch.moments, watch.gradients, strict=True)):
        k = step // 2 % 4 + 1
        cores = [shape for shape in moments if shape[1:] == (RANK, RANK)]
        assert cores == [(k, RANK, RANK)] * NUM_TARGETS and moments.count((k,)) >= NUM_TARGETS
        assert [shape for name, shape in gradients.items() if ".ravan_H." in name] == cores


def test_uploads_shrink_with_the_budget(tmp_path):
    records = {}
    for share in (0.25, 0.5, 1.0):
        [records[share]] = run(tmp_path, num_rounds=1, max_steps=1, client_budgets=share).state.log_history
    uploads = {share: record["upload_bytes"] for share, record in records.items()}
    saved = 4 * NUM_TARGETS * RANK**2 * 4  # bytes of one head at every target, of 4 clients
    assert uploads[0.5] - uploads[0.25] == pytest.approx(saved, abs=4 * 16)
    # the selection of heads is sent as well, unless it is all of them
    assert 2 * saved - 4 * 200 < uploads[1.0] - uploads[0.5] < 2 * saved
    assert max(record["download_bytes"] for record in records.values()) < 1.02 * records[0.25]["download_bytes"]


def test_heads_that_nobody_trained_keep_their_value(tmp_path):
    trainer = make_trainer(tmp_path, ravan(), num_rounds=1, client_budgets=0.25, num_clients=2)
    randomize_adapter(trainer.model, scale=0.1)
    before = adapter_state(trainer)
    trainer.train()
    found = 0
    for name, counts in trainer.last_merge.diagnostics["clients_per_head"].items():
        for head, count in enumerate(counts):
            same = torch.equal(trainer.last_merge.state[name][head], before[name][head])
            assert same == (count == 0)
            found += same
    assert found >= NUM_TARGETS * 2


def test_a_head_is_averaged_over_the_clients_that_trained_it(tmp_path):
    watch = Watch()
    trainer = run(tmp_path, callbacks=[watch], num_rounds=1, client_budgets=0.5, partition="dirichlet")
    examples = [len(trainer.clients[client]) for client, _ in watch.masks]
    for name in watch.ends[0]:
        merged = trainer.last_merge.state[f"base_model.model.{name}.ravan_H"]
        for head in range(NUM_HEADS):
            who = [index for index, (_, masks) in enumerate(watch.masks) if masks[name][head]]
            if who:
                mean = sum(examples[i] * watch.ends[i][name][head] for i in who) / sum(examples[i] for i in who)
                torch.testing.assert_close(merged[head], mean, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("head_selection", HEAD_SELECTIONS)
def test_runs_with_budgets_can_be_repeated_bit_for_bit(tmp_path, head_selection):
    runs = []
    for garbage in (1, 2):
        torch.manual_seed(garbage)
        budgets = {"client_budgets": "right_skewed", "head_selection": head_selection, "head_allocation": "global"}
        runs.append(run(tmp_path, partition="dirichlet", clients_per_round=3, **budgets))
    assert_same(*map(adapter_state, runs))
    heads = [[record["heads_trained"] for record in trainer.state.log_history] for trainer in runs]
    assert heads[0] == heads[1]
    json.dumps(runs[0].state.log_history)


def test_random_heads_change_from_round_to_round_and_from_client_to_client(tmp_path):
    watch = Watch()
    run(tmp_path, callbacks=[watch], max_steps=1, client_budgets=0.25)
    choices = [tuple(tuple(mask.tolist()) for mask in masks.values()) for _, masks in watch.masks]
    assert len(set(choices)) > 6


def test_the_heaviest_heads_are_chosen(tmp_path):
    watch = Watch()
    trainer = make_trainer(
        tmp_path, ravan(), callbacks=[watch], num_rounds=1, client_budgets=0.5, head_selection="weight"
    )
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".ravan_H." in name:
                parameter.copy_(torch.tensor([1.0, 4.0, 3.0, 2.0])[:, None, None].expand_as(parameter) * 0.01)
            if ".ravan_s." in name:  # heads 0 and 3 weigh most only together with their scalings
                parameter.copy_(torch.tensor([9.0, 1.0, 1.0, 8.0]))
    trainer.train()
    for _, masks in watch.masks:
        assert all(mask.tolist() == [True, False, False, True] for mask in masks.values())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_is_that_of_the_first_step(tmp_path, accumulation):
    """Scores come from the batches that the training starts with, so its first gradient selects the same heads."""
    watch = Watch()
    seen = []
    trainer = make_trainer(
        tmp_path, ravan(), callbacks=[watch], num_rounds=1, max_steps=1, client_budgets=0.5, head_selection="gradient",
        gradient_accumulation_steps=accumulation, partition="dirichlet",
    )  # fmt: skip
    randomize_adapter(trainer.model, scale=0.1)
    compute_loss = trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        seen.append((inputs["input_ids"].clone(), all(mask.all() for mask in model.trained_heads().values())))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    assert len(seen) == 4 * 2 * accumulation
    for client in range(4):
        calls = seen[client * 2 * accumulation :][: 2 * accumulation]
        scored, trained = calls[:accumulation], calls[accumulation:]
        assert all(all_heads for _, all_heads in scored) and not any(all_heads for _, all_heads in trained)
        for (one, _), (other, _) in zip(scored, trained, strict=True):
            assert torch.equal(one, other)


def test_heads_with_planted_gradients_are_chosen(tmp_path):
    watch = Watch()
    trainer = make_trainer(
        tmp_path, ravan(), callbacks=[watch], num_rounds=1, max_steps=1, client_budgets=0.5, head_selection="gradient"
    )
    # the gradient of H is s * B^T G A^T: bases near zero leave none
    for name in trainer.model.trained_heads():
        layer = trainer.model.get_base_model().get_submodule(name)
        layer.ravan_A["default"][RANK : 3 * RANK] *= 1e-4  # heads 1 and 2
    trainer.train()
    for _, masks in watch.masks:
        assert all(mask.tolist() == [True, False, False, True] for mask in masks.values())


def test_a_global_budget_leaves_targets_out(tmp_path):
    watch = Watch()
    trainer = make_trainer(
        tmp_path, ravan(), callbacks=[watch], num_rounds=1, client_budgets=0.25, head_selection="weight",
        head_allocation="global",
    )  # fmt: skip
    [first, *others] = trainer.model.trained_heads()
    randomize_adapter(trainer.model, scale=0.01)
    trainer.model.get_base_model().get_submodule(first).ravan_H["default"].data.mul_(100)
    trainer.train()
    for _, masks in watch.masks:
        assert masks[first].all() and not any(masks[name].any() for name in others)
    assert trainer.state.log_history[0]["heads_trained"] == [4] * 4


@pytest.mark.parametrize("train_scaling, heads_trained", [(True, 3), (False, 2 + 4)])
def test_a_global_budget_counts_what_a_head_trains(tmp_path, train_scaling, heads_trained):
    """Heads have 2 and 10 parameters with scalings, and 1 and 9 without."""
    adapter = ravan(train_scaling=train_scaling, rank_pattern={"0.attention.self.query": 1})
    trainer = make_trainer(
        tmp_path, adapter, num_rounds=1, max_steps=1, client_budgets=0.24, head_selection="weight",
        head_allocation="global",
    )  # fmt: skip
    randomize_adapter(trainer.model, scale=0.01)
    for name in trainer.model.trained_heads():
        core = trainer.model.get_base_model().get_submodule(name).ravan_H["default"].data
        core.mul_(1 if core.shape[-1] == 1 else 100)
    trainer.train()
    # of 128 parameters, 30.72: three large heads. Of 112, 26.88: two large heads, and all small ones.
    assert trainer.state.log_history[0]["heads_trained"] == [heads_trained] * 4


@pytest.mark.parametrize("head_selection", HEAD_SELECTIONS)
def test_without_trained_scalings_only_the_cores_of_heads_are_trained(tmp_path, head_selection):
    watch = Watch()
    trainer = make_trainer(
        tmp_path, ravan(train_scaling=False), callbacks=[watch], client_budgets=0.5, head_selection=head_selection,
        weight_decay=0.1,
    )  # fmt: skip
    trainer.train()
    assert all(len(shape) == 3 for found in watch.gradients for name, shape in found.items() if ".ravan_" in name)
    for name in trainer.model.trained_heads():
        layer = trainer.model.get_base_model().get_submodule(name)
        assert torch.equal(layer.ravan_s["default"], torch.ones(NUM_HEADS))
        assert layer.ravan_H["default"].any() and not layer.ravan_s["default"].requires_grad


def test_budgets_are_drawn_from_a_distribution(tmp_path):
    for distribution in BUDGET_DISTRIBUTIONS:
        trainer = make_trainer(tmp_path, ravan(), client_budgets=distribution, federated_seed=7)
        assert trainer.client_budgets == draw_client_budgets(trainer.clients, distribution, 7)
    trainer.args.num_rounds = trainer.args.max_steps = 1
    trainer.train()
    assert trainer.state.log_history[0]["heads_trained"] == [
        NUM_TARGETS * max(1, round(share * NUM_HEADS)) for share in trainer.client_budgets.values()
    ]
    trainer.create_model_card()
    assert ", by random, at every target" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("feature", ["bf16", CHECKPOINTING])
def test_features_of_trainer_work_with_some_heads(tmp_path, feature):
    trainer = run(tmp_path, num_rounds=1, client_budgets=0.5, head_selection="gradient", **{feature: True})
    assert all(torch.isfinite(tensor).all() for tensor in adapter_state(trainer).values())


def test_statistics_are_as_if_no_gradient_had_been_scored(tmp_path):
    """Scoring runs the model in training mode, which moves the statistics of a batch norm."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = WithStatistics()

        def forward(self, x, labels):
            logits = self.inner(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    generator = torch.Generator().manual_seed(0)
    dataset = datasets.Dataset.from_dict(
        {"x": torch.randn(40, 8, generator=generator).tolist(), "labels": [index % 2 for index in range(40)]}
    )
    states = []
    for share in (1.0, 0.999):
        torch.manual_seed(0)
        trainer = run(
            tmp_path, RavanConfig(r=2, num_heads=2, target_modules=["body"], modules_to_save=["head"]), model=Model(),
            train_dataset=dataset, client_budgets=share, head_selection="gradient", num_clients=2, num_rounds=1,
            eval_strategy="no",
        )  # fmt: skip
        states.append(adapter_state(trainer))
    assert any("running_mean" in name for name in states[0])
    assert_same(*states)


@pytest.mark.parametrize("named", [False, True], ids=["parameters", "names and parameters"])
def test_parameter_groups_of_an_optimizer_train_the_heads_of_each_client(tmp_path, named):
    watch = Watch()
    model = get_peft_model(tiny_bert(), ravan())
    groups = optimizer_parameter_groups(model, learning_rate=1e-3, core_learning_rate=1e-2)
    if named:
        for group in groups:
            group["params"] = [(f"{group['name']}.{i}", parameter) for i, parameter in enumerate(group["params"])]
    trainer = FederatedTrainer(
        model,
        arguments(tmp_path, num_rounds=2, num_clients=2, max_steps=1, client_budgets=0.5),
        train_dataset=classification_dataset(),
        callbacks=[watch],
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups, "lr": 1e-3}),
    )
    trainer.train()
    for (_, masks), start, end in zip(watch.masks, watch.starts, watch.ends, strict=True):
        for name, mask in masks.items():
            assert torch.equal((start[name] != end[name]).any(dim=2).any(dim=1), mask)


# ---- The adapter that is sent ----------------------------------------------------------


def test_what_is_read_are_the_products_of_the_trained_heads():
    model = ravan_bert()
    adapter = LiveAdapter(model)
    randomize_adapter(model)
    everything = adapter.read()
    assert adapter.trained_heads() is None
    [one, other, *_] = model.trained_heads()
    model.set_trained_heads({one: [False, True], other: [False, False]})
    state, masks = adapter.read(), adapter.trained_heads()
    cores = [f"base_model.model.{name}.ravan_H" for name in (one, other)]
    assert {name: mask.tolist() for name, mask in masks.items()} == dict(
        zip(cores, [[False, True], [False, False]], strict=True)
    )
    for name, tensor in state.items():
        assert torch.equal(tensor, everything[name][masks[name]] if name in masks else everything[name])
    randomize_adapter(model, seed=1)  # the values that were trained, not those from before
    assert not torch.equal(adapter.read()[cores[0]], state[cores[0]])
    adapter.load(everything)
    assert adapter.trained_heads() is None
    assert_same(adapter.read(), everything)


def test_a_model_that_trains_some_heads_already_is_refused():
    model = ravan_bert()
    [name, *_] = model.trained_heads()
    model.set_trained_heads({name: [True, False]})
    with pytest.raises(ValueError, match=rf"Only some heads of '{name}' are trained.*use `client_budgets`"):
        LiveAdapter(model)


# ---- Merging and refusals ----------------------------------------------------------------


DIFFERENT_HEADS = [name for name, method in MERGE_METHODS.items() if method.different_heads]


@pytest.mark.parametrize("merge_method", DIFFERENT_HEADS)
def test_methods_that_merge_different_heads(tmp_path, merge_method):
    trainer = run(
        tmp_path, num_rounds=1, max_steps=1, client_budgets=0.25, head_allocation="global", merge_method=merge_method
    )
    assert all(torch.isfinite(tensor).all() for tensor in adapter_state(trainer).values())
    assert math.isfinite(trainer.state.log_history[0]["train_loss"])


@pytest.mark.parametrize("merge_method", ["fedavg", "krum"])
def test_other_methods_are_refused_before_the_run(tmp_path, merge_method):
    message = rf"merge_method='{merge_method}' needs all heads of every client. Choose one of: .*ravan"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, ravan(), merge_method=merge_method, client_budgets={"client_1": 0.5})
    make_trainer(tmp_path, ravan(), merge_method=merge_method, client_budgets=1.0)


def test_all_six_methods_are_there():
    assert sorted(DIFFERENT_HEADS) == ["fedrpca", "median", "ravan", "task_arithmetic", "ties", "trimmed_mean"]


def test_a_server_optimizer_leaves_heads_alone_that_nobody_trained(tmp_path):
    trainer = run(
        tmp_path, num_rounds=1, max_steps=1, num_clients=1, client_budgets=0.25, server_optimizer="fedadam",
    )  # fmt: skip
    for name, counts in trainer.last_merge.diagnostics["clients_per_head"].items():
        untouched = torch.tensor(counts) == 0
        assert untouched.sum() == 3 and not trainer.last_merge.state[name][untouched].any()


@pytest.mark.parametrize(
    "adapter, budgets, message",
    [
        (ravan(), {"client_budgets": {"ward": 0.5}}, "names the client 'ward', but the clients are 'client_0', 'client_1'"),
        (ravan(), {"client_budgets": 0.0}, "share of heads or ranks above 0 and up to 1.*the share is 0.0"),
        (ravan(), {"head_selection": "norm"}, "`head_selection` must be one of random, weight, gradient, got 'norm'"),
        (ravan(), {"head_allocation": "model"}, "`head_allocation` must be one of layer, global, got 'model'"),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused_before_the_run(tmp_path, adapter, budgets, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, adapter, **budgets)


def test_target_parameters_are_refused(tmp_path):
    adapter = ravan(target_modules=["query"], target_parameters=["pooler.dense.weight"])
    with pytest.raises(ValueError, match="do not work with `target_parameters`.*Adapt layers"):
        make_trainer(tmp_path, adapter, client_budgets=0.5)
    make_trainer(tmp_path, adapter, client_budgets=1.0)


def test_budgets_can_be_given_on_a_command_line():
    for text, expected in (("0.5", 0.5), ("bell", "bell"), ('{"ward": 0.5}', {"ward": 0.5})):
        line = ["--output_dir", "out", "--client_budgets", text, "--head_selection", "weight"]
        [args] = HfArgumentParser(FederatedArguments).parse_args_into_dataclasses(line)
        assert args.client_budgets == expected and args.head_selection == "weight"
