"""The files of an adapter by their names, in one place: what is shared of a folder, and what may be replaced in one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .federation_record import FACTS_FILE, HISTORY_FILE, PLOT_FILE


CARD_FILE = "README.md"
TWIN_FOLDER = "lora"
ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
RECORD_FILES = (FACTS_FILE, HISTORY_FILE, PLOT_FILE)
# as tokenizers and processors of transformers save themselves
PROCESSING_FILES = (
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "sentencepiece*.model", "*.spm", "chat_template.*", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json", "*_preprocessor_config.json",
)  # fmt: skip
TWIN_FILES = tuple(f"{TWIN_FOLDER}/{name}" for name in ADAPTER_FILES)
KNOWN_FILES = (*ADAPTER_FILES, CARD_FILE, *RECORD_FILES, *TWIN_FILES, *PROCESSING_FILES)


def files_of(folder: str | os.PathLike) -> Iterator[PurePosixPath]:
    """
    Args:
        folder (`str` or `os.PathLike`): A folder.

    Yields:
        `PurePosixPath`: What is in it and below it, relative to it: files, links of any kind, which are not followed, and
        folders without anything in them.
    """
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        here = PurePosixPath(Path(root).relative_to(folder).as_posix())
        yield from (here / name for name in sorted([*files, *links]))
        if not folders and not files and here != PurePosixPath("."):
            yield here


def is_one_of(path: PurePosixPath, patterns: Iterable[str]) -> bool:
    """
    Args:
        path (`PurePosixPath`): The path of a file, relative to the folder of an adapter.
        patterns (`Iterable[str]`): Names of files, with wildcards.

    Returns:
        `bool`: Whether it has one of these names, in the same folder.
    """
    return any(len(path.parts) == pattern.count("/") + 1 and path.match(pattern) for pattern in patterns)


def other_files(folder: str | os.PathLike, patterns: Iterable[str] = KNOWN_FILES) -> list[str]:
    """
    Args:
        folder (`str` or `os.PathLike`): A folder.
        patterns (`Iterable[str]`, *optional*): The names of files that belong there, by default those of an adapter.

    Returns:
        `list[str]`: What else is in it and below it, relative to it.
    """
    patterns = tuple(patterns)
    return [str(path) for path in files_of(folder) if not is_one_of(path, patterns)]
