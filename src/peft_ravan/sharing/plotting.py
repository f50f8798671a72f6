"""Shared by all plots of this package. matplotlib is an optional dependency and is imported only when needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


# per axis; with more names, only some at equal distances are shown
MAX_NAMES = 60


def make_figure(width: float, height: float) -> Figure:
    """
    Args:
        width (`float`): In inches.
        height (`float`): In inches.

    Returns:
        `matplotlib.figure.Figure`: An empty figure without a window.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which comes with an optional extra: pip install 'peft-ravan[plot]'."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def name_ticks(axis: Axis, names: Sequence[str], **text) -> None:
    """
    Args:
        axis (`matplotlib.axis.Axis`): The axis. The names are placed at 0, 1, 2, ...
        names (`Sequence[str]`): The names.
        **text: Text properties of the labels.
    """
    every = math.ceil(len(names) / MAX_NAMES)
    axis.set_ticks(range(0, len(names), every), names[::every], fontsize=8, **text)
