"""
Runs on one or several processes. The main process writes the result of each run. In `kill-RUN` a process is killed.
"""

import atexit
import contextlib
import errno
import json
import os
import signal
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import EarlyStoppingCallback

from peft_ravan import RavanConfig
from peft_ravan.trainers import FederatedCallback, FederatedSFTConfig, FederatedSFTTrainer
from peft_ravan.trainers.client.store import ClientStore, ClientStoreError
from peft_ravan.trainers.run_folder import find_checkpoints
from peft_ravan.trainers.server.server import Server

from ..conftest import classification_dataset, make_tokenizer, sentence, tiny_llama
from .helpers import StopAfter, comparable, lora, make_trainer, ravan


def fails(client, round_number, update):
    if client == "client_1":
        raise OSError(f"no network in round {round_number}")


def fails_or_is_poisoned(client, round_number, update):
    fails(client, round_number, update)
    if client == "client_2":
        next(iter(update.state.values())).fill_(float("nan"))


class Heard(FederatedCallback):
    """Every process receives the events of all clients."""

    def __init__(self):
        self.clients = []

    def on_client_end(self, args, state, control, client, failure=None, **kwargs):
        self.clients.append((client, failure is not None))


def clients(*sizes: int) -> dict:
    dataset = classification_dataset(sum(sizes))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return {
        f"client_{index}": dataset.select(range(start, start + size))
        for index, (start, size) in enumerate(zip(starts, sizes, strict=True))
    }


def sft(folder):
    texts = datasets.Dataset.from_dict({"text": [sentence(index) for index in range(24)]})
    args = FederatedSFTConfig(
        str(folder), num_rounds=2, num_clients=3, max_steps=1, per_device_train_batch_size=4, packing=True, max_length=16,
        learning_rate=1e-2, save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        eval_strategy="epoch", eval_clients=True,
    )  # fmt: skip
    return FederatedSFTTrainer(
        tiny_llama(), args, train_dataset=texts, eval_dataset=texts, processing_class=make_tokenizer(),
        peft_config=RavanConfig(r=3, num_heads=2, task_type="CAUSAL_LM"),
    )  # fmt: skip


def make(run: str, folder: Path, heard: Heard):
    """The trainer of a run. Five clients cannot be divided evenly among two processes."""
    common = {
        "num_clients": None, "train_dataset": clients(8, 24, 16, 40, 32), "callbacks": [heard], "num_rounds": 2,
        "max_steps": 1,
    }  # fmt: skip
    shared = {"optim": "sgd", "learning_rate": 0.1, "train_dataset": clients(32, 48), "max_steps": 2}
    ranks = {"adapter": lora(), "client_budgets": {"client_0": 0.5}, "merge_method": "hetlora"}
    several = {
        "uneven": {"server_optimizer": "fedadam", "eval_strategy": "epoch", "merge_method": "fedrpca"},
        "scaffold": {"scaffold": True, "local_parameters": "classifier", "adapter": lora(), "clients_per_round": 3},
        "personal": {
            "local_parameters": "classifier", "eval_strategy": "epoch", "eval_clients": True, "personalization_steps": 1,
        },
        "failing": {"client_fault": fails_or_is_poisoned, "min_successful_clients": 3},
        "repeated": {
            "client_fault": fails, "clients_per_round": 2, "min_successful_clients": 2, "num_rounds": 3, "scaffold": True,
        },
        "full": {"local_parameters": "classifier", "save_strategy": "epoch"},
        "single": {"train_dataset": clients(30)},
        "budgets": {
            "client_budgets": 0.5, "head_selection": "gradient", "upload_dtype": "int4", "download_dtype": "int8",
            "learning_rate": 0.1,
        },
        "rank_budgets": {"adapter": lora(), "client_budgets": "uniform", "merge_method": "hetlora"},
        "round_zero": {
            "adapter": RavanConfig(r=3, num_heads=2, init_bases="gradient_svd", task_type="SEQ_CLS"),
            "bases_clients": 3, "bases_warmup_steps": 1, "bases_batches": 2,
        },
        "stopping": {
            "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "num_rounds": 5,
            "metric_for_best_model": "eval_loss", "greater_is_better": True, "callbacks": [heard, EarlyStoppingCallback(1)],
        },
        "private": {"privacy": {"clip_norm": 1.0, "noise_multiplier": 0.5, "noise_seed": 11}},
        "killed": {"save_strategy": "epoch", "num_rounds": 3, "server_optimizer": "fedadam"},
        "resumed": {"save_strategy": "epoch", "scaffold": True, "num_rounds": 3},
        # a batch of both processes is one of twice the size; Trainer scales the loss of models that do not ask for it
        "data": {**shared, "parallel": "data", "client_timeout": 100.0, "average_tokens_across_devices": False},
        "doubled": {**shared, "per_device_train_batch_size": 16},
        "data_ranks": {**shared, **ranks, "parallel": "data", "average_tokens_across_devices": False},
        "doubled_ranks": {**shared, **ranks, "per_device_train_batch_size": 16},
        "data_budgets": {
            "parallel": "data", "client_budgets": 0.5, "head_selection": "gradient", "save_strategy": "epoch",
            "local_parameters": "classifier",
        },
    }  # fmt: skip
    options = {**common, **several[run]}
    return make_trainer(folder, options.pop("adapter", ravan()), **options)


