"""A command that takes long says how far it is, in a log too."""

import io

from rich.console import Console

from lamina.cli.progress import EVERY_SECONDS, counting, telling


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(console: Console) -> list[str]:
    file = console.file
    assert isinstance(file, io.StringIO)
    return [line.split(" ", 1)[1] for line in file.getvalue().splitlines()]


def a_log() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def test_a_log_is_told_at_once_what_begins_and_then_every_few_seconds():
    log, clock = a_log(), Clock()
    with telling("making the model", log, clock) as tell:
        tell("layer 1")
        clock.now += EVERY_SECONDS
        tell("layer 2 [/x]")
        tell("layer 3")
    assert lines_of(log) == ["making the model", "layer 2 [/x]"]


def test_a_log_has_the_first_and_the_last_count_of_each_kind():
    log, clock = a_log(), Clock()
    with counting("trace", "lower", console=log, clock=clock) as count:
        for done in range(5):
            count("trace", done, 4)
        count("lower", 0, 1000)
        clock.now += EVERY_SECONDS
        count("lower", 500, 1000)
        count("lower", 501, 1000)
    assert lines_of(log) == ["trace: 0 of 4", "trace: 4 of 4", "lower: 0 of 1,000", "lower: 500 of 1,000"]


def test_a_terminal_gets_a_bar_for_each_kind():
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    with counting("trace", console=screen) as count:
        count("trace", 3, 4)
    assert "3/4" in screen.file.getvalue()
