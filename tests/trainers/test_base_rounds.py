"""Merge methods that change base weights, in the rounds of a federation: FedEx-LoRA, FLoRA and folding LoRA."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

from peft_ravan.merging import ClientUpdate, ServerStep, add_base_deltas, merge
from peft_ravan.merging.base_deltas import BASE_PART, base_weights
from peft_ravan.merging.folding import products
from peft_ravan.merging.lora import lora_targets
from peft_ravan.trainers import FederatedCallback
from peft_ravan.trainers.client.live_adapter import LiveAdapter
from peft_ravan.trainers.seeds import derive_seed
from peft_ravan.trainers.server.merging import MergeSettings
from peft_ravan.trainers.server.state import ServerState

from ..conftest import classification_dataset, tiny_bert, tiny_gpt2
from ..merging.peft_models import effective_weights
from .helpers import (
    adapter_state,
    arguments,
    assert_same,
    comparable,
    logged,
    logits,
    lora,
    make_trainer,
    ravan,
    resumable_trainer,
    resumed_after,
)


# with these options, each changes the base weights in every round
EVERY_ROUND = [("fedex_lora", {}), ("flora", {}), ("fold_lora", {"every": 1})]


def scaled_lora(**kwargs) -> LoraConfig:
    fields = {"r": 2, "lora_alpha": 6, "task_type": "SEQ_CLS", "target_modules": ["query", "output.dense"]}
    return LoraConfig(**{**fields, **kwargs})


class Rounds(FederatedCallback):
    """Records what clients upload, and the model and the state of the server after each round. Changes nothing."""

    def __init__(self):
        self.uploads, self.weights, self.states, self.logits = {}, [], [], []

    def __call__(self, client, round_number, update):
        self.uploads.setdefault(round_number, []).append(update)

    def on_round_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(effective_weights(model))
        self.logits.append(logits(model))
        self.states.append(self.trainer.last_server_state.global_state)


def run(folder, merge_method, adapter=None, **kwargs):
    rounds = Rounds()
    rounds.trainer = make_trainer(
        folder, adapter or scaled_lora(), client_fault=rounds, callbacks=[rounds], merge_method=merge_method,
        **{"num_clients": 3, "max_steps": 2, **kwargs},
    )  # fmt: skip
    rounds.trainer.train()
    return rounds.trainer, rounds


def assert_close(first, second, **tolerance):
    assert first.keys() == second.keys() and first
    for name in first:
        torch.testing.assert_close(first[name], second[name], **{"atol": 1e-6, "rtol": 1e-5, **tolerance})


def loaded(model, state) -> torch.nn.Module:
    """A model with a state of a server."""
    LiveAdapter(model, with_base=True).load(state)
    return model


def mean_of_clients(model, uploads) -> dict[str, torch.Tensor]:
    """The mean of the clients' full weights W + s B_c A_c, in a model with the base weights that they started from."""
    total = sum(update.num_examples for update in uploads)
    mean = {}
    for update in uploads:
        set_peft_model_state_dict(model, update.state)
        for name, weight in effective_weights(model).items():
            mean[name] = mean.get(name, 0) + update.num_examples / total * weight
    return mean


# ---------------------------------------------------------------- the merges


