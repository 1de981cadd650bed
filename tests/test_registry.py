"""Tables: names, options, and messages that collect every problem."""

import pytest

from mlx_lora.errors import ConfigError, UnknownNameError, UserError, near
from mlx_lora.registry import Table, check_options, first_line, options


@pytest.fixture
def shapes() -> Table:
    table = Table("shape")

    @table.add
    def square(scale: float, *, side: float = 1.0) -> float:
        """A square.

        More about squares.
        """
        return scale * side**2

    @table.add
    def ring(scale: float, *, outer: int, name: str = "o", kept: bool = True) -> tuple:
        """A ring."""
        return scale, outer, name, kept

    return table


def test_a_table_lists_and_finds_its_functions(shapes):
    assert list(shapes) == ["square", "ring"] and len(shapes) == 2
    assert "ring" in shapes and "rign" not in shapes
    assert shapes["square"](2.0) == 2.0
    assert first_line(shapes["square"]) == "A square."


def test_unknown_names_come_with_near_matches(shapes):
    with pytest.raises(UnknownNameError, match="unknown shape 'sqare'") as caught:
        shapes["sqare"]
    assert caught.value.hint == "Did you mean square?"
    with pytest.raises(UnknownNameError) as caught:
        shapes.bind("zzz", {})
    assert caught.value.hint == "There is: ring, square."


def test_options_are_the_keyword_only_arguments(shapes):
    assert options(shapes["square"]) == {"side": 1.0}
    assert list(options(shapes["ring"])) == ["outer", "name", "kept"]


def test_bind_converts_what_the_command_line_gives(shapes):
    assert shapes.bind("square", {"side": "3"})(2.0) == 18.0
    assert shapes.bind("ring", {"outer": "4", "kept": "false"})(1.0) == (1.0, 4, "o", False)
    assert shapes.bind("square", {})(1.0) == 1.0


def test_every_problem_is_in_one_message(shapes):
    with pytest.raises(ConfigError) as caught:
        shapes.bind("ring", {"kepd": True, "name": 5})
    message = str(caught.value)
    assert "shape ring has no option kepd. Did you mean kept?" in message
    assert "name=5" in message
    assert "shape ring needs the option outer" in message


@pytest.mark.parametrize("value", ["wide", None, [1], 1.5])
def test_a_wrong_type_is_named_with_its_value(shapes, value):
    with pytest.raises(ConfigError) as caught:
        shapes.bind("ring", {"outer": value})
    assert f"outer={value!r}" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), "nan"])
def test_nan_is_no_option(shapes, value):
    """As a threshold it would switch a gate off, or always on."""
    with pytest.raises(ConfigError, match=r"side=.*NaN"):
        shapes.bind("square", {"side": value})


def test_positional_arguments_are_no_options(shapes):
    with pytest.raises(ConfigError, match="no option scale"):
        shapes.bind("square", {"scale": 1})


def test_functions_without_options_say_so():
    def plain() -> None:
        """Nothing."""

    assert check_options("plain", plain, {}) == {}
    with pytest.raises(ConfigError, match="no option x"):
        check_options("plain", plain, {"x": 1})


def test_an_entry_needs_a_docstring_and_a_name_of_its_own(shapes):
    def bare():
        pass

    def ring():
        """Another ring."""

    with pytest.raises(AssertionError, match="docstring"):
        shapes.add(bare)
    with pytest.raises(AssertionError, match="two entries"):
        shapes.add(ring)


def test_errors_carry_a_kind_and_a_hint():
    error = ConfigError("wrong", "do this")
    assert (str(error), error.hint, error.kind) == ("wrong", "do this", "ConfigError")
    assert isinstance(error, UserError) and UserError("x").hint == ""
    assert near("x", []) == "There is none."
