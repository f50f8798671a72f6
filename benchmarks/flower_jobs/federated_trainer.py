"""The same job with a FederatedTrainer: python federated_trainer.py OUTPUT_DIR NUM_ROUNDS, or under torchrun."""

import sys

from texts import (
    BATCH_SIZE,
    CLIENTS,
    CLIENTS_PER_ROUND,
    LEARNING_RATE,
    SEED,
    load_model,
    load_part,
)
from transformers import set_seed

from peft_ravan.trainers import FederatedArguments, FederatedTrainer


def arguments(output_dir: str, num_rounds: int) -> FederatedArguments:
    return FederatedArguments(
        output_dir,
        merge_method="fedavg",
        num_clients=CLIENTS,
        clients_per_round=CLIENTS_PER_ROUND,
        num_rounds=num_rounds,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=SEED,
    )


if __name__ == "__main__":
    output_dir, num_rounds = sys.argv[1:]
    set_seed(SEED)
    clients = {f"client_{index:02}": load_part(index) for index in range(CLIENTS)}
    trainer = FederatedTrainer(load_model(), arguments(output_dir, int(num_rounds)), train_dataset=clients)
    trainer.train()
    trainer.save_model()
