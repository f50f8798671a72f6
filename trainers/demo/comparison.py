"""Three ways to adapt a model are compared on the digits of the demo: in a table, and in a plot."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from peft_ravan.sharing.plotting import (
    COLOURS,
    legend_above,
    make_figure,
    marker,
    save_figure,
    show_rounds,
    style_curves,
)

from . import digits


def show_table(results: list[digits.Result], plan: digits.Plan, console: Console) -> None:
    table = Table(title=str(plan))
    last = f"mean of\nlast {min(digits.LAST_ROUNDS, plan.num_rounds)}"
    # in 80 columns, only the names of methods are broken, and no word is cut
    table.add_column("method")
    for column in ("before", "after", last, "worst\ndecile of\nclients", "MB\nuploaded", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        uploaded = sum(record.get("upload_bytes", 0) for record in result.history)
        curve = result.curve()
        table.add_row(
            result.name,
            f"{curve[0]:.1%}",
            f"{curve[-1]:.1%}",
            f"{result.last_rounds():.1%}",
            f"{result.worst_decile:.1%}",
            f"{uploaded / 1e6:.2f}",
            f"{result.seconds:.0f}",
        )
    console.print(table)


def plot(results: list[digits.Result], plan: digits.Plan, path: Path) -> None:
    figure = make_figure(7, 4.5, f"Three ways to adapt a vision transformer to rotated digits\n{plan}")
    axes = figure.subplots()
    for result, colour in zip(results, COLOURS, strict=False):
        curve = [100 * value for value in result.curve()]
        axes.plot(curve, label=result.name, color=colour, marker=marker(len(curve)))
    axes.set(ylabel="accuracy on the clients' test images (%)", ylim=(0, 100))
    show_rounds(axes, 0, plan.num_rounds)
    style_curves(axes)
    legend_above(axes)
    save_figure(figure, path)


def compare(output_dir: Path, seed: int) -> None:
    """
    Run the demo, with its output on the terminal.

    Args:
        output_dir (`Path`): The folder for the base model, the best adapter and the plots.
        seed (`int`): The seed of the data, the model and the clients.
    """
    digits.silence_libraries()
    # a model this small is not faster on two cores, and the results do not depend on their number this way
    torch.set_num_threads(1)
    console = Console()

    public, private = digits.load_data(seed)
    console.print(f"Pretraining on {len(public)} public images: the digits 0 to 6, upright.")
    base_dir = digits.pretrain(public, output_dir, seed)
    plan, results = digits.Plan(), []
    console.print(f"{plan.num_clients} clients hold {len(private)} other images: all ten digits, turned by a quarter.")

    for method in digits.methods():
        console.print(f"\n[bold]{method.name}[/bold]")
        args = digits.arguments(method, output_dir / "run", seed, plan)
        results.append(digits.run(method, base_dir, private, args))
    console.print()
    show_table(results, plan, console)
    console.print(
        "Another processor rounds differently, and the same seed then gives figures that differ by some points."
    )

    plot_path = output_dir / "accuracy.png"
    plot(results, plan, plot_path)
    best = max(results, key=digits.Result.last_rounds)
    adapter_dir = output_dir / "adapter"
    reloaded = digits.save_and_reload(best, base_dir, adapter_dir)
    console.print(f"Plot: {plot_path}")
    history_path = output_dir / "history.png"
    best.trainer.plot_history(history_path)
    console.print(f"What happened in the rounds of {best.name}: {history_path}")
    console.print(f"Best adapter, with its card: {adapter_dir} ({best.name})")
    console.print(f"Loaded into a fresh base model it scores {reloaded:.1%}, as before: {best.curve()[-1]:.1%}.")
    console.print(f"Share it: peft-ravan push {adapter_dir} YOUR-NAME/digits --with-base-model --license apache-2.0")
    if reloaded != best.curve()[-1]:
        raise SystemExit("The reloaded adapter does not score the same.")
