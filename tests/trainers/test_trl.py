"""The trainers of TRL over the rounds: clients train as in TRL, each on data that is prepared separately."""

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from peft_ravan import RavanConfig
from peft_ravan.trainers import FederatedArguments, FederatedCallback
from peft_ravan.trainers.seeds import derive_seed
from peft_ravan.tuner.state import exchange_state

from ..conftest import sentence, tiny_llama
from ..forked import run_clean
from .helpers import StopAfter, adapter_state, assert_same, comparable, trainable_checkpoint


trl = pytest.importorskip("trl")
from peft_ravan.trainers import FederatedDPOConfig, FederatedDPOTrainer, FederatedSFTConfig, FederatedSFTTrainer  # noqa: E402

from .trl_helpers import COMMON, ravan, sft, texts  # noqa: E402


def completions(starts) -> datasets.Dataset:
    pairs = [(sentence(start), f" {sentence(start + 6)}") for start in starts]
    return datasets.Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})


def preferences(starts) -> datasets.Dataset:
    return completions(starts).rename_column("completion", "chosen").add_column(
        "rejected", [f" {sentence(start + 30)}" for start in starts]
    )  # fmt: skip


# ---- One client is TRL -----------------------------------------------------------


@pytest.mark.parametrize(
    "make_dataset, feature",
    [
        (texts, {}),
        (texts, {"packing": True}),
        (texts, {"packing": True, "packing_strategy": "wrapped"}),
        (completions, {"completion_only_loss": True}),
        (completions, {"completion_only_loss": False}),
        (texts, {"gradient_checkpointing": True}),
        (texts, {"gradient_accumulation_steps": 2, "max_steps": 2}),
        (texts, {"bf16": True}),
        (texts, {"loss_type": "dft"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_one_client_and_one_round_is_sft(tmp_path, tokenizer, make_dataset, feature):
    dataset, seed = make_dataset(range(32)), derive_seed(42, "client", 1, "only")
    federated = sft(tmp_path, tokenizer, {"only": dataset}, num_rounds=1, upload_dtype="float32", **feature)
    federated.train()
    args = trl.SFTConfig(str(tmp_path), **{**COMMON, "seed": seed, **feature})
    alone = trl.SFTTrainer(tiny_llama(), args, train_dataset=dataset, processing_class=tokenizer, peft_config=ravan())
    alone.train()
    trained = exchange_state(trainable_checkpoint(alone.model))
    assert_same(adapter_state(federated), trained)
    assert any(tensor.any() for name, tensor in trained.items() if "ravan_H" in name)
    assert federated.state.log_history[0]["train_loss"] == alone.state.log_history[-1]["train_loss"]


def test_an_8_bit_optimizer(tmp_path, tokenizer):
    pytest.importorskip("bitsandbytes")
    large = RavanConfig(r=32, num_heads=4, init_bases="normal", task_type="CAUSAL_LM")  # smaller ones stay in 32 bits
    dataset, seed = texts(range(32)), derive_seed(42, "client", 1, "only")
    states, dtypes = [], set()

    class Optimizer(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **kwargs):
            dtypes.update(part["state1"].dtype for part in optimizer.state.values())

    for trainer_class, config, data in (
        (
            FederatedSFTTrainer,
            FederatedSFTConfig(str(tmp_path), num_rounds=1, upload_dtype="float32", optim="adamw_bnb_8bit", **COMMON),
            {"only": dataset},
        ),
        (trl.SFTTrainer, trl.SFTConfig(str(tmp_path), optim="adamw_bnb_8bit", seed=seed, **COMMON), dataset),
    ):
        model = get_peft_model(tiny_llama(), large)
        trainer = trainer_class(model, config, train_dataset=data, processing_class=tokenizer, callbacks=[Optimizer()])
        trainer.train()
        states.append(exchange_state(trainable_checkpoint(model)))
    assert torch.uint8 in dtypes
    assert_same(*states)


@pytest.mark.parametrize("feature", [{}, {"precompute_ref_log_probs": True}, {"wrapped": True}], ids=str)
def test_one_client_and_one_round_is_dpo(tmp_path, tokenizer, feature):
    dataset, seed = preferences(range(16)), derive_seed(42, "client", 1, "only")
    wrapped, feature = feature.get("wrapped"), {k: v for k, v in feature.items() if k != "wrapped"}

    def make(cls, args, train_dataset):
        model = get_peft_model(tiny_llama(), ravan()) if wrapped else tiny_llama()
        config = None if wrapped else ravan()
        # `args` is the third by position here
        return cls(model, None, args, train_dataset=train_dataset, processing_class=tokenizer, peft_config=config)

    config = FederatedDPOConfig(str(tmp_path), num_rounds=1, upload_dtype="float32", **COMMON, **feature)
    federated = make(FederatedDPOTrainer, config, {"only": dataset})
    assert federated.ref_model is None
    federated.train()
    alone = make(trl.DPOTrainer, trl.DPOConfig(str(tmp_path), **{**COMMON, "seed": seed, **feature}), dataset)
    alone.train()
    trained = exchange_state(trainable_checkpoint(alone.model))
    assert_same(adapter_state(federated), trained)
    assert any(tensor.any() for name, tensor in trained.items() if "ravan_H" in name)


def test_the_reference_of_dpo_is_the_same_in_every_round(tmp_path, tokenizer):
    args = FederatedDPOConfig(str(tmp_path), num_rounds=3, num_clients=2, **COMMON)
    references = []

    class Reference(FederatedCallback):
        def on_round_begin(self, args, state, control, **kwargs):
            batch = trainer.data_collator([trainer.clients["client_0"][0]])
            trainer.model.eval()
            references.append(torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)))

    trainer = FederatedDPOTrainer(
        tiny_llama(), args=args, train_dataset=preferences(range(24)), processing_class=tokenizer, peft_config=ravan(),
        callbacks=[Reference()],
    )  # fmt: skip
    trainer.train()
    assert torch.equal(references[0], references[1]) and torch.equal(references[0], references[2])
    losses = [record["train_loss"] for record in trainer.state.log_history]
    assert losses[0] == pytest.approx(0.69, abs=0.05) and losses[-1] < losses[0]


def test_a_merge_that_changes_base_weights_needs_a_reference_of_its_own(tmp_path, tokenizer):
    def make(ref_model):
        return FederatedDPOTrainer(
            tiny_llama(), ref_model, FederatedDPOConfig(str(tmp_path), merge_method="flora", num_clients=2, **COMMON),
            train_dataset=preferences(range(24)), processing_class=tokenizer,
            peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"),
        )  # fmt: skip

    with pytest.raises(
        ValueError, match="changes the base weights, and the reference is the model.*Give a `ref_model`"
    ):
        make(None)
    assert make(tiny_llama()).merge_method == "flora"


# ---- The data of clients ---------------------------------------------------------


def test_a_packed_sequence_has_examples_of_one_client(tmp_path, tokenizer):
    """Clients have distinct words, and every packed sequence has the words of only one client."""
    words = {"a": range(0, 20), "b": range(20, 40), "c": range(40, 60)}
    starts = [start for i in range(12) for start in (i % 10, 20 + i % 10, 40 + i % 10)]
    dataset = texts(starts).add_column("role", ["a", "b", "c"] * 12)
    trainer = sft(
        tmp_path, tokenizer, dataset, partition="column", partition_column="role", packing=True, max_length=32
    )
    assert list(trainer.clients) == ["a", "b", "c"]
    eos = tokenizer.eos_token_id
    for client, own in words.items():
        prepared = trainer.clients[client]
        assert len(prepared) < 12 and prepared.column_names == ["input_ids", "labels", "seq_lengths"]
        tokens = {token for row in prepared["input_ids"] for token in row}
        assert tokens <= {*own, eos} and tokens - {eos}
    # clients are weighted by their original examples, not by packed sequences
    assert trainer.partition_table()["examples"].tolist() == [12, 12, 12]
    trainer.train()
    assert trainer.state.log_history[0]["num_examples"] == 36


def test_data_by_client_is_prepared_as_one_training_set(tmp_path, tokenizer):
    given = {"north": texts(range(8)), "south": texts(range(20, 30))}
    trainer = sft(tmp_path, tokenizer, given, eval_dataset=given["north"])
    alone = trl.SFTTrainer(
        tiny_llama(), trl.SFTConfig(str(tmp_path), **COMMON), train_dataset=given["south"], processing_class=tokenizer
    )
    assert trainer.clients["south"]["input_ids"][:] == alone.train_dataset["input_ids"][:]
    assert trainer.train_dataset is given
    # the same data set for evaluation is prepared, too
    assert "input_ids" in trainer.eval_dataset.column_names and "input_ids" not in given["north"].column_names


def test_many_clients_are_prepared_when_they_take_part(tmp_path, tokenizer, monkeypatch):
    prepared = []
    prepare = trl.SFTTrainer._prepare_dataset
    monkeypatch.setattr(
        trl.SFTTrainer, "_prepare_dataset", lambda *args: prepared.append(len(args[1])) or prepare(*args)
    )
    clients = {f"client_{i}": texts(range(i, i + 3 + i % 2)) for i in range(133)}
    trainer = sft(tmp_path, tokenizer, clients, clients_per_round=2, num_rounds=2, max_steps=1)
    assert len(prepared) == 1  # so that errors come before the run
    trainer.train()
    assert 1 < len(prepared) <= 5
    assert not any(record["failed_clients"] for record in trainer.state.log_history)


def test_a_client_of_whose_data_nothing_is_left_fails_alone(tmp_path, tokenizer):
    long = completions(range(4)).map(lambda example: {"prompt": " ".join(["w1"] * 40)})
    trainer = sft(tmp_path, tokenizer, {"good": completions(range(8)), "long": long}, num_rounds=1)
    trainer.train()
    [record] = trainer.state.log_history
    assert record["clients"] == ["good"]
    assert "No example of client 'long' is left by its preparation" in record["failed_clients"][0]["reason"]
    assert trainer.train_dataset.keys() == {"good", "long"} and trainer.args.seed == 42


def test_what_cannot_be_prepared_is_refused_before_the_run(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="Unsupported truncation mode: keep_middle"):
        sft(tmp_path, tokenizer, texts(range(20)), truncation_mode="keep_middle")
    with pytest.raises(ValueError, match="`partition_column` names 'role', but the data set has the columns"):
        sft(tmp_path, tokenizer, texts(range(20)), partition="column", partition_column="role")


# ---- Records and runs ------------------------------------------------------------


def test_metrics_of_a_client_stay_with_it(tmp_path, tokenizer):
    """A failing client leaves partial sums of metrics behind, which must not get into the next log."""

    class Fails(FederatedCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if trainer.train_dataset is trainer.clients["client_0"] and state.global_step == 2:
                raise RuntimeError("the battery is empty")

    trainer = sft(
        tmp_path, tokenizer, texts(range(32)), callbacks=[Fails()], num_clients=4, eval_strategy="epoch",
        eval_dataset=texts(range(40, 48)),
    )  # fmt: skip
    trainer.train()
    first, second = trainer.state.log_history
    for record in (first, second):
        assert record["failed_clients"] == [{"client": "client_0", "reason": "RuntimeError: the battery is empty"}]
        assert "mean_token_accuracy" not in record and "num_tokens" not in record
        assert 0 <= record["eval_mean_token_accuracy"] <= 1 and record["eval_entropy"] > 0
    assert not any(trainer._metrics.values()) and trainer._total_train_tokens == 0
    assert trainer.evaluate()["eval_mean_token_accuracy"] == second["eval_mean_token_accuracy"]


def test_a_resumed_run_of_sft_is_the_uninterrupted_run(tmp_path, tokenizer):
    options = {
        "num_rounds": 3, "num_clients": 3, "clients_per_round": 2, "save_strategy": "epoch", "packing": True,
        "server_optimizer": "fedadam",
    }  # fmt: skip
    whole = sft(tmp_path / "whole", tokenizer, texts(range(48)), **options)
    whole.train()
    stopped = sft(tmp_path / "resumed", tokenizer, texts(range(48)), callbacks=[StopAfter(2)], **options)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = sft(tmp_path / "resumed", tokenizer, texts(range(48)), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(adapter_state(whole), adapter_state(resumed))
    assert comparable(whole.state.log_history) == comparable(resumed.state.log_history)
    card = (tmp_path / "resumed" / "checkpoint-3" / "README.md").read_text()
    assert "Clients per round" in card


def test_arguments_without_those_of_trl_are_refused(tmp_path, tokenizer):
    with pytest.raises(TypeError, match="needs `FederatedSFTConfig`, got FederatedArguments"):
        FederatedSFTTrainer(
            tiny_llama(), FederatedArguments(str(tmp_path)), train_dataset=texts(range(8)), processing_class=tokenizer
        )
    args = FederatedSFTConfig(str(tmp_path), num_rounds=3, use_cpu=True)
    assert (
        args.gradient_checkpointing and args.learning_rate == trl.SFTConfig(str(tmp_path), use_cpu=True).learning_rate
    )


def test_without_trl_the_extra_is_named(tmp_path):
    code = (
        "import sys; sys.modules['trl'] = None; from peft_ravan.trainers import *; import peft_ravan.trainers as t\n"
        "assert t.FederatedTrainer and 'FederatedSFTTrainer' in dir(t)\n"
        "t.FederatedSFTTrainer"
    )
    exit_code, errors = run_clean(code, tmp_path)
    assert exit_code == 1 and "pip install 'peft-ravan[trl]'" in errors.splitlines()[-1]


from .trl_helpers import texts  # noqa: E402
