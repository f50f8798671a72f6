"""Data sets for benchmarks, from a folder or from the Hub."""

from __future__ import annotations

from pathlib import Path

import datasets


def load_splits(source: str) -> datasets.DatasetDict:
    """
    Args:
        source (`str`): A folder with train.parquet and test.parquet, or a Hub id.

    Returns:
        `datasets.DatasetDict`: Its splits.
    """
    folder = Path(source)
    if not folder.is_dir():
        return datasets.load_dataset(source)
    return datasets.load_dataset(
        "parquet", data_files={split: str(folder / f"{split}.parquet") for split in ("train", "test")}
    )


def label_column(rows: datasets.Dataset) -> str:
    """The first column with classes."""
    return next(name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel))


def text_column(rows: datasets.Dataset) -> str:
    """The column with texts, by its usual names."""
    return next(name for name in ("text", "sentence", "utterance") if name in rows.features)