@pytest.mark.parametrize("merge_method, options", EVERY_ROUND)
def test_a_round_is_the_merge_and_what_it_adds_to_the_base_weights(tmp_path, merge_method, options):
    by_hand = get_peft_model(tiny_bert(), scaled_lora())
    start = LiveAdapter(by_hand).read()
    _, rounds = run(tmp_path, merge_method, num_rounds=1, merge_options=options)
    step = ServerStep(seed=derive_seed(42, "merge", 1))
    result = merge(start, rounds.uploads[1], merge_method, config=scaled_lora(), server_step=step, **options)
    deltas, [state] = result.base_deltas, rounds.states
    if merge_method == "flora":
        deltas = products(result.state, result.config)
        assert all(state[name].shape == tensor.shape for name, tensor in start.items())
        assert not any(tensor.any() for name, tensor in state.items() if ".lora_B." in name)
        assert_same(
            {n: t for n, t in state.items() if "classifier" in n},
            {n: t for n, t in result.state.items() if "classifier" in n},
        )
    else:
        assert_same({name: state[name] for name in start}, result.state)
    add_base_deltas(by_hand, deltas)
    expected = base_weights(by_hand, [target.module for target in lora_targets(start)])
    assert_same(
        {n: t for n, t in state.items() if n.endswith(BASE_PART)}, {n + BASE_PART: t for n, t in expected.items()}
    )
    assert all(not any(name.endswith(BASE_PART) for name in update.state) for update in rounds.uploads[1])


@pytest.mark.parametrize("merge_method", ["fedex_lora", "flora"])
def test_the_weights_after_each_round_are_the_mean_of_those_of_the_clients(tmp_path, merge_method):
    model = get_peft_model(tiny_bert(), scaled_lora())
    _, rounds = run(tmp_path, merge_method, num_rounds=3, clients_per_round=2)
    assert_close(rounds.weights[0], mean_of_clients(model, rounds.uploads[1]))
    for number in (1, 2):
        start = loaded(model, rounds.states[number - 1])
        assert_close(rounds.weights[number], mean_of_clients(start, rounds.uploads[number + 1]))


def test_fedit_is_not_that_mean(tmp_path):
    _, rounds = run(tmp_path, "fold_lora", num_rounds=1, merge_options={"every": 1})
    mean = mean_of_clients(get_peft_model(tiny_bert(), scaled_lora()), rounds.uploads[1])
    assert any(not torch.allclose(rounds.weights[0][name], mean[name], atol=1e-5) for name in mean)


def test_with_one_client_fedex_lora_is_fedavg(tmp_path):
    data = {"client": classification_dataset(40)}
    (_, fedex), (_, fedavg) = (
        run(tmp_path / name, name, num_rounds=3, train_dataset=data, num_clients=None)
        for name in ("fedex_lora", "fedavg")
    )
    for one, other in zip(fedex.weights, fedavg.weights, strict=True):
        assert_close(one, other, atol=0, rtol=0)


def test_folding_later_than_the_last_round_is_fedit(tmp_path):
    (fold, rounds), (fedit, _) = (
        run(tmp_path / name, name, num_rounds=3, merge_options=options)
        for name, options in (("fold_lora", {"every": 4}), ("fedit", {}))
    )
    assert_same(
        {n: t for n, t in fold.last_global_state.items() if not n.endswith(BASE_PART)}, fedit.last_global_state
    )
    assert_same(fold.model.state_dict(), fedit.model.state_dict())
    base = [{n: t for n, t in state.items() if n.endswith(BASE_PART)} for state in rounds.states]
    assert_same(base[0], base[2])


def test_folding_every_few_rounds_starts_anew_in_these(tmp_path):
    _, rounds = run(tmp_path, "fold_lora", num_rounds=4, merge_options={"every": 2})
    for number, state in enumerate(rounds.states, start=1):
        assert any(t.any() for n, t in state.items() if ".lora_B." in n) == (number % 2 == 1)
    base = [{n: t for n, t in state.items() if n.endswith(BASE_PART)} for state in rounds.states]
    assert_same(base[1], base[2])
    assert not any(torch.equal(base[1][name], base[3][name]) for name in base[1])
    first, second = ({n: t for n, t in rounds.states[i].items() if ".lora_A." in n} for i in (1, 3))
    assert not any(torch.equal(first[name], second[name]) for name in first)


