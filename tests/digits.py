"""The demo on digits, with a tiny base model that is not pretrained."""

from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification


def save_base_model(public, output_dir: Path, seed: int, num_epochs: int = 0) -> Path:
    """Takes the place of the demo's `pretrain`."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=10,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(output_dir / "base_model")
    return output_dir / "base_model"
