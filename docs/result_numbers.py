"""How numbers are written in the tables of results."""

from collections.abc import Callable, Sequence
from decimal import Decimal


def digits(value: float | None, count: int = 3) -> str:
    """Write a number with at most `count` digits that count, and without powers of ten."""
    return "–" if value is None else f"{Decimal(f'{value:.{count}g}'):,f}"


def spread(values: Sequence[float] | None, written: Callable[[float], str] = "{:.3f}".format) -> str:
    """Write a mean with the lowest and the highest value."""
    if values is None:
        return "–"
    mean, low, high = map(written, values)
    return f"{mean} [{low},\N{NO-BREAK SPACE}{high}]"


def cost(seconds: float | None, megabytes: float | None) -> str:
    """Write seconds and megabytes of one program."""
    if seconds is None:
        return "–"
    time = f"{1e3 * seconds:.1f} ms" if seconds < 0.5 else f"{digits(seconds)} s"
    if megabytes is None:
        return time
    return f"{time}, {megabytes:,.0f} MB" if megabytes >= 50 else f"{time}, {megabytes:.1f} MB"


def ratio(numerator: float | None, denominator: float | None) -> str:
    """Write a quotient, or a dash if one of the numbers is missing."""
    return "–" if numerator is None or denominator is None else digits(numerator / denominator, 2)