# layers that keep their weight transposed; attn.c_proj is square, so a transposition too many would give no error
ADAPTERS = {
    "Linear-rslora": lambda: scaled_lora(use_rslora=True, rank_pattern={"0.*query": 3}, alpha_pattern={"query": 4}),
    "Embedding": lambda: scaled_lora(target_modules=["word_embeddings", "query"]),
    "gaussian": lambda: scaled_lora(init_lora_weights="gaussian"),
    "bias": lambda: scaled_lora(bias="lora_only"),
    "lora_bias": lambda: scaled_lora(lora_bias=True),
    "Conv1D": lambda: LoraConfig(r=2, lora_alpha=6, target_modules=["c_proj", "c_attn"], fan_in_fan_out=True),
}


def language_data():
    data = classification_dataset()
    return data.remove_columns("labels").add_column("labels", data["input_ids"])


def of_adapter(name: str) -> dict:
    """The arguments for a model and an adapter."""
    if name != "Conv1D":
        return {"adapter": ADAPTERS[name]()}
    return {"adapter": ADAPTERS[name](), "model": tiny_gpt2(), "train_dataset": language_data()}


def base_of(name: str) -> torch.nn.Module:
    return tiny_gpt2() if name == "Conv1D" else tiny_bert()


@pytest.mark.parametrize(
    "merge_method, adapter",
    [("fedex_lora", "Linear-rslora"), ("fedex_lora", "Conv1D"), ("flora", "Embedding"), ("flora", "lora_bias")],
)
def test_the_mean_is_exact_for_all_layers_and_scalings(tmp_path, adapter, merge_method):
    _, rounds = run(tmp_path, merge_method, num_rounds=2, **of_adapter(adapter))
    model = loaded(get_peft_model(base_of(adapter), ADAPTERS[adapter]()), rounds.states[0])
    assert_close(rounds.weights[1], mean_of_clients(model, rounds.uploads[2]))


# ---------------------------------------------------------------- the result


def saved_adapter(folder, adapter="Linear-rslora") -> PeftModel:
    """What somebody has who loads the adapter in a folder into the original base model."""
    return PeftModel.from_pretrained(base_of(adapter), folder)


# every adapter with one of the methods
@pytest.mark.parametrize(
    "adapter, merge_method, options",
    [(adapter, *EVERY_ROUND[index % len(EVERY_ROUND)]) for index, adapter in enumerate(ADAPTERS)],
)
def test_the_saved_adapter_is_the_model_of_the_last_round_on_the_original_base_weights(
    tmp_path, adapter, merge_method, options
):
    trainer, rounds = run(tmp_path, merge_method, num_rounds=2, merge_options=options, **of_adapter(adapter))
    trainer.save_model()
    found = saved_adapter(tmp_path, adapter)
    torch.testing.assert_close(logits(found), rounds.logits[-1], atol=1e-5, rtol=1e-5)
    assert_close(effective_weights(found), rounds.weights[-1])
    # the model in the trainer is the same, on the original base weights
    assert_close(effective_weights(trainer.model), effective_weights(found), atol=0, rtol=0)
    with trainer.model.disable_adapter(), found.disable_adapter():
        if adapter != "bias":
            assert torch.equal(logits(trainer.model.base_model.model), logits(found.base_model.model))
    torch.testing.assert_close(logits(trainer.model.merge_and_unload()), rounds.logits[-1], atol=1e-5, rtol=1e-5)


def test_its_evaluation_is_that_of_the_last_round(tmp_path):
    trainer, _ = run(tmp_path, "fedex_lora", eval_strategy="epoch")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.log_history[-1]["eval_loss"], rel=1e-5)


def test_its_rank_is_no_higher_than_what_the_rounds_have_added(tmp_path):
    for number in (1, 2):
        trainer, _ = run(tmp_path, "flora", num_rounds=number)
        assert trainer.model.active_peft_config.r == number * 3 * 2


def test_a_large_adapter_is_announced(tmp_path, monkeypatch):
    warnings = logged(monkeypatch, "original_base")
    run(tmp_path, "flora", num_rounds=1, clients_per_round=2)
    assert not warnings
    run(tmp_path, "flora", num_rounds=3)
    assert len(warnings) == 1 and "merge_and_unload" in warnings[0]


