"""
Fine-tune a text classifier in a federation of twenty clients with different label distributions.

    python examples/federated_text_classification.py --model MODEL --data DATA --output-dir outputs/federated-classifier

MODEL is on the Hub or in a folder, DATA a data set on the Hub or a folder of parquet files with the columns `text` and
`label` and the splits train and test.
"""

import argparse

import datasets
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_ravan import RavanConfig
from peft_ravan.trainers import FederatedArguments, FederatedTrainer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output-dir", default="outputs/federated-classifier")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--local-steps", type=int, default=10)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    data = datasets.load_dataset(options.data)
    labels = data["train"].features["label"]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = data.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=128), batched=True)

    base_model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=labels.num_classes)
    model = get_peft_model(base_model, RavanConfig(r=16, num_heads=4, task_type="SEQ_CLS"))
    model.print_trainable_parameters()
    args = FederatedArguments(
        options.output_dir,
        num_clients=20,
        clients_per_round=5,
        partition="dirichlet",
        partition_alpha=0.3,
        num_rounds=options.rounds,
        max_steps=options.local_steps,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        task_head_learning_rate=3e-2,
        per_device_eval_batch_size=128,
        merge_method="fedrpca",
        eval_strategy="steps",
        eval_steps=5,
        report_to="none",
    )
    trainer = FederatedTrainer(
        model,
        args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    )
    print(trainer.partition_table().to_string())
    trainer.train()
    trainer.save_model()
    columns = ["clients", "train_loss", "eval_accuracy", "uploaded_MB", "seconds"]
    print(trainer.history_table().filter(columns).to_string())


if __name__ == "__main__":
    main()
