"""Shows errors in one readable line, and silences other packages."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

import typer
from typer.core import TyperGroup


try:
    from typer import TyperException as UsageError
except ImportError:  # releases below 0.21, which Flower needs, leave usage errors to click
    from click import ClickException as UsageError


DEBUG = "--debug"
# the messages of these errors say what is wrong; for other errors, the type is shown, too
EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError)
# installed quantisation packages report what they do without a GPU; torch and peft report future renamings
NOISY_LOGGERS = ("bitsandbytes", "peft", "torch.utils._pytree", "torchao")


class CommandGroup(TyperGroup):
    """
    Commands that show errors as one line on stderr, with exit code 1. `--debug` may be anywhere in the command line.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        ctx.meta[DEBUG] = DEBUG in args
        return super().parse_args(ctx, [arg for arg in args if arg != DEBUG])

    def invoke(self, ctx: typer.Context):
        if ctx.meta[DEBUG]:
            return super().invoke(ctx)
        try:
            with quiet():
                return super().invoke(ctx)
        # the first two are normal ways to end a command, the third is a usage error
        except (typer.Exit, typer.Abort, UsageError):
            raise
        except Exception as error:
            typer.echo(f"Error: {in_one_line(error)}", err=True)
            raise typer.Exit(1) from error


def in_one_line(error: Exception) -> str:
    """
    Args:
        error (`Exception`): An error.

    Returns:
        `str`: Its message, in one line.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if not isinstance(error, EXPECTED) or not text:
        text = f"{type(error).__name__}: {text} (with {DEBUG} there is more)"
    return " ".join(text.split())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context in which this package's warnings are one line on stderr, and those of other packages are hidden."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"peft_ravan\b")
        warnings.showwarning = _show_warning
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def hide_progress_bars() -> None:
    """Hide progress bars if stderr is a file or a pipe, where they would take many lines."""
    if not sys.stderr.isatty():
        import datasets
        import huggingface_hub.utils
        import transformers

        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def _show_warning(message, *args, **kwargs) -> None:
    typer.echo(f"Warning: {' '.join(str(message).split())}", err=True)
