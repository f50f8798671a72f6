"""
Fine-tune a text classifier with a Ravan adapter and Trainer, as with any PEFT method.

    python examples/text_classification.py --model MODEL --data DATA --output-dir outputs/classifier

MODEL is on the Hub or in a folder, DATA a data set on the Hub or a folder of parquet files with the columns `text` and
`label` and the splits train and test.
"""

import argparse

import datasets
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from peft_ravan import RavanConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output-dir", default="outputs/classifier")
    parser.add_argument("--steps", type=int, default=300)
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
    args = TrainingArguments(
        options.output_dir,
        max_steps=options.steps,
        learning_rate=3e-3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
