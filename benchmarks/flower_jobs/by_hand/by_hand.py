"""FedAvg of a LoRA adapter written by hand, like the templates of Flower: each call of a client builds its model."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from texts import (
    BATCH_SIZE,
    CLIENTS,
    CLIENTS_PER_ROUND,
    LEARNING_RATE,
    SEED,
    load_model,
    load_part,
    note_round,
)
from torch.utils.data import DataLoader
from transformers import set_seed


client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    model = load_model()
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    dataset = load_part(context.node_config["partition-id"])
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True)
    model.train()
    total = 0.0
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    metrics = MetricRecord({"train-loss": total / len(loader), "num-examples": len(dataset)})
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    set_seed(SEED)
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
        num_rounds=config["num-rounds"],
        evaluate_fn=lambda server_round, arrays: note_round(config["output-dir"], server_round),
    )
    set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
    model.save_pretrained(config["output-dir"])
