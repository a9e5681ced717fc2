"""Progress: a bar on a terminal, a line per tenth elsewhere; lines survive a redirection of stdout."""

from __future__ import annotations

import contextlib
import io

import pytest

from medmamba.demo.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("total", "lines"), [(1, 1), (3, 3), (10, 10), (25, 10), (300, 10)])
def test_without_a_terminal_there_is_a_line_per_tenth_and_the_last_one_is_complete(total, lines):
    output = io.StringIO()
    with Console(output, io.StringIO()).progress("train", total) as progress:
        for _ in range(total):
            progress.step("loss 1.0")
    written = output.getvalue().splitlines()
    assert len(written) == lines
    assert f"{total}/{total}" in written[-1]
    assert written[-1].endswith("loss 1.0")


def test_a_terminal_gets_a_bar_and_no_lines():
    output, terminal = io.StringIO(), Terminal()
    with Console(output, terminal).progress("train", 20) as progress:
        for _ in range(20):
            progress.step("loss 0.5")
    assert output.getvalue() == ""
    assert "20/20" in terminal.getvalue()
    assert "loss 0.5" in terminal.getvalue()


def test_lines_go_to_the_stream_that_was_current_at_the_start(capsys):
    console = Console()
    with contextlib.redirect_stdout(io.StringIO()) as elsewhere:
        console.line("hello")
    assert elsewhere.getvalue() == ""
    assert capsys.readouterr().out == "hello\n"
