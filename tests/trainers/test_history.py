"""The record of a run: its file, its table, its plots, its progress bars, and what loggers receive."""

import io
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainerCallback
from transformers import trainer as trainer_module

from peft_ravan.sharing.federation_record import HISTORY_FILE, history_lines, write_history
from peft_ravan.sharing.plotting import BLUE, MAX_NAMES, make_figure, show_rounds
from peft_ravan.trainers import FederatedTrainer, history_table, plot_history, read_history
from peft_ravan.trainers.records import callbacks
from peft_ravan.trainers.records.history_plot import FAILED, TRAINED, core_norms, participation_of

from ..conftest import classification_dataset
from .helpers import adapter_state, comparable, interrupted, lora, make_trainer, ravan, resumable_trainer


def fail_client_1(client, round_number, update):
    if client == "client_1":
        raise RuntimeError("the network is down")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> FederatedTrainer:
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(
        folder, eval_strategy="epoch", eval_on_start=True, eval_clients=True, num_rounds=3, max_steps=1,
        report_to="tensorboard", client_fault=fail_client_1,
    )  # fmt: skip
    trainer.train()
    return trainer


# ---- The file --------------------------------------------------------------------


def test_the_file_has_a_line_a_round_and_is_the_history(run):
    lines = Path(run.args.output_dir, HISTORY_FILE).read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2, 3]
    assert read_history(run.args.output_dir) == run.state.log_history
    assert json.loads(lines[1])["clients"] == ["client_0", "client_2", "client_3"]


def test_a_saved_adapter_has_it_and_one_without_rounds_has_not(run, tmp_path):
    run.save_model(str(tmp_path / "adapter"))
    assert read_history(tmp_path / "adapter") == run.state.log_history
    make_trainer(tmp_path / "new").save_model(str(tmp_path / "untrained"))
    assert not (tmp_path / "untrained" / HISTORY_FILE).exists()


def test_the_file_is_json_whatever_is_in_a_record(tmp_path):
    record = {
        "a": float("nan"),
        "b": [math.inf, 1.5],
        "c": np.float32(0.5),
        "d": torch.tensor([1, 2]),
        "e": {"f": -math.inf},
    }
    assert history_lines([record]) == '{"a": null, "b": [null, 1.5], "c": 0.5, "d": [1, 2], "e": {"f": null}}\n'


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    write_history(tmp_path / HISTORY_FILE, [{"round": 1}, {"round": 2}])
    with open(tmp_path / HISTORY_FILE, "a") as file:
        file.write('{"round": 3, "cli')
    assert [record["round"] for record in read_history(tmp_path)] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == [HISTORY_FILE]


def test_a_resumed_run_has_the_file_of_the_uninterrupted_one(tmp_path):
    options = {"max_steps": 1, "num_rounds": 3, "eval_strategy": "no"}
    resumable_trainer(tmp_path / "whole", **options).train()
    interrupted(tmp_path / "resumed", 2, **options)
    with open(tmp_path / "resumed" / HISTORY_FILE, "a") as file:
        file.write(
            '{"round": 3, "clients": ["lost"]}\n{"rou'
        )  # what a kill in the next round leaves, without its checkpoint
    resumable_trainer(tmp_path / "resumed", **options).train(resume_from_checkpoint=True)
    whole, resumed = (read_history(tmp_path / name) for name in ("whole", "resumed"))
    assert comparable(whole) == comparable(resumed) and [record["round"] for record in resumed] == [1, 2, 3]


# ---- The similarity of updates ---------------------------------------------------


@pytest.mark.parametrize("adapter", [ravan, lora])
def test_the_similarity_of_updates_is_in_the_record(tmp_path, adapter):
    """It is computed from the uploads, by hand, and shows what clients have in common."""
    uploads = []

    def collect(client, round_number, update):
        uploads.append(torch.cat([update.state[name].double().flatten() for name in start]))

    trainer = make_trainer(tmp_path, adapter(), num_clients=3, num_rounds=1, client_fault=collect)
    start = adapter_state(trainer)
    trainer.train()
    first = torch.cat([tensor.double().flatten() for tensor in start.values()])
    pairs = [torch.cosine_similarity(a - first, b - first, dim=0) for a, b in itertools.combinations(uploads, 2)]
    [record] = [record for record in trainer.state.log_history if "round" in record]
    assert record["update_cosine"] == pytest.approx(float(sum(pairs) / 3), abs=1e-5)
    assert trainer.last_merge.diagnostics["update_cosine"] == record["update_cosine"]


