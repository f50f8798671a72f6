"""
The cost of a training step of Ravan, compared with LoRA with the same number of trained parameters, full fine-tuning
of the same layers, one chain of products per head, and training half of the heads.

The model is a stack of square linear layers with activations in between, all of them adapted. This is the worst case
for an adapter. A step is a forward and a backward pass. All ratios are measured in one run on one machine.

    python benchmarks/tuner_step.py --width 768 --tokens 2048
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.utils.benchmark
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_ravan import RavanConfig
from peft_ravan.tuner.linear import Linear


class HeadByHead(Linear):
    """The same layer with one chain of products per head, as it is usually written."""

    def forward(self, x):
        result = self.base_layer(x)
        name, r = "default", self.r["default"]
        for head in range(self.num_heads[name]):
            rows = slice(head * r, (head + 1) * r)
            inner = x @ self.ravan_A[name][rows].T @ self.ravan_H[name][head].T
            result = result + self.ravan_s[name][head] * (inner @ self.ravan_B[name][:, rows].T)
        return result


def make_stack(width: int, depth: int) -> nn.Sequential:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*layers)


def targets(depth: int) -> list[str]:
    return [str(2 * index) for index in range(depth)]


def make_models(width: int, depth: int, lora_rank: int, num_heads: int) -> dict[str, nn.Module]:
    # LoRA trains rank * (d_in + d_out) numbers a layer, Ravan num_heads * (r * r + 1)
    r = int((lora_rank * 2 * width / num_heads) ** 0.5)
    ravan_config = {"r": r, "num_heads": num_heads, "target_modules": targets(depth)}
    lora = LoraConfig(r=lora_rank, target_modules=targets(depth))
    head_by_head = get_peft_model(make_stack(width, depth), RavanConfig(**ravan_config))
    for module in head_by_head.modules():
        if isinstance(module, Linear):
            module.__class__ = HeadByHead
    half = get_peft_model(make_stack(width, depth), RavanConfig(**ravan_config))
    half.set_trained_heads({name: torch.arange(len(mask)) % 2 == 0 for name, mask in half.trained_heads().items()})
    return {
        "frozen base": make_stack(width, depth).requires_grad_(False),
        "full fine-tuning": make_stack(width, depth),
        "LoRA": get_peft_model(make_stack(width, depth), lora),
        "Ravan": get_peft_model(make_stack(width, depth), RavanConfig(**ravan_config)),
        "Ravan, half the heads": half,
        "Ravan, head by head": head_by_head,
    }


def step(model: nn.Module, x: torch.Tensor) -> None:
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--width", type=int, default=768, help="d_in = d_out of every layer")
    parser.add_argument("--depth", type=int, default=6, help="number of layers")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a batch")
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to measure each model")
    options = parser.parse_args()

    torch.manual_seed(0)
    models = make_models(options.width, options.depth, options.lora_rank, options.num_heads)
    x = torch.randn(options.tokens, options.width, device=options.device, requires_grad=True)
    seconds = {}
    for name, model in models.items():
        timer = torch.utils.benchmark.Timer(
            "step(model, x)",
            globals={"step": step, "model": model.to(options.device), "x": x},
            num_threads=options.threads,
        )
        seconds[name] = timer.blocked_autorange(min_run_time=options.seconds).median

    for name, model in models.items():
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        print(f"{name:22s} {1000 * seconds[name]:9.2f} ms  {trained:10,d} trained parameters")
    ratios = {
        "against LoRA (reach <= 1.25)": seconds["Ravan"] / seconds["LoRA"],
        "against full fine-tuning (reach <= 1.0)": seconds["Ravan"] / seconds["full fine-tuning"],
        "half the heads against all": seconds["Ravan, half the heads"] / seconds["Ravan"],
        "head by head against Ravan (reach >= 2)": seconds["Ravan, head by head"] / seconds["Ravan"],
        "against the frozen base": seconds["Ravan"] / seconds["frozen base"],
    }
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}, indent=2))


if __name__ == "__main__":
    main()
