"""A trainer of TRL trains at the nodes as it does in a FederatedSFTTrainer."""

from functools import partial

import pytest


pytest.importorskip("flwr")
pytest.importorskip("trl")

from peft import get_peft_model
from safetensors.torch import load_file
from trl import SFTTrainer

from peft_ravan.trainers import FederatedSFTConfig, FederatedSFTTrainer, read_history
from peft_ravan.trainers.flower import make_client_app, make_server_app

from ...conftest import tiny_llama
from ..helpers import assert_same
from ..trl_helpers import COMMON, ravan, sft, texts
from .grid import InProcessGrid


PARTS = {"client_0": texts(range(12)), "client_1": texts(range(20, 28))}
EVALUATED = {"client_0": texts(range(40, 48)), "client_1": texts(range(50, 54))}


def run_over_flower(folder, tokenizer, **options) -> None:
    args = FederatedSFTConfig(str(folder), **{**COMMON, "num_rounds": 1, **options})

    def load_model():
        return get_peft_model(tiny_llama(), ravan())

    client = make_client_app(
        load_model,
        lambda context: PARTS[context.node_config["client-name"]],
        args,
        make_trainer=partial(SFTTrainer, processing_class=tokenizer),
        load_eval_data=lambda context: EVALUATED[context.node_config["client-name"]],
    )
    grid = InProcessGrid(client, {7: {"client-name": "client_1"}, 8: {"client-name": "client_0"}})
    make_server_app(load_model, args, min_nodes=2, node_timeout=0.0)(grid, grid.server_context())


def test_supervised_fine_tuning_gives_the_same_adapter(tmp_path, tokenizer):
    trainer = sft(tmp_path / "trainer", tokenizer, PARTS, num_rounds=1)
    trainer.train()
    trainer.save_model()
    run_over_flower(tmp_path / "flower", tokenizer)
    expected = load_file(tmp_path / "trainer" / "adapter_model.safetensors")
    assert_same(load_file(tmp_path / "flower" / "adapter_model.safetensors"), expected)


def test_clients_are_evaluated_as_supervised_fine_tuning_does(tmp_path, tokenizer):
    options = {"eval_strategy": "epoch", "eval_clients": True}
    trainer = FederatedSFTTrainer(
        get_peft_model(tiny_llama(), ravan()),
        FederatedSFTConfig(str(tmp_path / "trainer"), **COMMON, num_rounds=1, **options),
        train_dataset=PARTS,
        eval_dataset=texts(range(40, 44)),
        client_eval_dataset=EVALUATED,
        processing_class=tokenizer,
    )
    trainer.train()
    run_over_flower(tmp_path / "flower", tokenizer, **options)
    [flower], [trainer] = (
        [
            {name: value for name, value in record.items() if "eval_clients" in name}
            for record in read_history(tmp_path / name)
        ]
        for name in ("flower", "trainer")
    )
    assert "eval_clients_mean_mean_token_accuracy" in trainer
    assert flower == trainer
