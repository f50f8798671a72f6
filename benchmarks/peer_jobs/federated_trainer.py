"""With a FederatedTrainer: python federated_trainer.py OUTPUT_DIR NUM_ROUNDS, or under torchrun."""

import sys

from common import (
    BATCH_SIZE,
    CLIENTS,
    CLIENTS_PER_ROUND,
    LEARNING_RATE,
    SEED,
    STEPS,
    is_checked,  # measures
    load_examples,
    load_model,
)
from datasets import Dataset

from peft_ravan.trainers import FederatedArguments, FederatedTrainer


def make_trainer(output_dir: str, num_rounds: int) -> FederatedTrainer:
    args = FederatedArguments(
        output_dir,
        num_clients=CLIENTS,
        clients_per_round=CLIENTS_PER_ROUND,
        num_rounds=num_rounds,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        upload_dtype="float32",
        average_rounds=1,
        save_strategy="no",
        eval_strategy="epoch" if is_checked() else "no",  # measures
        report_to="none",
        use_cpu=True,
        seed=SEED,
    )
    clients = {f"client_{index:02}": Dataset.from_dict(load_examples(index)) for index in range(CLIENTS)}
    checked = Dataset.from_dict(load_examples(-1)) if is_checked() else None  # measures
    return FederatedTrainer(load_model(), args, train_dataset=clients, eval_dataset=checked)


if __name__ == "__main__":
    trainer = make_trainer(sys.argv[1], int(sys.argv[2]))
    trainer.train()
    trainer.save_model()
