"""Runs PEFT's own tests on Ravan, each group in a separate process, and shows which passed and which were skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from .plugin import REPORT_VARIABLE, STEP_VARIABLE
from .sdist import CACHE, NoSourceDistribution, leave_out, peft_source_tree


GROUPS = {
    "custom models": ["custom_models"],
    "decoder models": ["decoder_models"],
    "other models": ["encoder_decoder_models", "feature_extraction_models", "seq_classifier"],
    "initialization and parameters": ["initialization", "other", "target_parameters"],
    "functions": ["config", "helpers", "lora_conversion", "low_level_api", "quantization"],
}
OPTIONS = ["-c", os.devnull, "--rootdir=.", "-p", "peft_suite.plugin", "-p", "no:cacheprovider", "--disable-warnings"]
# the default would take ten times as long as the tests, when many fail
OPTIONS += ["--tb=native"]


@pytest.fixture(scope="module")
def source_tree() -> Path:
    try:
        return peft_source_tree()
    except NoSourceDistribution as error:
        leave_out(error)


# `make test` runs each of PEFT's tests, with one in so many of its models and configurations
STEP = 16


def run_suite(source_tree: Path, files: list[str], folder: Path, step: int = 1) -> dict[str, dict[str, str]]:
    """Run PEFT's test files on Ravan and return the outcome and the reason of every test."""
    report = folder / "report.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        REPORT_VARIABLE: str(report),
        STEP_VARIABLE: str(step),
    }
    command = [sys.executable, "-m", "pytest", *OPTIONS, *(f"tests/test_{name}.py" for name in files)]
    result = subprocess.run(command, cwd=source_tree, env=environment, capture_output=True, text=True)
    assert report.exists(), f"PEFT's tests could not be run:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return json.loads(report.read_text())


def summary(outcomes: dict[str, dict[str, str]]) -> str:
    """The numbers of tests that passed, were skipped and failed, with the reasons of the skips."""
    counts = Counter(test["outcome"] for test in outcomes.values())
    left_out = Counter(
        f"{test['outcome']}: {test['reason']}"
        for test in outcomes.values()
        if test["outcome"] in ("skipped", "known failure")
    )
    lines = [", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())]
    return "\n".join(lines + [f"  {count} {reason}" for reason, count in left_out.most_common()])


def failures(outcomes: dict[str, dict[str, str]]) -> str:
    """The failed tests by error, with the end of one traceback for each."""
    by_error = defaultdict(list)
    for name, test in outcomes.items():
        if test["outcome"] == "failed":
            errors = [line for line in test["reason"].splitlines() if line and not line.startswith((" ", "+"))]
            by_error[errors[-1]].append(name)
    return "\n\n".join(
        f"{len(names)} times {error}\n" + "\n".join(names[:3]) + f"\n{outcomes[names[0]]['reason'][-1000:]}"
        for error, names in by_error.items()
    )


def check(outcomes: dict[str, dict[str, str]], name: str) -> None:
    # also into a file, because pytest shows nothing of a test that passes in another process
    print(f"PEFT's tests of {name}: {summary(outcomes)}")
    (CACHE / f"{name.replace(' ', '_')}.txt").write_text(summary(outcomes) + "\n")
    assert outcomes, "no test has a row of Ravan"
    if errors := failures(outcomes):
        pytest.fail(f"PEFT's tests failed with Ravan:\n\n{errors}", pytrace=False)


def test_ravan_passes_the_tests_of_peft(source_tree, tmp_path):
    files = [name for group in GROUPS.values() for name in group]
    check(run_suite(source_tree, files, tmp_path, STEP), "all kinds")


@pytest.mark.deep
@pytest.mark.parametrize("group", GROUPS)
def test_ravan_passes_the_tests_of_peft_with_every_model_and_configuration(group, source_tree, tmp_path):
    check(run_suite(source_tree, GROUPS[group], tmp_path), group)


@pytest.mark.parametrize("value", [None, "", "0", "false", "False"])
def test_without_a_network_the_tests_are_skipped(monkeypatch, value):
    monkeypatch.delenv("CI", raising=False) if value is None else monkeypatch.setenv("CI", value)
    with pytest.raises(pytest.skip.Exception, match="no network"):
        leave_out(NoSourceDistribution("no network"))


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_without_a_network_ci_fails(monkeypatch, value):
    monkeypatch.setenv("CI", value)
    with pytest.raises(pytest.fail.Exception, match="not run, .* where CI is set: no network"):
        leave_out(NoSourceDistribution("no network"))
