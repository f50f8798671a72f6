"""
In Flower's simulation: python flower_simulation.py OUTPUT_DIR NUM_ROUNDS [--keep].

The apps follow Flower's template for PyTorch and its examples of LoRA (FlowerTune). These build the model in each call of
a client. With `--keep`, each process of Ray keeps its model.
"""

import sys

import torch
from common import (
    BATCH_SIZE,
    CLIENTS,
    CLIENTS_PER_ROUND,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    STEPS,
    kept_model,
    load_examples,
    load_model,
    note_round,  # measures
)
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader, TensorDataset


OUTPUT_DIR, NUM_ROUNDS, KEEP = sys.argv[1], int(sys.argv[2]), "--keep" in sys.argv
client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    model = kept_model() if KEEP else load_model()
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    examples = {
        name: torch.from_numpy(values) for name, values in load_examples(context.node_config["partition-id"]).items()
    }
    loader = DataLoader(TensorDataset(*examples.values()), BATCH_SIZE, shuffle=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True)
    model.train()
    for _, batch in zip(range(STEPS), loader, strict=False):
        model(**dict(zip(examples, batch, strict=True))).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    metrics = MetricRecord({"num-examples": len(loader.dataset)})
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    model = load_model()
    strategy = FedAvg(
        fraction_train=CLIENTS_PER_ROUND / CLIENTS,
        fraction_evaluate=0.0,
        min_train_nodes=CLIENTS_PER_ROUND,
        min_available_nodes=CLIENTS,
    )
    result = strategy.start(
        grid,
        ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=NUM_ROUNDS,
        evaluate_fn=lambda number, arrays: note_round(OUTPUT_DIR, number, arrays.to_torch_state_dict),  # measures
    )
    set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
    model.save_pretrained(OUTPUT_DIR)


if __name__ == "__main__":
    run_simulation(server, client, CLIENTS, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
