"""Style of all figures: colours, type size, axes, and how numbers are written.

The colours are those of Okabe and Ito, which readers with colour vision deficiencies can tell apart. Line styles make
the same distinctions for print in grey.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE)
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 1, 1, 1)), (0, (3, 1)))
GREY = "#555555"
FONT = 9.0


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
    return f"{float(f'{value:.2g}'):,.10g}"


def tick(value: float | np.integer, position: int | None) -> str:  # as matplotlib calls a formatter
    """Write the number of a tick without powers of ten and with a proper minus sign."""
    return f"{value:,.10g}".replace("-", "\N{MINUS SIGN}")


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
