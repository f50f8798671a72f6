"""A trainer of TRL trains at the nodes as it does in a FederatedSFTTrainer."""

from functools import partial

import pytest


pytest.importorskip("flwr")
pytest.importorskip("trl")

from peft import get_peft_model
from safetensors.torch import load_file
from trl import SFTTrainer

from peft_ravan.trainers import FederatedSFTConfig
from peft_ravan.trainers.flower import make_client_app, make_server_app

from ...conftest import tiny_llama
from ..helpers import assert_same
from ..trl_helpers import COMMON, ravan, sft, texts
from .grid import InProcessGrid


def test_supervised_fine_tuning_gives_the_same_adapter(tmp_path, tokenizer):
    parts = {"client_0": texts(range(12)), "client_1": texts(range(20, 28))}
    trainer = sft(tmp_path / "trainer", tokenizer, parts, num_rounds=1)
    trainer.train()
    trainer.save_model()

    args = FederatedSFTConfig(str(tmp_path / "flower"), **{**COMMON, "num_rounds": 1})

    def load_model():
        return get_peft_model(tiny_llama(), ravan())

    client = make_client_app(
        load_model,
        lambda context: parts[context.node_config["client-name"]],
        args,
        make_trainer=partial(SFTTrainer, processing_class=tokenizer),
    )
    grid = InProcessGrid(client, {7: {"client-name": "client_1"}, 8: {"client-name": "client_0"}})
    make_server_app(load_model, args, min_nodes=2, node_timeout=0.0)(grid, grid.server_context())
    expected = load_file(tmp_path / "trainer" / "adapter_model.safetensors")
    assert_same(load_file(tmp_path / "flower" / "adapter_model.safetensors"), expected)
