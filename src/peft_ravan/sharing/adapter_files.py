"""The names of an adapter's files: which files of a folder are shared, and which may be replaced."""

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
# the files that tokenizers and processors of transformers save
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
        `PurePosixPath`: Its contents at any depth, relative to it: files, links of any kind (which are not followed),
        and empty folders.
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
        patterns (`Iterable[str]`): File names, with wildcards.

    Returns:
        `bool`: Whether the path matches one of them, in the same folder.
    """
    return any(len(path.parts) == pattern.count("/") + 1 and path.match(pattern) for pattern in patterns)


def other_files(folder: str | os.PathLike, patterns: Iterable[str] = KNOWN_FILES) -> list[str]:
    """
    Args:
        folder (`str` or `os.PathLike`): A folder.
        patterns (`Iterable[str]`, *optional*): The names of the expected files, by default those of an adapter.

    Returns:
        `list[str]`: All other files at any depth, relative to the folder.
    """
    patterns = tuple(patterns)
    return [str(path) for path in files_of(folder) if not is_one_of(path, patterns)]
