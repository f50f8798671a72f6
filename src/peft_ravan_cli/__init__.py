"""
The command line, `peft-ravan`.

It says what can be typed, and tells errors in one line; what the commands do is in `peft_ravan` and
`peft_ravan.trainers.commands`, which they import when they run. So `--help` does not wait for torch.
"""

from .app import app, main


__all__ = ["app", "main"]
