"""The commands as functions. `peft_ravan_cli` defines their names and options on the command line."""

from .adapters import draw_rounds, find_adapter, push_adapter, save_lora_twin, write_card
from .apps import write_app
from .argument_help import describe_arguments
from .merge_methods import describe_methods, parse_examples, parse_options
from .merging import MergedAdapter, MergeRequest, merge_adapters
from .output import check_is_free
from .planning import PlanRequest, parse_bytes, plan_uploads, show_plan
from .run_arguments import RunArguments, parse_run
from .training import train_run


__all__ = [
    "MergeRequest",
    "MergedAdapter",
    "PlanRequest",
    "RunArguments",
    "check_is_free",
    "describe_arguments",
    "describe_methods",
    "draw_rounds",
    "find_adapter",
    "merge_adapters",
    "parse_bytes",
    "parse_examples",
    "parse_options",
    "parse_run",
    "plan_uploads",
    "push_adapter",
    "save_lora_twin",
    "show_plan",
    "train_run",
    "write_app",
    "write_card",
]
