"""The ``medmamba`` program: dispatch, exit codes and what it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest

from medmamba import cli

HEAVY = ("torch", "numpy", "nnunetv2", "monai", "SimpleITK", "nibabel", "scipy", "matplotlib", "triton")

THIRD_PARTY = """
    import logging
    from medmamba.command import Command, CommandError

    def configure(parser):
        parser.add_argument("--how", default="well")

    def run(args):
        if args.how == "badly":
            raise CommandError("no such plan; run medmamba plan first", exit_code=3)
        if args.how == "interrupted":
            raise KeyboardInterrupt
        if args.how == "wrongly":
            raise RuntimeError("a bug")
        print("ran", args.how)
        logging.getLogger("medmamba.third_party").info("ran %s", args.how)
        return 0

    def show(args):
        print(args.arguments)
        return 0

    def flood(args):
        for _ in range(100_000):
            print("water")
        return 0

    WORK = Command("works", configure, run)
    SHOW = Command("shows its arguments", lambda parser: None, show, passthrough=True)
    FLOOD = Command("writes a lot", lambda parser: None, flood)
    NOT_A_COMMAND = 5
"""
ENTRY_POINTS = """
    [medmamba.commands]
    work = third_party:WORK
    show = third_party:SHOW
    flood = third_party:FLOOD
    odd = third_party:NOT_A_COMMAND
    gone = third_party_that_is_gone:WORK
    doctor = third_party:WORK
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution, as pip would install it, that adds commands (and tries to replace ``doctor``)."""
    (tmp_path / "third_party.py").write_text(textwrap.dedent(THIRD_PARTY))
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(ENTRY_POINTS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "third_party", raising=False)
    return tmp_path


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_help_imports_nothing_heavy():
    result = run_python(f"""
        import sys
        from medmamba.cli import main
        try:
            main(["--help"])
        except SystemExit as exit:
            assert exit.code == 0, exit.code
        heavy = [name for name in {HEAVY} if name in sys.modules]
        assert not heavy, heavy
    """)
    assert result.returncode == 0, result.stderr
    assert "Research use only, not a medical device" in result.stdout
    assert "broken" not in result.stdout


@pytest.mark.parametrize("name", sorted(cli.find_commands()))
def test_a_command_describes_itself_without_heavy_imports(name):
    result = run_python(f"""
        import sys
        from medmamba import cli
        command = cli.find_commands()[{name!r}].load()
        assert cli.command_parser({name!r}, command).format_help()
        assert command.help == command.help.strip() and "\\n" not in command.help
        heavy = [name for name in {HEAVY} if name in sys.modules]
        assert not heavy, heavy
    """)
    assert result.returncode == 0, result.stderr


def test_version_is_that_of_the_distribution(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"medmamba {version('medmamba')}\n"


def test_no_command_prints_help_and_returns_2(capsys):
    assert cli.main([]) == 2
    assert "usage: medmamba" in capsys.readouterr().err


def test_unknown_command_lists_the_known_ones(capsys):
    assert cli.main(["plna"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("medmamba: unknown command 'plna'; known: ")
    assert all(name in message for name in cli.find_commands())


def test_a_third_party_command_runs(third_party, capsys):
    assert cli.main(["work", "--how", "nicely"]) == 0
    assert capsys.readouterr().out == "ran nicely\n"


def test_logs_go_to_stderr_once_however_often_a_command_runs(third_party, capsys):
    for _ in range(2):
        assert cli.main(["work"]) == 0
        assert capsys.readouterr().err == "ran well\n"


def test_wrong_usage_of_a_command_returns_2(third_party, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["work", "--what"])
    assert exit_info.value.code == 2
    assert "usage: medmamba work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "exit_code", "message"),
    [
        ("badly", 3, "medmamba work: no such plan; run medmamba plan first\n"),
        ("interrupted", 130, "medmamba work: interrupted\n"),
        ("wrongly", 1, "medmamba work: internal error: RuntimeError: a bug\n"),
    ],
)
def test_failures_end_with_one_line_and_their_exit_code(third_party, capsys, how, exit_code, message):
    assert cli.main(["work", "--how", how]) == exit_code
    error = capsys.readouterr().err
    assert error.endswith(message)
    assert ("Traceback" in error) == (how == "wrongly")


@pytest.mark.parametrize("arguments", [["--help"], ["-h", "--how", "x"], ["--", "-tr", "T"], []], ids=str)
def test_passthrough_arguments_arrive_untouched(third_party, capsys, arguments):
    assert cli.main(["show", *arguments]) == 0
    assert capsys.readouterr().out == f"{arguments}\n"


@pytest.mark.parametrize("name", ["gone", "odd"])
def test_a_broken_command_is_named_and_does_not_break_the_others(third_party, capsys, name):
    assert cli.main([name]) == 1
    assert "third-party" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == [name, "broken:"] for line in lines)
    assert any(line.split() == ["work", "works"] for line in lines)


def test_a_third_party_cannot_replace_our_command(third_party):
    assert cli.find_commands()["doctor"].value != "third_party:WORK"


def test_a_reader_that_leaves_is_no_error(third_party):
    process = subprocess.Popen(
        [sys.executable, "-m", "medmamba.cli", "flood"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(third_party)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "water\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 141
