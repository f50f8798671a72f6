"""Uploads of a given size, with as little training as there can be. Each tensor is random, so no two chunks are equal."""

import os

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from peft_ravan.trainers import FederatedArguments
from peft_ravan.trainers.flower import make_client_app, make_server_app


RANK = "PAYLOAD_RANK"  # the environment variable with the rank of LoRA, which gives the size
CLIENTS = 2
TOKENS = 16


def load_model():
    size = {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "intermediate_size": 1024}
    base = BertForSequenceClassification(BertConfig(vocab_size=1000, **size))
    # twelve targets, [1024, 1024]; B is random, too
    lora = LoraConfig(r=int(os.environ[RANK]), target_modules=["query", "key", "value"], init_lora_weights=False)
    return get_peft_model(base, lora)


def load_part(index):
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(1, 1000, (4, TOKENS), generator=generator)
    return Dataset.from_dict({"input_ids": tokens, "labels": [0, 1, 0, 1]}).with_format("torch")


def load_data(context):
    return load_part(context.node_config["partition-id"])


def arguments(config):
    return FederatedArguments(
        config["output-dir"],
        merge_method="fedavg",
        num_rounds=config["num-rounds"],
        num_clients=CLIENTS,
        max_steps=1,
        per_device_train_batch_size=1,
        upload_dtype="float32",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )


client = make_client_app(load_model, load_data, arguments)
server = make_server_app(load_model, arguments)
