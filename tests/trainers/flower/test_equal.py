"""A federation over Flower gives the adapter of a FederatedTrainer with the same seeds and data, bit for bit."""

import pytest


pytest.importorskip("flwr")

from peft_ravan.trainers import read_history

from ..helpers import comparable, lora, make_trainer, ravan
from .helpers import NUM_CLIENTS, Federation, assert_same_as_trainer, small, trained


RUNS = {
    "ravan": (ravan, {"max_steps": 2}),
    "ravan, mean of rounds": (ravan, {"average_rounds": 2, "lr_scheduler_type": "linear"}),
    "ravan, budgets": (ravan, {"client_budgets": "uniform", "head_selection": "gradient"}),
    "ravan, fedrpca": (ravan, {"merge_method": "fedrpca", "merge_options": {"beta": "adaptive"}}),
    "ravan, int4": (ravan, {"upload_dtype": "int4", "download_dtype": "bfloat16"}),
    "lora, fedavg": (lora, {"clients_per_round": 2, "server_optimizer": "fedadam"}),
    "lora, fedrpca": (lora, {"merge_method": "fedrpca"}),
    "lora, ffa_lora": (lora, {"merge_method": "ffa_lora"}),
    "lora, fedsa_lora": (lora, {"merge_method": "fedsa_lora"}),
    "lora, hetlora with budgets": (lora, {"merge_method": "hetlora", "client_budgets": "uniform"}),
    "lora, flexlora with budgets, int4": (
        lora,
        {"merge_method": "flexlora", "client_budgets": 0.5, "upload_dtype": "int4", "download_dtype": "int8"},
    ),
    "scaffold, personal": (
        ravan,
        {
            "scaffold": True,
            "local_parameters": ["classifier"],
            "optim": "sgd",
            "clients_per_round": 2,
            "num_rounds": 3,
        },
    ),
    "privacy": (ravan, {"privacy": {"clip_norm": 1.0, "noise_multiplier": 0.5, "noise_seed": 11}}),
}


@pytest.mark.parametrize("make_adapter, options", RUNS.values(), ids=RUNS)
def test_it_is_the_federation_of_a_federated_trainer(tmp_path, make_adapter, options):
    trained(tmp_path, make_adapter, **options)
    assert_same_as_trainer(Federation(small(tmp_path / "flower", **options), make_adapter))


def test_the_server_evaluates_the_adapter_as_a_federated_trainer_does(tmp_path):
    options = {"eval_strategy": "epoch", "eval_on_start": True, "num_rounds": 1}
    trainer = make_trainer(tmp_path / "trainer", num_clients=NUM_CLIENTS, max_steps=1, **options)
    trainer.train()
    federation = Federation(
        small(tmp_path / "flower", **options),
        load_eval_data=lambda: trainer.eval_dataset,
        compute_metrics=trainer.compute_metrics,
    )
    federation.run()
    assert comparable(federation.records) == comparable(read_history(tmp_path / "trainer"))
    assert [set(record) >= {"eval_loss", "eval_accuracy"} for record in federation.records] == [True, True]