def test_clients_with_the_same_data_have_the_same_updates(tmp_path):
    dataset = classification_dataset(16)
    clients = {"a": dataset, "b": dataset}
    # one batch holds all data, so the order that each client's seed gives it makes no difference
    same = make_trainer(tmp_path, train_dataset=clients, num_clients=None, per_device_train_batch_size=16)
    same.train()
    assert same.history_table()["update_cosine"].tolist() == pytest.approx([1.0, 1.0], abs=1e-4)


def test_one_client_has_no_similarity(tmp_path):
    trainer = make_trainer(tmp_path, clients_per_round=1, num_rounds=1, max_steps=1)
    trainer.train()
    assert "update_cosine" not in trainer.state.log_history[0]
    assert "update_cosine" not in trainer.history_table()


# ---- The table and the plots -----------------------------------------------------


def test_the_table_has_a_row_a_round(run):
    table = run.history_table()
    assert list(table.index) == [0, 1, 2, 3] and table.index.name == "round"
    assert table["clients"].tolist() == [0, 3, 3, 3] and table["failed"].tolist() == [0, 1, 1, 1]
    assert table.loc[1, "uploaded_MB"] == run.state.log_history[1]["upload_bytes"] / 1e6
    assert table.loc[2, "update_cosine"] == run.state.log_history[2]["update_cosine"] < 1
    assert math.isnan(table.loc[0, "train_loss"]) and math.isnan(table.loc[0, "update_cosine"])
    assert table["eval_clients_worst_decile_accuracy"].notna().all()
    assert list(table.columns[-3:]) == ["uploaded_MB", "downloaded_MB", "seconds"]
    assert not [name for name in table.columns if name.endswith(("_runtime", "_per_second"))]
    assert history_table([]).empty


def curve(axes, label):
    [line] = [line for line in axes.lines if line.get_label() == label]
    return line.get_xydata()


