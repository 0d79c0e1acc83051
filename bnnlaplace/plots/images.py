"""Figure of single images in groups, each with its label and what some methods predict for it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnnlaplace.core.types import AnyArray
from bnnlaplace.plots.style import FONT, GREY, NARROW, Look, looks_of, new_figure

_COLUMNS, _LONGEST = 3, 11  # pictures in a row, and how many letters of a class name have room below one


class Guess(NamedTuple):
    """What a method predicts for an image.

    Attributes
    ----------
    name
        The predicted class.
    probability
        Its probability.
    """

    name: str
    probability: float


class Picture(NamedTuple):
    """One image with its class and what each method predicts.

    Attributes
    ----------
    image
        Pixels from 0 to 255, (H, W, 1) or (H, W, 3).
    name
        Its class.
    guesses
        By method.
    """

    image: Shaped[AnyArray, "H W K"]
    name: str
    guesses: Mapping[str, Guess]


def picture_groups(groups: Mapping[str, Sequence[Picture]], looks: Mapping[str, Look] | None = None) -> Figure:
    """Draw groups of images, one group below the other.

    Parameters
    ----------
    groups
        By title. All pictures have guesses of the same methods.
    looks
        The colour of each method; by default by their order. See `bnnlaplace.plots.looks`.

    Returns
    -------
    Figure
        Below each image its class, and for each method in its colour the predicted class with its probability; a wrong
        one has a cross. The legend names the methods.

    Raises
    ------
    ValueError
        If there is no picture, or looks are given and a method has none.
    """
    pictures = [picture for group in groups.values() for picture in group]
    if not pictures:
        raise ValueError(f"groups must hold at least one picture; got none in {list(groups)}; leave the figure out")
    styles = looks_of(pictures[0].guesses, looks)
    rows = {title: -(-len(group) // _COLUMNS) for title, group in groups.items() if group}
    side, line, title_height, legend = 1.0, 0.165, 0.42, 0.2 * len(styles) + 0.15
    row_height = side + line * (len(styles) + 1) + 0.22
    height = legend + title_height * len(rows) + row_height * sum(rows.values())
    figure = new_figure(NARROW, height, layout="none")
    top = height - legend
    for title, count in rows.items():
        figure.text(0.1 / NARROW, (top - 0.26) / height, title, fontsize=FONT, fontweight="bold")
        top -= title_height
        for position, picture in enumerate(groups[title]):
            row, column = divmod(position, _COLUMNS)
            left, low = 0.1 + NARROW / _COLUMNS * column, top - row_height * row - side
            panel = figure.add_axes((left / NARROW, low / height, side / NARROW, side / height))
            _draw(panel, picture, styles, line / side)
        top -= row_height * count
    for position, (name, look) in enumerate(styles.items()):
        low = height - 0.24 - 0.2 * position
        figure.text(0.1 / NARROW, low / height, name, fontsize=FONT, color=look.colour, fontweight="bold")
    return figure


def _draw(panel: Axes, picture: Picture, styles: Mapping[str, Look], line: float) -> None:
    """Draw one image and the lines below it; `line` is their distance in sides of the image."""
    image = np.asarray(picture.image)
    is_grey = image.shape[-1] == 1
    panel.imshow(image[..., 0] if is_grey else image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_color(GREY)
    words = [(f"class {_cut(picture.name)}", "black")]
    for method, look in styles.items():
        guess = picture.guesses[method]
        mark = "" if guess.name == picture.name else " \N{MULTIPLICATION SIGN}"
        words.append((f"{_cut(guess.name)}, {_percent(guess.probability)}{mark}", look.colour))
    for number, (text, colour) in enumerate(words):
        panel.text(0, -0.06 - line * number, text, transform=panel.transAxes, fontsize=FONT, color=colour, va="top")


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def _percent(probability: float) -> str:
    """Write a probability in percent; what is not one is not rounded to it."""
    if probability < 1 and f"{100 * probability:.0f}" == "100":
        return ">99 %"
    return f"{100 * probability:.0f} %"
