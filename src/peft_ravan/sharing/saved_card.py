"""The card of a Ravan adapter that PEFT saves, with `model.save_pretrained` or `Trainer.save_model`."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from huggingface_hub import ModelCard
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..tuner.config import RavanConfig
from .adapter_files import CARD_FILE
from .card_metadata import listed, name_on_hub
from .labels import label_names, write_label_names
from .model_card import card_of_folder


# a heading of our template, and what the templates of PEFT and huggingface_hub have for people to fill in
_OURS, _UNWRITTEN = "## What this card does not know", "[More Information Needed]"

_LEFT_TO_CALLER: ContextVar[str | None] = ContextVar("left_to_caller", default=None)


@contextlib.contextmanager
def card_is_left_to_caller(folder: str | os.PathLike) -> Iterator[None]:
    """
    A context in which nothing is written beside the adapter that PEFT saves to a folder, because the caller will write a
    card that says more. The card has the SHA-256 of the weights, which takes long for large ones.

    Args:
        folder (`str` or `os.PathLike`): The folder.
    """
    token = _LEFT_TO_CALLER.set(os.path.abspath(folder))
    try:
        yield
    finally:
        _LEFT_TO_CALLER.reset(token)


def write_saved_card(config: RavanConfig, folder: Path) -> None:
    """
    Write the card and the names of the labels beside an adapter that PEFT has just saved. PEFT's own card, which is empty,
    and an earlier one of this package are replaced. A card that somebody has written is kept; only its metadata are
    completed, and a base model that is a local folder is taken out of them.

    Args:
        config ([`RavanConfig`]): The configuration of the adapter.
        folder (`Path`): The folder that it was saved to. If PEFT has not saved a model there, nothing is done.
    """
    path = folder / CARD_FILE
    if os.path.abspath(folder) == _LEFT_TO_CALLER.get():
        return
    # PEFT writes its card before the weights, and for adapters in subfolders only into the folder above them
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file() or not (
        path.is_file() or (folder.parent / CARD_FILE).is_file()
    ):
        return
    write_label_names(folder, label_names(config.base_model_config))
    try:
        if path.is_file() and not _is_generated(path):
            _complete_metadata(path)
        else:
            card_of_folder(folder).save(path)
    # what an earlier run or somebody else has left in the folder must not keep a model from being saved
    except ValueError as error:
        warnings.warn(f"The adapter is saved, but its card could not be written. {error}")


def _is_generated(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    return _OURS in text or _UNWRITTEN in text


def _complete_metadata(path: Path) -> None:
    card = ModelCard.load(path, ignore_metadata_errors=True)
    tags = [tag for tag in listed(card.data.get("tags")) if not tag.startswith("base_model:")]
    card.data["tags"] = list(dict.fromkeys(["ravan", "peft-ravan", *tags]))
    card.data["library_name"] = "peft"
    if name_on_hub(card.data.get("base_model")) is None:
        card.data.pop("base_model", None)
    card.save(path)
