from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from vicvlm_cli.report.progress import Progress, RateColumn


def on_a_terminal() -> tuple[Progress, io.StringIO]:
    progress, stream = Progress(enabled=True), io.StringIO()
    progress.console = Console(file=stream, force_terminal=True, width=100, highlight=False)
    return progress, stream


def test_notes_go_to_stderr_and_markup_is_left_alone(capsys):
    Progress().say("data: [bold] " + "x" * 200)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "data: [bold] " + "x" * 200 + "\n"


def test_quiet_says_nothing_and_still_yields(capsys):
    progress = Progress(enabled=True, quiet=True)
    progress.say("unheard")
    assert list(progress.track("abc", "letters")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_no_bars_where_stderr_is_no_terminal(capsys):
    progress = Progress()
    assert list(progress.track(iter(range(3)), "numbers")) == [0, 1, 2]
    with progress.bar("by hand", 3) as bar:
        bar.advance()
        bar.describe("still silent")
    assert capsys.readouterr() == ("", "")


def test_bars_show_their_count_and_nest():
    progress, stream = on_a_terminal()
    with progress.bar("outer", total=2, unit="epochs") as outer:
        for _ in progress.track([1, 2, 3], "inner", unit="images"):
            progress.say("a note in between")
        outer.describe("outer, renamed")
        outer.advance(2)
        progress._live.refresh()  # it does so ten times a second
    shown = stream.getvalue()
    assert "a note in between" in shown
    for words in ("outer, renamed", "2/2"):
        assert words in shown
    # The display is closed: another one can be opened on the same console.
    assert list(progress.track([1], "again")) == [1]


@pytest.mark.parametrize(
    ("speed", "words"), [(1234.5, "1,234 images/s"), (0.123, "0.12 images/s"), (None, "")]
)
def test_rates(speed, words):
    task = SimpleNamespace(finished_speed=None, speed=speed, fields={"unit": "images"})
    assert RateColumn().render(task).plain == words


def test_a_bar_is_taken_down_when_the_loop_fails():
    progress, _ = on_a_terminal()
    try:
        with progress.bar("doomed", 1):
            raise RuntimeError
    except RuntimeError:
        pass
    assert progress._live is None
