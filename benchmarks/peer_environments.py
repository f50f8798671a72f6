"""The environments of benchmarks/peers.py: one for each framework, made with `python -m venv` and pip."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "src", "trainers")  # of the package
COMMON = ("torch", "transformers", "peft")
SHOWN = ("torch", "transformers", "peft")
MADE = "made.json"
VERSIONS = """
import importlib.metadata as metadata, json, platform, sys
found = {name: metadata.version(name) for name in sys.argv[1:]}
print(json.dumps({"python": platform.python_version(), **found}))
"""


@dataclass(frozen=True)
class Environment:
    """
    The packages of a framework, in the versions of constraints.txt.

    Args:
        distribution (`str`): The name of the framework's distribution.
        requirement (`str`): What pip installs.
        free (`tuple[str, ...]`, *optional*): Packages that the framework needs in other versions.
    """

    distribution: str
    requirement: str
    free: tuple[str, ...] = ()


ENVIRONMENTS = {
    "federated_trainer": Environment("peft-ravan", "peft-ravan"),
    "flower": Environment("flwr", "flwr[simulation]"),
    "pfl": Environment("pfl", "pfl[pytorch]==0.6.0", free=("absl-py", "dp-accounting")),
    "nvflare": Environment("nvflare", "nvflare==2.9.0"),
}


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of an environment."""
    return folder / name / "bin" / "python"


def make_environment(folder: Path, name: str) -> dict:
    """
    Args:
        folder (`Path`): Where the environments are made.
        name (`str`): One of [`ENVIRONMENTS`].

    Returns:
        `dict`: The `versions` of its packages, or the `error` of pip. What was made before is not made again.
    """
    path, made = folder / name, folder / name / MADE
    if not made.is_file():
        shutil.rmtree(path, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", path], check=True)
        print(f"Installing {name}", flush=True)
        made.write_text(json.dumps(install(path, ENVIRONMENTS[name])))
    return json.loads(made.read_text())


def install(path: Path, environment: Environment) -> dict:
    constraints = path / "constraints.txt"
    constraints.write_text(without((ROOT / "constraints.txt").read_text(), environment.free))
    requirement = environment.requirement
    if environment.distribution == "peft-ravan":
        requirement = copy_sources(path / "peft-ravan")  # pip would build in the repository
    python = path / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "-c", constraints, requirement, *COMMON]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        return {"error": errors[-1].removeprefix("ERROR: ")}
    names = [environment.distribution, *SHOWN]
    found = subprocess.run([python, "-c", VERSIONS, *names], capture_output=True, text=True, check=True)
    return {"versions": json.loads(found.stdout)}


def without(constraints: str, names: tuple[str, ...]) -> str:
    """Constraints without those of some packages."""
    lines = constraints.splitlines()
    return "\n".join(line for line in lines if re.split("[=;]", line)[0] not in names) + "\n"


def copy_sources(folder: Path) -> Path:
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    return folder
