"""The commands and their options."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from .errors import DEBUG, CommandGroup, hide_progress_bars


app = typer.Typer(
    name="peft-ravan",
    cls=CommandGroup,
    help="Federated fine-tuning with adapters: train, merge, inspect and share them.",
    epilog="Example: peft-ravan merge north south west --method fedrpca --out merged",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Adapter = Annotated[
    str, typer.Argument(help="The folder of an adapter, or its name on the Hub (owner/name or owner/name@revision).")
]
Folder = Annotated[Path, typer.Argument(help="The folder of an adapter.")]
License = Annotated[str | None, typer.Option(help="The license, by its name on the Hub, such as apache-2.0.")]
Datasets = Annotated[
    list[str] | None,
    typer.Option("--dataset", help="A dataset on the Hub that it was trained on. Can be given more than once."),
]
Split = Annotated[
    str | None, typer.Option("--split", help="The split of the dataset that it was evaluated on, such as test.")
]
BaseModel = Annotated[
    str | None, typer.Option(help="The base model on the Hub, if the adapter was trained on a folder on this machine.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]


def main(words: Sequence[str] | None = None) -> None:
    """
    Run the command line.

    Args:
        words (`Sequence[str]`, *optional*): The command and its options. By default those of this process.
    """
    words = sys.argv[1:] if words is None else words
    if DEBUG not in words:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app(words)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-ravan {version('peft-ravan')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show tracebacks and the output of other packages.")] = False,
) -> None:
    pass


@app.command(epilog="Example: peft-ravan demo --output-dir outputs/digits")
def demo(
    output_dir: Annotated[Path, typer.Option(help="The folder for the results.")] = Path("outputs/digits"),
    seed: Annotated[int, typer.Option(help="The seed of the data, the model and the clients.")] = 0,
) -> None:
    """Compare LoRA, Ravan and FedRPCA with 20 clients on real data, without a download. Takes a minute or two."""
    try:
        from peft_ravan.trainers.demo.comparison import compare
    except ModuleNotFoundError as error:
        raise ImportError(
            f"The demo needs {error.name}, which comes with an optional extra: pip install 'peft-ravan[demo]'."
        ) from error
    compare(output_dir, seed)


class TrainCommand(TyperCommand):
    """The command with the arguments of a run in its help."""

    def get_help(self, ctx: typer.Context) -> str:
        from peft_ravan.trainers.commands import describe_arguments

        # with rich, typer prints its own part, and returns nothing
        return f"{super().get_help(ctx)}\n{describe_arguments()}".lstrip("\n")


@app.command(
    cls=TrainCommand,
    epilog="Example: peft-ravan train config.yaml --num_rounds 20 --adapter.r 8",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(
    ctx: typer.Context,
    config: Annotated[
        Path, typer.Argument(help="A YAML file with the model, the data, the adapter and the arguments.")
    ],
    overwrite: Overwrite = False,
) -> None:
    """
    Train an adapter in a federation of simulated clients.

    Every argument of the file can also be given on the command line, which takes precedence: --learning_rate 1e-3. They
    are listed below.
    """
    from peft_ravan.trainers.commands import parse_run, train_run

    hide_progress_bars()
    trainer = train_run(parse_run(config, ctx.args), overwrite=overwrite)
    if trainer.is_world_process_zero():
        typer.echo(trainer.history_table().to_string(float_format="{:.4g}".format, na_rep=""))
        typer.echo(f"The adapter, its card and rounds.jsonl are in {trainer.args.output_dir}.")


@app.command(epilog="Example: peft-ravan plan sentence-transformers/all-MiniLM-L6-v2 --budget 250KB --num-labels 4")
def plan(
    model: Annotated[
        str, typer.Argument(help="The base model, on the Hub or in a folder. Only its configuration is read.")
    ],
    budget: Annotated[
        str,
        typer.Option(help="What a client may upload in a round, with the task head, such as 500KB, 1MB or 512KiB."),
    ],
    task: Annotated[
        str | None, typer.Option(help="classification or sft. By default sft for a causal language model.")
    ] = None,
    num_labels: Annotated[
        int | None,
        typer.Option(help="The number of labels of a classifier. By default that of the configuration.", min=1),
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            help="Names of modules, separated by commas, or all-linear. By default those of PEFT for the model."
        ),
    ] = None,
    upload_dtype: Annotated[str, typer.Option(help="The dtype of uploads: float32, bfloat16, int8 or int4.")] = "int4",
    revision: Annotated[str | None, typer.Option(help="The revision of the model on the Hub.")] = None,
) -> None:
    """Show which numbers and ranks of heads fit a budget of bytes that each client uploads in a round."""
    from rich.console import Console

    from peft_ravan.trainers.commands import PlanRequest, plan_uploads, show_plan

    request = PlanRequest(model, budget, task, target_modules, num_labels, upload_dtype, revision)
    show_plan(plan_uploads(request), Console())


def _list_methods(wanted: bool) -> None:
    if wanted:
        from peft_ravan.trainers.commands import describe_methods

        typer.echo(describe_methods())
        raise typer.Exit


@app.command(epilog="Example: peft-ravan merge north south west --method fedrpca --option beta=2 --out merged")
def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(help="Folders of adapters, or their names on the Hub (owner/name or owner/name@revision)."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write the merged adapter to.")],
    method: Annotated[
        str | None, typer.Option(help="The merge method. By default 'ravan' for Ravan and 'fedavg' for LoRA.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the method as name=value. Can be given more than once.")
    ] = None,
    examples: Annotated[
        str | None, typer.Option(help="How many examples each adapter was trained on, such as 120,80,300.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="The adapter that all of them started from, if the method needs it.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base model of all of them, if their configurations name it differently.")
    ] = None,
    overwrite: Overwrite = False,
    list_methods: Annotated[
        bool,
        typer.Option(
            "--list-methods", callback=_list_methods, is_eager=True, help="Show the methods and their options."
        ),
    ] = False,
) -> None:
    """
    Merge Ravan or LoRA adapters that were trained separately.

    They must have the same base model, the same targets and, for Ravan, the same bases.
    """
    from peft_ravan.trainers.commands import MergeRequest, merge_adapters, parse_examples, parse_options

    request = MergeRequest(adapters, method, parse_options(option or ()), parse_examples(examples), start, base_model)
    merged = merge_adapters(request, out, overwrite=overwrite)
    for line in merged.notes:
        typer.echo(line)
    typer.echo(f"The merged adapter and its card are in {out}.")


def _rank(text: str | None) -> int | float | None:
    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither an integer nor a share of the energy such as 0.99.") from error


@app.command(epilog="Example: peft-ravan to-lora outputs/digits/adapter --out outputs/digits/lora")
def to_lora(
    adapter: Adapter,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write the LoRA adapter to.")],
    rank: Annotated[
        str | None,
        typer.Option(
            help="The rank, or the share of the energy to keep, such as 0.99. By default all of it.",
            callback=_rank,
        ),
    ] = None,
    modules_to_save: Annotated[
        bool, typer.Option(help="Whether to save the task head, too. vLLM and llama.cpp need an adapter without it.")
    ] = True,
    overwrite: Overwrite = False,
) -> None:
    """Save a Ravan adapter as its exact twin, a plain LoRA adapter that loads without peft-ravan."""
    from peft_ravan.trainers.commands import save_lora_twin

    config = save_lora_twin(adapter, out, rank, modules_to_save=modules_to_save, overwrite=overwrite)
    typer.echo(f"A LoRA adapter of rank {config.r} and its card are in {out}.")


@app.command(epilog="Example: peft-ravan inspect outputs/digits/adapter --png heads.png")
def inspect(
    adapter: Adapter,
    png: Annotated[Path | None, typer.Option(help="Save a plot of the norms of all heads to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON, with all singular values.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Show what is in an adapter: heads, scalings, ranks, singular values, sizes, and the fingerprint of the bases."""
    from peft_ravan import inspect_adapter
    from peft_ravan.trainers.commands import check_is_free, find_adapter

    if png is not None:
        check_is_free(png, overwrite)
    report = inspect_adapter(find_adapter(adapter))
    if png is not None:
        report.plot(png)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))


