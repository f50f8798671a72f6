"""
Merge adapters that three hospitals trained independently, each in its own folder or repository on the Hub.

    python examples/merge_adapters.py north south west --examples 120 80 300 --output-dir outputs/merged

All of them must be LoRA adapters, or Ravan adapters of one base model with the same `projection_seed`. The command
`peft-ravan merge` does the same.
"""

import argparse

from peft_ravan import inspect_adapter
from peft_ravan.trainers.commands import MergeRequest, merge_adapters


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", help="folders or names on the Hub")
    parser.add_argument(
        "--examples", type=int, nargs="+", help="that each was trained on; by default all have the same weight"
    )
    parser.add_argument("--method", help="by default the exact mean for Ravan, and FedAvg for LoRA")
    parser.add_argument("--output-dir", default="outputs/merged")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    request = MergeRequest(options.adapters, options.method, num_examples=options.examples)
    for note in merge_adapters(request, options.output_dir).notes:
        print(note)
    print(inspect_adapter(options.output_dir))


if __name__ == "__main__":
    main()
