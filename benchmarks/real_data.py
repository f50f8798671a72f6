"""Data sets for benchmarks, from a folder or from the Hub."""

from __future__ import annotations

from pathlib import Path

import datasets


def load_splits(source: str, subset: str | None = None, test_split: str = "test") -> datasets.DatasetDict:
    """
    Args:
        source (`str`): A folder with train.parquet and test.parquet, or a Hub id.
        subset (`str`, *optional*): The subset of a data set on the Hub. By default its only one.
        test_split (`str`, *optional*, defaults to `"test"`): The split on the Hub that takes the place of `test`, where the
            labels of the latter are not published.

    Returns:
        `datasets.DatasetDict`: Its splits `train` and `test`. Labels that are integers are made classes.
    """
    folder = Path(source)
    if not folder.is_dir():
        train, test = datasets.load_dataset(source, subset, split=["train", test_split])
        return with_classes(datasets.DatasetDict(train=train, test=test))
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "test")}
    return with_classes(datasets.load_dataset("parquet", data_files=files))


def with_classes(splits: datasets.DatasetDict) -> datasets.DatasetDict:
    """
    Make the labels of a data set classes if they are plain integers, as in many data sets on the Hub.

    Args:
        splits (`datasets.DatasetDict`): The data. A column `label_text` has the names of the classes, if there is one.

    Returns:
        `datasets.DatasetDict`: The data with a column of classes, or as it is, if it has one or has no integers in
        `label` or `labels`.
    """
    features = splits["train"].features
    if any(isinstance(feature, datasets.ClassLabel) for feature in features.values()):
        return splits
    column = next((name for name in ("label", "labels") if name in features), None)
    if column is None or not str(getattr(features[column], "dtype", "")).startswith(("int", "uint")):
        return splits
    number = 1 + max(max(rows[column]) for rows in splits.values())
    names = {label: str(label) for label in range(number)}
    if "label_text" in features:
        names |= dict(zip(splits["train"][column], splits["train"]["label_text"], strict=True))
    return splits.cast_column(column, datasets.ClassLabel(names=list(names.values())))


def label_column(rows: datasets.Dataset) -> str:
    """The first column with classes."""
    return next(name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel))


def text_column(rows: datasets.Dataset) -> str:
    """The column with texts, by its usual names."""
    return next(name for name in ("text", "sentence", "utterance") if name in rows.features)