@app.command(epilog="Example: peft-ravan card outputs/digits/adapter --license apache-2.0 --overwrite")
def card(
    folder: Folder,
    license: License = None,
    dataset: Datasets = None,
    split: Split = None,
    base_model: BaseModel = None,
    overwrite: Overwrite = False,
) -> None:
    """
    Write the model card of an adapter, README.md, into its folder.

    License, language, datasets and tags are kept from an existing card.
    """
    from peft_ravan.trainers.commands import write_card

    card_data = {"license": license, "datasets": dataset, "dataset_split": split, "base_model": base_model}
    path = write_card(folder, overwrite=overwrite, **card_data)
    typer.echo(f"The card is {path}.")


@app.command(
    epilog="Example: peft-ravan push outputs/digits/adapter owner/digits --with-base-model --license apache-2.0"
)
def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(help="The repository, such as owner/name. Created if it does not exist.")],
    private: Annotated[bool | None, typer.Option(help="Whether to make a new repository private.")] = None,
    revision: Annotated[str | None, typer.Option(help="The branch. By default main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    lora_twin: Annotated[
        bool, typer.Option(help="Whether to upload the LoRA twin of a Ravan adapter, which loads with PEFT alone.")
    ] = True,
    ravan_at_root: Annotated[
        bool,
        typer.Option(
            "--ravan-at-root",
            help="Have the Ravan adapter at the root of the repository and the twin in lora/. By default the twin is at the "
            "root, and the Ravan adapter in ravan/.",
        ),
    ] = False,
    base_model: BaseModel = None,
    with_base_model: Annotated[
        bool,
        typer.Option(
            "--with-base-model", help="Upload the base model, too, if it is a folder on this machine, to REPO_ID-base."
        ),
    ] = False,
    license: License = None,
    dataset: Datasets = None,
    split: Split = None,
) -> None:
    """Upload an adapter to the Hub, with its card, its record and its LoRA twin."""
    from peft_ravan.sharing.hub import Destination
    from peft_ravan.trainers.commands import push_adapter

    hide_progress_bars()
    commit = push_adapter(
        folder,
        Destination(repo_id, private=private, revision=revision, create_pr=create_pr),
        lora_twin=lora_twin,
        ravan_at_root=ravan_at_root,
        with_base_model=with_base_model,
        base_model=base_model,
        license=license,
        datasets=dataset,
        dataset_split=split,
    )
    typer.echo(f"The adapter is at {commit.pr_url or commit.repo_url}.")
    if with_base_model:
        typer.echo(f"Its base model is at {commit.repo_url}-base.")


@app.command(epilog="Example: peft-ravan new-app hospitals")
def new_app(
    folder: Annotated[Path, typer.Argument(help="A new folder, whose name has letters, digits and hyphens.")],
) -> None:
    """
    Write an app of Flower, which runs a federation across machines.

    It can be started as it is. Put your own model, data and arguments into federation.py.
    """
    from peft_ravan.trainers.commands import write_app

    write_app(folder)
    typer.echo(f"The app is in {folder}. Your model, data and arguments go into {folder / 'federation.py'}.")
