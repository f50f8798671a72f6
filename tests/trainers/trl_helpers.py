"""Small runs of TRL's trainers. Import it only if TRL is installed."""

import datasets

from peft_ravan import RavanConfig
from peft_ravan.trainers import FederatedSFTConfig, FederatedSFTTrainer

from ..conftest import sentence, tiny_llama


COMMON = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no",
    "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_length": 16,
    "lr_scheduler_type": "constant",
}  # fmt: skip


def ravan() -> RavanConfig:
    return RavanConfig(r=3, num_heads=2, task_type="CAUSAL_LM")


def texts(starts) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [sentence(start) for start in starts]})


def sft(folder, tokenizer, train_dataset, callbacks=None, eval_dataset=None, **kwargs) -> FederatedSFTTrainer:
    args = FederatedSFTConfig(str(folder), **{**COMMON, "num_rounds": 2, **kwargs})
    return FederatedSFTTrainer(
        tiny_llama(), args, train_dataset=train_dataset, processing_class=tokenizer, peft_config=ravan(),
        callbacks=callbacks, eval_dataset=eval_dataset,
    )  # fmt: skip