class KillWithinAClient(FederatedCallback):
    """Kills the last process while it trains its second client of the third round."""

    def __init__(self):
        self.rounds, self.turns = 0, 0

    def on_round_begin(self, args, state, control, **kwargs):
        self.rounds += 1
        self.turns = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.turns += state.global_step == 0
        if self.rounds == 3 and self.turns == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)


def full_disk(store: ClientStore, client: str, round_number: int, *args) -> str:
    """The disk of the process that trains the second client of the second round is full."""
    if (client, round_number) == ("client_1", 2):
        raise ClientStoreError(errno.ENOSPC, "What client 'client_1' keeps could not be written", str(store.root))
    return save(store, client, round_number, *args)


def run_until_the_disk_is_full(folder: Path) -> None:
    """All processes end with the error, and none waits for another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClientStore, "save", full_disk)
        with pytest.raises(ClientStoreError):
            make("full", folder / "full", Heard()).train()


save = ClientStore.save


def run_until_the_server_fails(folder: Path) -> None:
    """The server runs in the main process only, and its error ends the run in all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "close", refuse)
        with pytest.raises(ArithmeticError):
            make("single", folder / "refused", Heard()).train()


def refuse(*args):
    raise ArithmeticError("There is no merge.")


def run_one(run: str, folder: Path, kill: bool = False) -> None:
    heard = Heard()
    if run == "full":
        run_until_the_disk_is_full(folder)
        run_until_the_server_fails(folder)
    if run == "resumed":
        trainer = make(run, folder / run, Heard())
        trainer.add_callback(StopAfter(2))
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train()
    trainer = sft(folder / run) if run == "sft" else make(run, folder / run, heard)
    if kill:
        trainer.add_callback(KillWithinAClient())
    if not trainer.is_world_process_zero():
        for tensor in trainer.model.parameters():
            tensor.data.add_(1)  # what is drawn when the model is made need not be the same
    trainer.train(resume_from_checkpoint=bool(find_checkpoints(folder / run)))
    everybody = [None] * PartialState().num_processes
    own = (heard.clients, trainer.state.global_step)
    if len(everybody) > 1:
        torch.distributed.all_gather_object(everybody, own)
    else:
        everybody = [own]
    assert all(heard == everybody[0] for heard in everybody), everybody
    if trainer.is_world_process_zero():
        state = {name: tensor.contiguous() for name, tensor in trainer.last_global_state.items()}
        save_file(state, folder / f"{run}.safetensors")
        history = comparable(trainer.state.log_history)
        (folder / f"{run}.json").write_text(json.dumps([history, heard.clients, trainer.state.best_global_step]))


def tell_how_it_ends(folder: Path) -> None:
    # runs after what the trainers have registered
    if not torch.distributed.is_initialized():
        (folder / f"left-{os.environ['RANK']}").touch()


def run_several(folder: Path, *runs: str) -> None:
    """What each of several processes does."""
    torch.set_num_threads(1)
    atexit.register(tell_how_it_ends, folder)
    for name in runs:
        run_one(name.removeprefix("kill-"), folder, kill=name.startswith("kill-"))
