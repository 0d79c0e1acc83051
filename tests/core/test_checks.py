"""Checks of arguments: what they accept, what their messages say, and which line a warning names."""

import linecache
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnnlaplace.core import checks
from bnnlaplace.core.types import NotAModeWarning


def refusals(check, table):
    """The cases of a table {name: (arguments, options, message)} that are not refused with their message."""
    wrong = {}
    for name, (arguments, options, message) in table.items():
        try:
            check(*arguments, **options)
        except ValueError as error:
            if str(error) != message:
                wrong[name] = str(error)
        else:
            wrong[name] = "accepted"
    return wrong


def test_one_positive_number():
    for value in (1, 0.5, np.float32(2), np.int64(3), np.array(1.5), jnp.bfloat16(2), jnp.ones(())):
        checks.positive(value, "x")
    message = "f(x=...) must be one positive, finite number; got {}; try 1.0".format
    table = {
        got: ((value, "f(x=...)"), {}, message(got))
        for got, value in {
            "0": 0,
            "-1.0": -1.0,
            "inf": np.inf,
            "nan": np.nan,
            "True": True,
            "'1'": "1",
            "None": None,
            "1j": 1j,
            "[1.0]": [1.0],
            "shape (2,)": np.ones(2),
        }.items()
    }
    table["advice"] = (0.0, "x"), {"advice": "use 2"}, "x must be one positive, finite number; got 0.0; use 2"
    assert refusals(checks.positive, table) == {}


def test_traced_numbers_pass_with_their_shape_checked():
    def checked(value):
        checks.positive(value, "x")
        checks.all_positive(value, "x")
        return value

    jax.eval_shape(checked, jax.ShapeDtypeStruct((), jnp.float32))
    with pytest.raises(ValueError, match=r"one positive, finite number; got shape \(3,\)"):
        jax.eval_shape(checked, jax.ShapeDtypeStruct((3,), jnp.float32))


def test_several_positive_numbers():
    checks.all_positive([1.0, 2.0], "x")
    checks.all_positive(jnp.arange(1, 4), "x")
    table = {
        "zero": (([1.0, 0.0], "x"), {}, "x must be positive and finite; got [1. 0.]; try 1.0"),
        "many": ((np.arange(9.0), "x"), {}, "x must be positive and finite; got numbers from 0 to 8; try 1.0"),
        "infinite": ((np.inf, "x"), {"advice": "use 2"}, "x must be positive and finite; got inf; use 2"),
        "NaN": ((np.nan, "x"), {}, "x must be positive and finite; got nan; try 1.0"),
    }
    assert refusals(checks.all_positive, table) == {}


def test_counts():
    for value in (3, np.int32(3), np.array(3), jnp.asarray(3)):
        number = checks.count(value, "x", least=3, most=3)
        assert number == 3 and type(number) is int
    assert checks.count(0, "x", least=0) == 0
    table = {
        "low": ((0, "f(n=...)"), {}, "f(n=...) must be an integer of at least 1; got 0; try 1"),
        "negative": ((np.int64(-1), "n"), {"least": 0}, "n must be an integer of at least 0; got -1; try 0"),
        "high": ((5, "n"), {"most": 4}, "n must be an integer from 1 to 4; got 5; try 4"),
        "float": ((2.0, "n"), {"advice": "try 64"}, "n must be an integer of at least 1; got 2.0; try 64"),
        "bool": ((True, "n"), {}, "n must be an integer of at least 1; got True; try 1"),
        "string": (("4", "n"), {}, "n must be an integer of at least 1; got '4'; try 1"),
    }
    assert refusals(checks.count, table) == {}


def test_keys():
    key = jax.random.key(0)
    for value in (key, jax.random.PRNGKey(0), jax.random.key_data(key)):
        assert checks.is_key(value)
        checks.key(value, "key")
    message = "f(key=...) must be one random key; got {}; try jax.random.key(0)".format
    table = {
        "number": ((0, "f(key=...)"), {}, message("0")),
        "several": ((jax.random.split(key), "f(key=...)"), {}, message("key<fry> of shape (2,)")),
        "floats": ((np.ones(2), "f(key=...)"), {}, message("float64 of shape (2,)")),
    }
    assert refusals(checks.key, table) == {}


def test_choices():
    checks.choice("b", "x", ("a", "b"))
    table = {
        "two": (("c", "x", ("a", "b")), {}, "x must be 'a' or 'b'; got 'c'"),
        "three": ((1, "x", ("a", "b", "c")), {}, "x must be 'a', 'b' or 'c'; got 1"),
        "one": ((None, "x", ["a"]), {}, "x must be 'a'; got None"),
    }
    assert refusals(checks.choice, table) == {}


@pytest.mark.parametrize("depth", [0, 2])
def test_a_warning_names_the_line_outside_the_package(depth):
    """However many functions of the package lie between; code with the name of one of its modules counts as such."""
    inside = {"__name__": "bnnlaplace.fitting.fit", "checks": checks, "NotAModeWarning": NotAModeWarning}
    exec("def call(depth):\n call(depth - 1) if depth else checks.warn('far', NotAModeWarning)", inside)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inside["call"](depth)
    (warning,) = caught
    assert warning.filename == __file__ and warning.category is NotAModeWarning and str(warning.message) == "far"
    assert "inside[" in linecache.getline(__file__, warning.lineno)


def test_a_warning_is_shown_once_for_a_line_and_again_for_another():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            checks.warn("once")
        checks.warn("once")
    assert len(caught) == 2 and all(warning.category is UserWarning for warning in caught)


def test_numbers_are_positive_in_the_type_in_which_they_are_used():
    with jax.enable_x64(True):
        for value in (1e-300, 1e300):
            checks.positive(value, "x")
            checks.all_positive([value], "x")
    message = "x must be one positive, finite number; got {}, which float32 cannot hold or square; try 1.0".format
    table = {
        "small": ((1e-300, "x"), {}, message("1e-300")),
        "large": ((1e300, "x"), {}, message("1e+300")),
        "zero": ((0.0, "x"), {}, "x must be one positive, finite number; got 0.0; try 1.0"),
    }
    assert refusals(checks.positive, table) == {}
    message = "x must be positive and finite; got {}, which float32 cannot hold or square; try 1.0".format
    table = {
        "small": (([1.0, 1e-300], "x"), {}, message("[1.e+000 1.e-300]")),
        "squared": ((1e-20, "x"), {"with_squares": True}, message("1e-20")),
        "strings": ((["a"], "x"), {}, "x must be positive, finite numbers; got ['a']; try 1.0"),
        "objects": ((None, "x"), {}, "x must be positive, finite numbers; got None; try 1.0"),
    }
    assert refusals(checks.all_positive, table) == {}
    checks.all_positive(1e-18, "x", with_squares=True)


def test_several_processes_are_refused(monkeypatch):
    checks.one_process("fit")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        ValueError, match=r"fit must run in a single process.* got jax.process_count\(\) = 2; gather the"
    ):
        checks.one_process("fit")