def test_the_picture_shows_what_is_in_the_history(run, tmp_path):
    figure = run.plot_history(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 10_000
    rounds, loss, similarity, participation, heads = figure.axes
    history = pd.DataFrame(run.state.log_history)
    np.testing.assert_allclose(curve(rounds, "accuracy, all examples"), history[["round", "eval_accuracy"]])
    np.testing.assert_allclose(curve(loss, "training (local, mean of clients)"), history[["round", "train_loss"]][1:])
    [cosines] = [line.get_xydata() for line in similarity.lines]
    np.testing.assert_allclose(cosines, history[["round", "update_cosine"]][1:])
    [image] = participation.images
    assert image.get_array().tolist() == [[TRAINED] * 3, [FAILED] * 3, [TRAINED] * 3, [TRAINED] * 3]
    assert heads.images[0].get_array().shape == core_norms(run.model).shape
    assert rounds.lines[0].get_color() == BLUE
    assert figure.get_suptitle().splitlines() == [
        "RAVAN adapter, merged by Ravan", "3 clients took part in 3 rounds, and uploaded "
        f"{history['upload_bytes'].sum() / 1e6:.2f} MB, about as much in each",
    ]  # fmt: skip


def records_of(sent, **values) -> list[dict]:
    return [
        {
            "round": number, "clients": ["a"], "failed_clients": [], "upload_bytes": uploaded, "train_loss": 1.0,
            **{name: value[number - 1] for name, value in values.items()},
        }
        for number, uploaded in enumerate(sent, start=1)
    ]  # fmt: skip


def test_megabytes_have_a_column_only_where_they_are_not_rounds_in_another_unit():
    even = plot_history(records_of([1000, 1010, 990, 1000]))
    assert [axes.get_xlabel() for axes in even.axes] == ["round"] * 2
    uneven = plot_history(records_of([1000, 3000, 1000, 0], eval_accuracy=[0.1, 0.2, 0.3, 0.4]))
    accuracy, accuracy_over_megabytes, _, _, _ = uneven.axes
    assert "MB" in accuracy_over_megabytes.get_xlabel() and "each" not in uneven.get_suptitle()
    points = curve(accuracy_over_megabytes, "accuracy, all examples")
    np.testing.assert_allclose(points, [[0.001, 0.1], [0.004, 0.2], [0.005, 0.3], [0.005, 0.4]])
    assert accuracy_over_megabytes.get_ylim() == accuracy.get_ylim()
    uneven.draw_without_rendering()
    left, right = accuracy.get_position(), accuracy_over_megabytes.get_position()
    assert left.width == pytest.approx(right.width) and right.x0 - left.x1 < 0.1 * left.width


def test_panels_are_aligned_and_end_with_the_data():
    history = records_of([1000] * 20, eval_accuracy=[0.5] * 20, update_cosine=[0.01, -0.01] * 10)
    norms = pd.DataFrame(
        np.ones((2, 3)), index=["model.layers.0.a_rather_long_name_of_a_target.query", "model.layers.1"]
    )
    figure = plot_history(history, core_norms=norms)
    figure.draw_without_rendering()
    edges = {(round(box.x0, 4), round(box.x1, 4)) for box in (axes.get_position() for axes in figure.axes)}
    assert len(edges) == 1
    *over_rounds, heads = figure.axes
    assert {axes.get_xlim() for axes in over_rounds} == {(0.5, 20.5)}
    assert {tuple(axes.get_xticks()) for axes in over_rounds} == {tuple(range(2, 21, 2))}
    assert heads.get_ylabel() == "target in model.layers"
    assert [tick.get_text() for tick in heads.get_yticklabels()] == ["0.a_rather_long_…of_a_target.query", "1"]


@pytest.mark.parametrize(
    "first, last, ticks",
    [
        (1, 3, [1, 2, 3]),
        (0, 12, list(range(13))),
        (1, 1, [1]),
        (1, 33, [5, 10, 15, 20, 25, 30, 33]),
        (0, 99, [*range(0, 91, 10), 99]),
    ],
)
def test_rounds_are_whole_numbers_and_the_last_one_is_named(first, last, ticks):
    axes = make_figure(4, 3).subplots()
    show_rounds(axes, first, last)
    assert axes.get_xticks().tolist() == ticks


def test_noise_fills_no_panel():
    """Where the values can be is what is shown, and not where they happen to be."""
    noise = [0.01, -0.02, 0.015]
    figure = plot_history(records_of([1000] * 3, eval_accuracy=[0.50, 0.51, 0.505], update_cosine=noise))
    accuracy, loss, cosine, _ = figure.axes
    assert accuracy.get_ylim() == pytest.approx((-0.03, 1.03)) and cosine.get_ylim() == pytest.approx((-0.05, 1.03))
    assert loss.get_ylim()[0] == 0
    perplexity, *_ = plot_history(records_of([1000] * 3, eval_perplexity=[11.0, 11.1, 10.9])).axes
    assert perplexity.get_ylim()[0] == 0 and perplexity.get_ylim()[1] > 11
    reward, *_ = plot_history(records_of([1000] * 3, eval_reward=[-1.0, 0.2, 0.5])).axes
    assert reward.get_ylim()[0] < -1
    nothing, *_ = plot_history(records_of([1000] * 3, eval_f1=[float("nan")] * 3)).axes
    assert np.isfinite(nothing.get_ylim()).all()


def test_the_size_of_heads_is_that_of_their_products():
    trainer_model = make_trainer("out").model
    layers = [module for module in trainer_model.modules() if hasattr(module, "ravan_s")]
    with torch.no_grad():
        for layer in layers:
            layer.ravan_H["default"].fill_(1.0)  # [3, 4, 4]
            layer.ravan_s["default"].copy_(torch.tensor([0.0, 1.0, -2.0]))
    norms = core_norms(trainer_model)
    assert norms.shape == (len(layers), 3) and list(norms.columns) == [0, 1, 2]
    assert np.all(norms.to_numpy() == [0.0, 4.0, 8.0])
    assert "bert.encoder.layer.0.attention.self.query" in norms.index
    assert core_norms(make_trainer("out", lora()).model) is None


@pytest.mark.parametrize("num_clients, num_rounds", [(3, 2), (20, 20), (200, 200)])
def test_the_picture_can_be_read_whatever_the_size_of_the_federation(num_clients, num_rounds):
    names = [f"client_{index:03d}" for index in range(num_clients)]
    records = [
        {
            "round": number + 1, "clients": names[number % 3 :: 3], "failed_clients": [], "train_loss": 1.0,
            "upload_bytes": 1000,
        }
        for number in range(num_rounds)
    ]  # fmt: skip
    figure = plot_history(records, clients=names)
    loss, axes = figure.axes  # there is neither a metric nor a head
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert min(3, num_clients) <= len(boxes) <= MAX_NAMES
    # the text, without the room below its baseline
    assert all(upper.y0 > lower.y1 - 4 for upper, lower in zip(boxes, boxes[1:], strict=False))
    assert axes.images[0].get_array().shape == (num_clients, num_rounds)


def test_a_client_that_failed_first_and_then_took_part_took_part():
    record = {"round": 1, "clients": ["a"], "failed_clients": [{"client": "a"}, {"client": "b"}]}
    assert participation_of([record], None)[1].to_dict() == {"a": TRAINED, "b": FAILED}


def test_what_cannot_be_drawn_is_said(run):
    with pytest.raises(ValueError, match="There is no round to draw"):
        plot_history([])
    with pytest.raises(ValueError, match="`metric` is 'f1', but the history has accuracy"):
        run.plot_history(metric="f1")


# ---- Loggers ---------------------------------------------------------------------


def test_tensorboard_gets_the_numbers_of_each_round(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    [folder] = [path.parent for path in Path(run.args.output_dir).rglob("events.out.tfevents.*")]
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx({r["round"]: r["train_loss"] for r in run.state.log_history[1:]})
    worst = {event.step: event.value for event in events.Scalars("eval/clients_worst_decile_accuracy")}
    assert worst == pytest.approx({r["round"]: r["eval_clients_worst_decile_accuracy"] for r in run.state.log_history})
    assert not any("client_" in tag for tag in events.Tags()["scalars"])  # names of clients are no numbers


# ---- Progress bars ---------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def bars(tmp_path, monkeypatch, stream, **kwargs) -> list[str]:
    monkeypatch.setattr(sys, "stderr", stream)
    trainer = make_trainer(
        tmp_path, disable_tqdm=False, eval_strategy="epoch", eval_clients=True, max_steps=1, **kwargs
    )
    bar = callbacks.FederatedProgressCallback
    assert [bar] == [type(c) for c in trainer.callback_handler.callbacks if "Progress" in type(c).__name__]
    trainer.train()
    return [line.strip() for line in stream.getvalue().replace("\n", "\r").split("\r") if line.strip("\x1b[A ")]


def test_on_a_terminal_there_are_bars_over_rounds_clients_and_evaluations(tmp_path, monkeypatch):
    lines = bars(tmp_path, monkeypatch, Terminal())
    kinds = ("Rounds", "Clients", "Evaluation of clients")
    assert all(any(line.startswith(f"{kind}:") for line in lines) for kind in kinds)
    [last] = [line for line in lines if line.startswith("Rounds: 100%")][-1:]
    assert "2/2" in last and "<" in last and "eval_accuracy=" in last  # done, time left, the last figures


def test_a_log_file_gets_few_lines(tmp_path, monkeypatch):
    lines = bars(tmp_path, monkeypatch, io.StringIO(), num_rounds=5)
    assert all(line.startswith("Rounds:") for line in lines) and len(lines) <= 3
    assert "5/5" in lines[-1]


def test_the_bars_of_notebooks_are_replaced_too(tmp_path, monkeypatch):
    class NotebookProgressCallback(TrainerCallback):
        """Like that of transformers, which needs an epoch."""

        def on_train_end(self, args, state, control, **kwargs):
            int(state.epoch)

    monkeypatch.setattr(trainer_module, "DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    assert bars(tmp_path, monkeypatch, Terminal())


def test_the_file_is_written_without_bars_and_checkpoints(tmp_path):
    make_trainer(tmp_path, ravan(), num_rounds=1, max_steps=1).train()
    assert [record["round"] for record in read_history(tmp_path)] == [1]


def test_notebooks_show_a_figure_as_a_picture():
    display = pytest.importorskip("IPython.core.formatters").DisplayFormatter()
    shown, _ = display.format(make_figure(2, 1))
    assert shown["image/png"].startswith(b"\x89PNG")
