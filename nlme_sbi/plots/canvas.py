"""Shared by all figures: a canvas without pyplot's global state, its PNG file, colours, and axis labels with units."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nlme_sbi.parameters import ParameterSpace

# Okabe and Ito (2008): distinguishable with every common kind of colour blindness.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
BLACK, GREY, PALE = "#222222", "#777777", "#D5D8DC"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
TEXT_SIZE = 8.0
PAPER_WIDTH = 7.0  # inches, two columns of a journal page
_DOLLAR = re.compile(r"(?<!\\)\$")


def canvas(
    rows: int, columns: int, *, width: float = PAPER_WIDTH, row_height: float = 1.7
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with ``rows`` by ``columns`` axes, always a list of rows, text readable at paper width."""
    figure = Figure(figsize=(width, rows * row_height), layout="constrained")
    axes: list[list[Axes]] = figure.subplots(rows, columns, squeeze=False).tolist()
    for ax in chain.from_iterable(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=TEXT_SIZE - 1, length=2.5)
        ax.xaxis.label.set_fontsize(TEXT_SIZE)
        ax.yaxis.label.set_fontsize(TEXT_SIZE)
        ax.title.set_fontsize(TEXT_SIZE)
    return figure, axes


def save_png(figure: Figure, file: Any, *, dpi: float = 150) -> None:
    """Write a PNG file: the bytes of ``figure.savefig``, which draws everything once more to know its layout."""
    figure.set_dpi(dpi)
    drawn = FigureCanvasAgg(figure)
    drawn.draw()  # type: ignore[no-untyped-call]
    image.imsave(file, drawn.buffer_rgba(), format="png", origin="upper", dpi=dpi)  # type: ignore[no-untyped-call]


def set_panel_title(ax: Axes, title: str) -> None:
    """A short title just above a panel; at a place of its own, which Matplotlib need not look for among the ticks."""
    ax.set_title(title, fontsize=TEXT_SIZE, pad=2, y=1.0)


def panels(count: int, *, columns: int = 4, row_height: float = 1.7) -> tuple[Figure, list[Axes]]:
    """``count`` axes in reading order; the places left over in the last row are removed."""
    across = min(columns, count)
    figure, axes = canvas(math.ceil(count / across), across, row_height=row_height)
    in_order = list(chain.from_iterable(axes))
    for ax in in_order[count:]:
        ax.remove()
    return figure, in_order[:count]


def legend_above(figure: Figure, ax: Axes, *, columns: int = 4) -> None:
    """One legend for the whole figure, above it, where it covers no data; each label once."""
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        figure.legend(
            list(unique.values()),
            list(unique),
            loc="outside upper center",
            ncols=min(columns, len(unique)),
            fontsize=TEXT_SIZE,
            frameon=False,
        )


def parameter_labels(parameters: ParameterSpace) -> tuple[str, ...]:
    """Axis labels of unconstrained parameters: ``log ka (1/h)``, the unit being that of the natural value."""
    prefixes = {"log": "log ", "logit": "logit ", "identity": ""}
    return tuple(prefixes[p.transform] + label_with_unit(p.name, p.unit) for p in parameters.parameters)


def label_with_unit(name: str, unit: str) -> str:
    """``name (unit)``, or the name alone where there is no unit; both as they are, as :func:`data_text`."""
    return data_text(f"{name} ({unit})" if unit else name)


def data_text(words: str) -> str:
    r"""Words from data (ids, names, units, levels) as they are: Matplotlib would read what stands between two ``$`` as
    mathematics, and refuse ``$1_$2``. Words that went through here before stay as they are."""
    return _DOLLAR.sub(r"\$", words)


def require_names(names: Sequence[str], columns: int) -> None:
    """Refuse names that do not fit the number of parameters."""
    if len(names) != columns:
        raise ValueError(f"{len(names)} names {list(names)} for {columns} parameters; give one name for each.")