def test_saving_in_a_round_changes_nothing(tmp_path):
    class Save(FederatedCallback):
        def on_round_end(self, args, state, control, model=None, **kwargs):
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            config = model.active_peft_config
            self.trainer.save_model(str(tmp_path / f"round-{state.global_step}"))
            assert_same(before, model.state_dict())
            assert model.active_peft_config is config
            torch.testing.assert_close(
                logits(saved_adapter(tmp_path / f"round-{state.global_step}")), logits(model), atol=1e-5, rtol=1e-5
            )

    save = Save()
    options = {"merge_method": "fedex_lora", "num_clients": 3, "max_steps": 2}
    save.trainer = make_trainer(tmp_path, scaled_lora(), callbacks=[save], **options)
    save.trainer.train()
    plain, _ = run(tmp_path, "fedex_lora")
    assert_same(plain.last_global_state, save.trainer.last_global_state)


@pytest.mark.parametrize("merge_method, options", EVERY_ROUND)
def test_a_second_train_goes_on_from_the_result_and_knows_the_original_base_weights(tmp_path, merge_method, options):
    trainer, rounds = run(tmp_path, merge_method, num_rounds=1, merge_options=options, learning_rate=1e-4)
    result = logits(trainer.model)
    rounds.uploads.clear()
    trainer.args.learning_rate = 0.0  # so that clients upload what they start from
    trainer.train()
    torch.testing.assert_close(rounds.logits[1], result, atol=1e-5, rtol=1e-5)
    assert {tuple(t.shape) for u in rounds.uploads[1] for n, t in u.state.items() if ".lora_A." in n} == {
        (2, 32),
        (2, 48),
    }
    trainer.save_model()
    torch.testing.assert_close(logits(saved_adapter(tmp_path)), result, atol=1e-5, rtol=1e-5)


