"""
The command line, `peft-ravan`.

This package defines the commands and their options, and shows errors in one line. The work is done in `peft_ravan` and
`peft_ravan.trainers.commands`, which are imported only when a command runs, so that `--help` does not wait for torch.
"""

from .app import app, main


__all__ = ["app", "main"]
