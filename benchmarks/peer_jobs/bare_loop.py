"""The steps of the clients alone, one after the other, without a federation: python bare_loop.py OUTPUT_DIR NUM_ROUNDS."""

import functools
import sys

import torch
from common import (
    BATCH_SIZE,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    STEPS,
    drawn_clients,
    load_examples,
    load_model,
    note_round,  # measures
)
from peft import get_peft_model_state_dict  # measures


def train(model: torch.nn.Module, parameters: list[torch.nn.Parameter], client: int) -> None:
    examples = {name: torch.from_numpy(values) for name, values in load_examples(client).items()}
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True)
    for step in range(STEPS):
        batch = slice(BATCH_SIZE * step, BATCH_SIZE * (step + 1))
        model(**{name: values[batch] for name, values in examples.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    output_dir, num_rounds = sys.argv[1], int(sys.argv[2])
    model = load_model().train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for number, clients in enumerate(drawn_clients()[:num_rounds], 1):
        for client in clients:
            train(model, trained, client)
        note_round(output_dir, number, functools.partial(get_peft_model_state_dict, model))  # measures
