"""Style of all figures: colours, type size, axes, and how numbers are written.

The colours are those of Okabe and Ito, which readers with colour vision deficiencies can tell apart. Line styles make
the same distinctions for print in grey.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE)
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 1, 1, 1)), (0, (3, 1)))
GREY = "#555555"
NEUTRAL = ("#222222", "#666666", "#999999")
"""Greys of curves that belong to no method: in a report a colour stands for a method throughout."""
FONT = 9.0


NARROW = 4.4  # inches: on a phone, where a figure is scaled to the width of the screen, 9 points are then readable


class Look(NamedTuple):
    """Colour and line style of a method in all figures.

    Attributes
    ----------
    colour
        As matplotlib names it.
    line_style
        The same distinction, for print in grey.
    """

    colour: str
    line_style: Any


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Give each method a look of its own, in order. Figures that get the same looks show a method in one colour.

    Parameters
    ----------
    names
        All methods of a report. From the seventh on, colours come again with other line styles.
    """
    count = len(PALETTE)
    return {
        name: Look(PALETTE[n % count], LINE_STYLES[(n + n // count) % count])
        for n, name in enumerate(dict.fromkeys(names))
    }


def looks_of(methods: Iterable[str], given: Mapping[str, Look] | None) -> dict[str, Look]:
    """Return the look of each method to be drawn, or raise ValueError if looks are given and one has none."""
    methods = list(methods)
    if given is None:
        return looks(methods)
    if missing := [name for name in methods if name not in given]:
        raise ValueError(
            f"looks must have every method; got none for {missing}; call plots.looks with all names of the report"
        )
    return {name: given[name] for name in methods}


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    """Make a figure, in inches, that pyplot does not know of."""
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def finish(panel: Axes, ylabel: str, xlabel: str = "") -> None:
    """Label the axes, draw a faint grid, and remove the frame above and on the right."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#dddddd", lw=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=FONT)
    panel.set_ylabel(ylabel, fontsize=FONT)
    panel.set_xlabel(xlabel, fontsize=FONT)


def number(value: float) -> str:
    """Write a number with two significant digits and without powers of ten: 0.083, 1.7, 560, 1,800."""
    return _plain(f"{value:.2g}")


def tick(value: float | np.integer, position: int | None) -> str:  # as matplotlib calls a formatter
    """Write the number of a tick without powers of ten and with a proper minus sign."""
    return _plain(f"{value:.10g}").replace("-", "\N{MINUS SIGN}")


def _plain(text: str) -> str:
    """Write a number that may have a power of ten without it, and with commas between thousands."""
    number = Decimal(text)
    return f"{number:,f}" if number.is_finite() else text


def log_axis(panel: Axes) -> None:
    """Make the vertical axis logarithmic if its values differ by more than a factor of three.

    Ticks are plain numbers: 1, 2 and 5 times powers of ten, or over many decades the powers alone.
    """
    low, high = panel.dataLim.intervaly
    if not 0 < 3 * low < high:  # a logarithmic axis would show nothing that a linear one does not
        return
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,), numticks=9))
    panel.yaxis.set_major_formatter(FuncFormatter(tick))
    panel.yaxis.set_minor_formatter(NullFormatter())
