"""What all figures share: colours, type size, axes, and numbers as they are written on them.

Colours are those of Okabe and Ito, distinguishable with colour vision deficiencies; line styles carry the same
distinctions for print in grey.
"""

from collections.abc import Iterable, Sequence
from typing import Any

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
    """A figure of its own, in inches, that pyplot knows nothing of."""
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def cycle(values: Sequence[Any]) -> Iterable[Any]:
    """The values over and over."""
    while True:
        yield from values


def finish(panel: Axes, ylabel: str, xlabel: str = "") -> None:
    """Labels, a faint grid, and no frame above and on the right."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#dddddd", lw=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=FONT)
    panel.set_ylabel(ylabel, fontsize=FONT)
    panel.set_xlabel(xlabel, fontsize=FONT)


def number(value: float) -> str:
    """Two digits that count, and no powers of ten: 0.083, 1.7, 560, 1,800."""
    return f"{float(f'{value:.2g}'):,.10g}"


def tick(value: float, _: int) -> str:
    """A tick's number as it is written: no powers of ten, a proper minus sign."""
    return f"{value:,.10g}".replace("-", "\N{MINUS SIGN}")


def log_axis(panel: Axes) -> None:
    """Ticks in plain numbers at 1, 2, 5 times powers of ten, at the powers alone over many decades; not for less
    than a factor of three, where a logarithmic axis shows nothing that a linear one does not."""
    low, high = panel.dataLim.intervaly
    if not 0 < 3 * low < high:
        return
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,), numticks=9))
    panel.yaxis.set_major_formatter(FuncFormatter(tick))
    panel.yaxis.set_minor_formatter(NullFormatter())
