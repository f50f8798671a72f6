"""Helpers for the tests of the commands."""

import yaml

from peft_ravan_cli import app


COMMANDS = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]

RUN = {
    "model_name_or_path": "base",
    "data_files": "train.csv",
    "test_files": ["test.csv"],
    "adapter": {"r": 2, "num_heads": 4},
    "num_clients": 3,
    "num_rounds": 2,
    "max_steps": 2,
    "learning_rate": "1e-2",  # which is a string in YAML
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "output_dir": "out",
}


def write(**changes):
    values = {name: value for name, value in {**RUN, **changes}.items() if value is not ...}
    with open("run.yaml", "w") as file:
        yaml.safe_dump(values, file)
