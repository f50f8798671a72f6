"""The one style of all plots of this package. matplotlib is an optional dependency and is imported only when needed."""

from __future__ import annotations

import functools
import io
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#d9660a", "#2e8b57", "#8a8a8a"
# of curves, in this order
COLOURS = (BLUE, ORANGE, GREEN, "#7d4fa3", "#b8860b", GREY)
# in every heat map the brightest cell is the largest, and what is not there is darker than the smallest
_HEAT, _NOTHING = "viridis", "black"
_SMALL = 8
# per axis; with more names, only some at equal distances are shown
MAX_NAMES = 60
MAX_ROUND_TICKS = 12
# curves with at most this many points get markers
MAX_MARKED = 30


def make_figure(width: float, height: float, title: str | None = None) -> Figure:
    """
    Args:
        width (`float`): In inches.
        height (`float`): In inches.
        title (`str`, *optional*): The title of the whole figure, which says what it shows.

    Returns:
        `matplotlib.figure.Figure`: An empty figure without a window. Notebooks show it as a picture.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which comes with an optional extra: pip install 'peft-ravan[plot]'."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    # Notebooks show the figures of pyplot, which keeps each of them in memory, and ask any other object for this.
    figure._repr_png_ = functools.partial(_as_png, figure)
    if title is not None:
        figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=11)
    return figure


def _as_png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=90)
    return picture.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike | None) -> None:
    """
    Args:
        figure (`matplotlib.figure.Figure`): The plot.
        path (`str` or `os.PathLike`, *optional*): Where to save it, if anywhere. The extension determines the format.
    """
    if path is not None:
        figure.savefig(path, dpi=150)


def marker(num_points: int) -> str | None:
    """
    Args:
        num_points (`int`): The number of points of a curve.

    Returns:
        `str`: The marker of its points, or `None` if there are too many.
    """
    return "." if num_points <= MAX_MARKED else None


def style_curves(axes: Axes) -> None:
    """
    Args:
        axes (`matplotlib.axes.Axes`): Axes with curves or bars.
    """
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(axes: Axes, **kwargs) -> None:
    """
    Args:
        axes (`matplotlib.axes.Axes`): Axes. The legend is above them, where it hides nothing.
        **kwargs: As for `matplotlib.axes.Axes.legend`.
    """
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, **kwargs}
    axes.legend(ncols=10, fontsize=_SMALL, frameon=False, **place).set_in_layout(False)  # wide ones would part panels
    axes.set_title(" ", fontsize=_SMALL)  # makes room


def show_rounds(axes: Axes, first: int, last: int) -> None:
    """
    Let an axis count rounds: in whole numbers, from the first to the last one.

    Args:
        axes (`matplotlib.axes.Axes`): Axes whose x axis counts rounds.
        first (`int`): The first round.
        last (`int`): The last round.
    """
    step = next(step for step in _steps() if (last - first) / step <= MAX_ROUND_TICKS)
    ticks = [number for number in range(first, last) if number % step == 0 and last - number >= step / 2]
    axes.set(xlabel="round", xlim=(first - 0.5, last + 0.5), xticks=[*ticks, last])


def _steps() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    for power in itertools.count():
        yield from (10**power, 2 * 10**power, 5 * 10**power)


def draw_heat_map(axes: Axes, values: np.ndarray, label: str, norm: Normalize | None = None, **colorbar) -> AxesImage:
    """
    Draw a table as colours. The brightest cell is the largest. Masked cells and NaN are black.

    Args:
        axes (`matplotlib.axes.Axes`): The axes.
        values (`np.ndarray`): `[rows, columns]`.
        label (`str`): What the colours mean.
        norm (`matplotlib.colors.Normalize`, *optional*): By default from 0 to the largest value.
        **colorbar: As for `matplotlib.figure.Figure.colorbar`.

    Returns:
        `matplotlib.image.AxesImage`: The heat map.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    values = np.ma.masked_invalid(values)
    norm = norm or Normalize(0, values.max() or 1)  # an adapter that is not trained is zero everywhere
    colours = colormaps[_HEAT].with_extremes(bad=_NOTHING)
    image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    # beside the axes and not taken from them, so that all panels of a figure stay aligned
    place = axes.inset_axes((1.015, 0, 0.02, 1))
    label = f"{label} (black: none)" if np.ma.getmaskarray(values).any() else label
    axes.figure.colorbar(image, cax=place, label=label, **colorbar).minorticks_off()
    return image


def name_ticks(axis: Axis, names: Sequence[object], **text) -> None:
    """
    Args:
        axis (`matplotlib.axis.Axis`): The axis. The names are placed at 0, 1, 2, ...
        names (`Sequence[object]`): The names.
        **text: Text properties of the labels.
    """
    every = math.ceil(len(names) / MAX_NAMES)
    axis.set_ticks(range(0, len(names), every), [str(name) for name in names[::every]], fontsize=_SMALL, **text)
