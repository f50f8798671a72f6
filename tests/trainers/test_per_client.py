"""The metric for 🤗 Evaluate, by import and from its file."""

import runpy
import sys

import pytest

from peft_ravan.trainers import client_statistics


evaluate = pytest.importorskip("evaluate")

from peft_ravan.trainers import per_client  # noqa: E402


CLIENTS = ["north", "north", "south", "south", "west", "west"]
EXAMPLES = {"predictions": [0, 1, 1, 0, 2, 2], "references": [0, 1, 1, 1, 0, 0], "clients": CLIENTS}


@pytest.fixture(params=["import", "path"])
def metric(request, tmp_path, monkeypatch):
    if request.param == "import":
        return per_client.PerClient(cache_dir=str(tmp_path))
    monkeypatch.setattr(
        evaluate.loading, "init_dynamic_modules", lambda name="evaluate_modules": modules(tmp_path, name)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return evaluate.load(per_client.__file__, cache_dir=str(tmp_path))


def modules(folder, name):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "__init__.py").touch()
    return str(folder / name)


def test_accuracy_over_clients(metric):
    figures = metric.compute(**EXAMPLES)
    accuracies = {"north": 1.0, "south": 0.5, "west": 0.0}
    assert figures == {**client_statistics(accuracies.values()), "per_client": accuracies}
    assert isinstance(metric, evaluate.Metric) and figures["worst_decile"] == 0.0


def test_batches_and_another_metric(tmp_path):
    metric = per_client.PerClient(cache_dir=str(tmp_path))
    for start in (0, 3):
        metric.add_batch(**{name: values[start : start + 3] for name, values in EXAMPLES.items()})

    def error(predictions, references):
        return {"error": sum(abs(p - r) for p, r in zip(predictions, references, strict=True))}

    figures = metric.compute(metric=error, greater_is_better=False)
    assert figures["per_client"] == {"north": 0, "south": 1, "west": 4} and figures["worst"] == 4
    with pytest.raises(ValueError, match="gives 2 numbers"):
        metric.compute(**EXAMPLES, metric=lambda predictions, references: {"a": 1, "b": 2})


def test_without_evaluate_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-ravan\[evaluate\]'"):
        runpy.run_path(per_client.__file__)