def test_an_error_leaves_the_last_result_on_the_original_base_weights(tmp_path):
    class Stop(FederatedCallback):
        def on_round_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    rounds = Rounds()
    rounds.trainer = make_trainer(
        tmp_path, scaled_lora(), merge_method="flora", num_rounds=3, callbacks=[rounds, Stop()]
    )
    with pytest.raises(KeyboardInterrupt):
        rounds.trainer.train()
    rounds.trainer.save_model()
    torch.testing.assert_close(logits(saved_adapter(tmp_path)), rounds.logits[1], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- the mean of rounds, checkpoints, exchange


@pytest.mark.parametrize(
    "average_rounds, weights, merge_method, options",
    [
        (3, (0, 1, 1, 1), "fedex_lora", {}),
        (None, (1, 9, 45, 165), "fold_lora", {"every": 2}),
        (None, (1, 9, 45, 165), "flora", {}),
    ],
)
def test_the_mean_of_rounds_is_that_of_the_weights(tmp_path, merge_method, options, average_rounds, weights):
    _, last = run(tmp_path / "last", merge_method, num_rounds=4, merge_options=options)
    trainer, mean = run(
        tmp_path / "mean",
        merge_method,
        num_rounds=4,
        max_steps=2,
        merge_options=options,
        average_rounds=average_rounds,
    )
    for one, other in zip(last.states, mean.states, strict=True):
        assert_same(one, other)
    expected = {
        name: sum(w / sum(weights) * of_round[name] for w, of_round in zip(weights, last.weights, strict=True))
        for name in last.weights[0]
    }
    assert_close(mean.weights[-1], expected)
    assert_close(effective_weights(trainer.model), expected)


@pytest.mark.parametrize("merge_method, average_rounds", [("fedex_lora", 1), ("flora", None), ("fold_lora", 2)])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, merge_method, average_rounds):
    options = {
        "adapter": scaled_lora(), "merge_method": merge_method, "server_optimizer": None, "average_rounds": average_rounds,
        "merge_options": {"every": 3} if merge_method == "fold_lora" else {}, "max_steps": 1,
    }  # fmt: skip
    whole = resumable_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = resumed_after(2, whole, tmp_path / "resumed", **options)
    assert_same(whole.last_global_state, resumed.last_global_state)
    assert_same(whole.model.state_dict(), resumed.model.state_dict())
    assert comparable(whole.state.log_history) == comparable(resumed.state.log_history)
    # a checkpoint is an adapter for the original base weights, too
    found = saved_adapter(tmp_path / "whole" / "checkpoint-4")
    torch.testing.assert_close(logits(found), logits(whole.model), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("merge_method, options", EVERY_ROUND)
def test_the_best_model_is_loaded_at_the_end(tmp_path, merge_method, options):
    scores = iter([0.1, 0.9, 0.3])
    rounds = Rounds()
    rounds.trainer = trainer = make_trainer(
        tmp_path, scaled_lora(), merge_method=merge_method, merge_options=options, num_rounds=3, callbacks=[rounds],
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="accuracy",
    )  # fmt: skip
    trainer.compute_metrics = lambda prediction: {"accuracy": next(scores)}
    trainer.train()
    assert trainer.state.best_global_step == 2
    torch.testing.assert_close(logits(trainer.model), rounds.logits[1], atol=1e-5, rtol=1e-5)
    trainer.save_model()
    torch.testing.assert_close(logits(saved_adapter(tmp_path)), rounds.logits[1], atol=1e-5, rtol=1e-5)


def test_base_weights_are_downloaded_as_they_are_and_never_uploaded(tmp_path):
    (exact, rounds), (fedit, _) = (run(tmp_path / name, name, num_rounds=2) for name in ("fedex_lora", "fedit"))
    records = [trainer.state.log_history[0] for trainer in (exact, fedit)]
    base = sum(t.nbytes for n, t in rounds.states[0].items() if n.endswith(BASE_PART))
    assert records[0]["upload_bytes"] == records[1]["upload_bytes"]
    assert records[0]["download_bytes"] - records[1]["download_bytes"] == pytest.approx(3 * base, rel=0.05)
    _, rounded = run(tmp_path / "rounded", "fedex_lora", download_dtype="int8", upload_dtype="int4", learning_rate=0.0)
    model = get_peft_model(tiny_bert(), scaled_lora())
    for name, tensor in LiveAdapter(model, with_base=True).base_weights.items():
        torch.testing.assert_close(rounded.states[0][name], tensor, atol=1e-6, rtol=0)


def test_half_precision_keeps_what_rounding_would_lose(tmp_path):
    model = tiny_bert().to(torch.bfloat16)
    trainer, rounds = run(tmp_path, "flora", model=model, num_rounds=6, max_steps=1, learning_rate=1e-4)
    start = {
        n: t.float()
        for n, t in LiveAdapter(
            get_peft_model(tiny_bert().to(torch.bfloat16), scaled_lora()), True
        ).base_weights.items()
    }
    memory = trainer.last_server_state.merge_memory
    assert {tensor.dtype for name, tensor in rounds.states[-1].items() if name in start} == {torch.bfloat16}
    assert {name.removeprefix("remainder.") + BASE_PART for name in memory} == start.keys()
    moved = 0
    for name, weight in start.items():
        state, remainder = rounds.states[-1][name].float(), memory[f"remainder.{name.removesuffix(BASE_PART)}"]
        assert remainder.abs().max() <= state.abs().max() * 2**-8
        moved += int(not torch.equal(state, weight))
    assert moved
    trainer.save_model()
    found = PeftModel.from_pretrained(tiny_bert().to(torch.bfloat16), tmp_path)
    assert_close(effective_weights(found), effective_weights(trainer.model))
    assert_close(effective_weights(found), rounds.weights[-1])


# ---------------------------------------------------------------- what is refused


def tied() -> torch.nn.Module:
    model = tiny_bert()
    attention = model.bert.encoder.layer[0].attention.self
    attention.value.weight = attention.query.weight
    return model


def quantized() -> torch.nn.Module:
    model = tiny_bert()
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.int8)
    return model


