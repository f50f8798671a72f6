"""
The cost of sharing an adapter: the sizes of its files with the bases, without them and as a LoRA twin, and the
difference of the twin's logits. The models have random weights, one with nn.Linear (Llama) and one with Conv1D
(GPT-2).

    python benchmarks/sharing.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_ravan import RavanConfig, to_lora


VOCABULARY = 1000


def llama(width: int) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=12))


def gpt2(width: int) -> nn.Module:
    sizes = {"n_embd": width, "vocab_size": VOCABULARY, "n_layer": 2, "n_head": 12}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


def file_size(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size


def adapted(base: nn.Module, dtype: torch.dtype, **kwargs) -> PeftModel:
    """A model whose adapter changes the weights by about a tenth of their norm."""
    autocast = dtype == torch.float32
    config = RavanConfig(num_heads=4, task_type="CAUSAL_LM", target_modules=["q_proj", "c_attn"], **kwargs)
    model = get_peft_model(base.to(dtype), config, autocast_adapter_dtype=autocast).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "ravan_H" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.1 * 0.02 * 768 / (4**0.5 * config.r) * noise)
    return model


@torch.no_grad()
def measure(make_base, width: int, r: int, dtype: torch.dtype, rank: float | None, folder: Path) -> dict:
    bases = []
    for _ in range(3):
        torch.manual_seed(0)
        bases.append(make_base(width).to(dtype).eval())
    tokens = torch.randint(0, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
    before = bases[0](tokens).logits.float()
    sizes = {}
    for name, save_projection in (("with bases", True), ("without", False)):
        model = adapted(bases[0] if save_projection else bases[1], dtype, r=r, save_projection=save_projection)
        model.save_pretrained(folder / name)
        sizes[name] = file_size(folder / name)
    config = to_lora(folder / "without", folder / "twin", rank=rank)
    autocast = dtype == torch.float32
    twin = PeftModel.from_pretrained(bases[2], folder / "twin", autocast_adapter_dtype=autocast).eval()
    expected, found = model(tokens).logits.float(), twin(tokens).logits.float()
    return {
        "model": make_base.__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "rank of twin": config.r,
        **{f"kB {name}": round(size / 1e3) for name, size in {**sizes, "twin": file_size(folder / "twin")}.items()},
        "with / without": sizes["with bases"] / sizes["without"],
        "largest difference": (found - expected).abs().max().item(),
        "effect of adapter": (expected - before).abs().max().item(),
        "largest logit": expected.abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="d_in of the adapted weights (default: %(default)s)")
    parser.add_argument("--r", type=int, default=55, help="rank of one of four heads (default: %(default)s)")
    args = parser.parse_args()
    rows = []
    for make_base in (llama, gpt2):
        for dtype, rank in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, 0.9)):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(make_base, args.width, args.r, dtype, rank, Path(folder)))
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
