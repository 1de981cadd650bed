"""Machines that cannot run MLX are told so, and those that can are not."""

import pytest

from mlx_lora.platform import problem

NEW = (3, 12)


@pytest.mark.parametrize(
    ("system", "machine", "python", "macos", "words"),
    [
        ("darwin", "x86_64", NEW, "15.1", "Intel Mac"),
        ("darwin", "arm64", NEW, "13.6.1", "macOS 13.6.1 is too old"),
        ("darwin", "arm64", (3, 10), "15.1", "Python 3.10 is too old"),
        ("win32", "AMD64", NEW, None, "win32 is not supported"),
    ],
)
def test_unsupported_machines_get_a_reason_and_a_hint(system, machine, python, macos, words):
    found = problem(system, machine, python, macos)
    assert found is not None and words in str(found) and found.hint


@pytest.mark.parametrize(
    ("system", "machine", "macos"),
    [("darwin", "arm64", "14.0"), ("darwin", "arm64", "26.1"), ("linux", "aarch64", None)],
)
def test_supported_machines_have_no_problem(system, machine, macos):
    assert problem(system, machine, NEW, macos) is None


def test_this_machine_is_supported():
    assert problem() is None
