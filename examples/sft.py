"""
Fine-tune a language model on texts with a Ravan adapter and TRL's SFTTrainer, as with any PEFT method.

    python examples/sft.py --model MODEL --data DATA --output-dir outputs/sft

MODEL is a causal language model on the Hub or in a folder, DATA a data set on the Hub or a folder of parquet files with the
column `text` and the splits train and test. It needs `peft-ravan[trl]`.
"""

import argparse

import datasets
from trl import SFTConfig, SFTTrainer

from peft_ravan import RavanConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output-dir", default="outputs/sft")
    parser.add_argument("--steps", type=int, default=300)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    texts = datasets.load_dataset(options.data).select_columns("text")
    args = SFTConfig(
        options.output_dir,
        max_steps=options.steps,
        learning_rate=2e-3,
        per_device_train_batch_size=16,
        max_length=256,
        packing=True,
        bf16=False,
        logging_steps=50,
        eval_strategy="steps",
        eval_steps=100,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(
        options.model,
        args,
        train_dataset=texts["train"],
        eval_dataset=texts["test"],
        peft_config=RavanConfig(r=8, num_heads=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