@pytest.mark.parametrize(
    "make_model, adapter, options, message",
    [
        (tiny_bert, ravan(), {}, "'flora'` needs LoRA.*the adapter is RAVAN"),
        (tiny_bert, scaled_lora(init_lora_weights="pissa"), {}, "does not work with init_lora_weights='pissa'"),
        (tiny_bert, scaled_lora(use_dora=True), {}, "with DoRA or AdaLoRA"),
        (tied, scaled_lora(), {}, "its base weight is shared with another module"),
        (quantized, scaled_lora(), {}, "its base weight is quantized"),
        (tiny_bert, scaled_lora(), {"local_parameters": ["query"]}, "`local_parameters` name '.*query.lora_A.weight'"),
        (tiny_bert, scaled_lora(), {"local_parameters": ["lora_B"]}, "`local_parameters` name '.*lora_B.weight'"),
        (tiny_bert, scaled_lora(), {"scaffold": True}, "`scaffold` does not go with merge_method='flora'"),
        (tiny_bert, scaled_lora(), {"server_optimizer": "fedavgm"}, "a server optimizer has no difference to follow"),
        (tiny_bert, scaled_lora(), {"privacy": {"clip_norm": 1.0, "noise_multiplier": 1.0}}, "For 'flora' it would prove nothing"),
        (tiny_bert, scaled_lora(target_parameters=["value.weight"]), {}, "With `target_parameters` A and B hold many matrices"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_run(tmp_path, make_model, adapter, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, adapter, model=make_model(), merge_method="flora", **options)


def test_secure_aggregation_needs_a_method_that_sums(tmp_path):
    with pytest.raises(ValueError, match="`secure_aggregation` does not go with merge_method='flora'"):
        arguments(tmp_path, merge_method="flora", secure_aggregation=True)


def test_personal_task_heads_and_scaffold_go_with_fedex_lora(tmp_path):
    trainer, rounds = run(tmp_path, "fedex_lora", scaffold=True, optim="sgd", local_parameters=["classifier"])
    trainer.save_model()
    torch.testing.assert_close(logits(saved_adapter(tmp_path)), rounds.logits[-1], atol=1e-5, rtol=1e-5)


def test_an_upload_with_base_weights_is_left_out(tmp_path):
    def fault(client, round_number, update):
        if client == "client_0":
            name = next(name for name in update.state if ".lora_A." in name)
            update.state[name.replace(".lora_A.weight", BASE_PART)] = torch.zeros(32, 32)

    trainer = make_trainer(tmp_path, scaled_lora(), merge_method="fedex_lora", client_fault=fault, num_rounds=1)
    trainer.train()
    [failed] = trainer.state.log_history[0]["failed_clients"]
    assert failed["client"] == "client_0" and "not expected in the update" in failed["reason"]


def test_a_merge_that_changes_no_base_weight_sends_none(tmp_path):
    trainer = make_trainer(tmp_path, lora(), merge_method="fedit", num_rounds=1)
    trainer.train()
    assert not any(name.endswith(BASE_PART) for name in trainer.last_global_state)
    assert adapter_state(trainer).keys() == trainer.last_global_state.keys()


def test_a_server_without_base_weights_says_where_they_come_from(tmp_path):
    model = get_peft_model(tiny_bert(), scaled_lora())
    start = LiveAdapter(model).read()
    settings = MergeSettings("fedex_lora").of(scaled_lora())
    with pytest.raises(ValueError, match=r"Take the start from a client with `ClientSettings\(base_weights=True\)`"):
        settings.merge(ServerState(start), [ClientUpdate(start, 1)], round_number=1)
