"""Text from elsewhere can neither steer a terminal nor fill one."""

import io
import time

import pytest
from rich.console import Console

from lamina.errors import LaminaError, shown
from lamina.printable import printable, printable_markup

HOSTILE = {
    "title and clear": "\x1b]0;owned\x07\x1b[2J",
    "C1 controls": "\x9b31mred",
    "bell and backspace": "a\x07\x08\x7fb",
    "line breaks": "a\r\nb\x0bc\x0cd\x85e\u2028f\u2029g",
    "direction": "gpj.\u202eexe\u2066x\u2069\u200f",
    "invisible": "a\u200bb\ufeffc\u00ad\U000e0041",
    "surrogate": "a\ud800b",
    "unassigned and private": "\u0378\ue000\U0010ffff",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_shown_is_one_line_of_printable_characters(text: str) -> None:
    assert printable(text).isprintable()
    assert not printable("[/x]" + text).startswith("\x1b")


def test_what_people_write_stays_as_it_is() -> None:
    for text in ("", "loss 0.5 [/x]", "Grüße, 你好, שלום, ひらがな, 🙂", "a\\b 'c' \"d\""):
        assert printable(text) == text


def test_white_space_is_a_space_and_lines_stay_where_they_may() -> None:
    assert printable("a\tb\nc\xa0d") == "a b c d"
    assert printable("a\tb\nc\x1bd", keeps_lines=True) == "a b\nc\ufffdd"


def test_the_length_is_bounded_and_the_cut_is_marked() -> None:
    assert printable("x" * 200) == "x" * 200
    assert printable("x" * 201) == "x" * 197 + "..."
    assert printable("\x1b" * 10, most=5) == "\ufffd\ufffd..."
    with pytest.raises(ValueError, match="three characters"):
        printable("abc", most=2)


def test_the_cost_is_that_of_what_is_shown() -> None:
    text = "\x1b" * (64 << 20)
    started = time.perf_counter()
    for _ in range(100):
        printable(text)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("text", ["[/x]", "[bold]", "\\[/x]", "[link=file:///etc/passwd]x[/link]", "x\\", "[x\x1b[2J]"])
def test_markup_is_shown_and_not_read(text: str) -> None:
    out = io.StringIO()
    Console(file=out, width=200, color_system=None).print(f"[b]{printable_markup(text)}[/b]", highlight=False)
    assert out.getvalue() == printable(text) + "\n"


def test_a_command_that_ends_with_an_error_shows_it_so() -> None:
    assert shown(LaminaError("a\x1b[2Jb\nsecond line")).startswith("error [lamina]: a\ufffd[2Jb\nsecond line\n")
    assert len(shown(LaminaError("x" * 100_000))) < 5000
