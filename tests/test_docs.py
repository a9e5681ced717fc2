"""The documents run: every fenced ``python`` and ``bash`` block is executed, page by page, or says why not.

The blocks of one page and language are one program, executed in an empty folder from top to bottom, so a page
may set a variable in one block and use it in the next. A comment on the line above a fence changes that:

    <!-- snippet: slow -->            the block (and with it the page's program) runs under ``pytest -m slow``
    <!-- snippet: covered by TEST --> not executed here; TEST (path::name) does the same, and exists
    <!-- snippet: skip REASON -->     not executed; the reason is part of the source

A page whose first line is ``<!-- continues: PAGE -->`` runs in the same program after PAGE, in the same folder and
with the same variables, as it tells its readers.

Blocks of other languages (``text``, ``json``, ...) are output and data.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = sorted((CHECKOUT / "docs").rglob("*.md"))
FENCE = re.compile(
    r"(?:^<!-- snippet: (?P<mark>[^\n]*) -->\n)?^```(?P<language>python|bash)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Snippet:
    page: Path
    line: int
    language: str
    mark: str
    code: str

    @property
    def is_executed(self) -> bool:
        return self.mark in ("", "slow")


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    return [
        Snippet(
            page,
            text.count("\n", 0, match.start("code")) + 1,
            match["language"],
            match["mark"] or "",
            match["code"],
        )
        for match in FENCE.finditer(text)
    ]


ALL = [snippet for page in PAGES for snippet in snippets(page)]


def continued_page(page: Path) -> Path:
    """The page whose program this page's blocks belong to."""
    match = re.match(r"<!-- continues: (\S+) -->\n", page.read_text(encoding="utf-8"))
    return CHECKOUT / "docs" / match[1] if match else page


def programs() -> Iterator[pytest.param]:
    """One program per page and language, with the pages that continue it; slow when one of its blocks is."""
    for language in ("bash", "python"):
        blocks: dict[Path, list[Snippet]] = {}
        for page in sorted(PAGES, key=lambda page: (continued_page(page), page != continued_page(page), page)):
            chosen = [s for s in snippets(page) if s.language == language and s.is_executed]
            blocks.setdefault(continued_page(page), []).extend(chosen)
        for page, chosen in blocks.items():
            if chosen:
                marks = [pytest.mark.slow] if any(s.mark == "slow" for s in chosen) else []
                yield pytest.param(chosen, marks=marks, id=f"{page.relative_to(CHECKOUT / 'docs')}:{language}")


def own_installations(folder: Path) -> dict[str, str]:
    """Variables by which ``pip install`` of a page installs into the folder, and not into what is under test."""
    # Only site folders read the .pth file of an editable installation.
    (folder / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(folder)!r})\n")
    before = os.environ.get("PYTHONPATH")
    return {"PIP_TARGET": str(folder), "PYTHONPATH": os.pathsep.join([str(folder), *([before] if before else [])])}


@pytest.mark.parametrize("blocks", list(programs()))
def test_a_page_runs(blocks, tmp_path, tmp_path_factory):
    if blocks[0].language == "bash":
        program = ["bash", "-euo", "pipefail", "-c", "\n".join(block.code for block in blocks)]
    else:
        program = [sys.executable, "-P", "-c", "\n".join(block.code for block in blocks)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
    # As few workers as nnU-Net allows: each is a process that imports torch, and data of a page are tiny.
    environment |= {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1"}
    # The programs of the environment under test come first, whether or not it is activated.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= own_installations(tmp_path_factory.mktemp("installed"))
    result = subprocess.run(
        program,
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    where = ", ".join(f"{block.page.name}:{block.line}" for block in blocks)
    assert result.returncode == 0, f"{where} ended with {result.returncode}:\n{result.stdout[-4000:]}"


@pytest.mark.parametrize("snippet", ALL, ids=lambda s: f"{s.page.relative_to(CHECKOUT / 'docs')}:{s.line}")
def test_a_snippet_is_executed_or_says_why_not(snippet):
    if snippet.is_executed:
        return
    kind, _, rest = snippet.mark.partition(" ")
    if kind == "skip":
        assert len(rest.split()) >= 3, "give the reason in words"
        return
    assert snippet.mark.startswith("covered by "), f"unknown mark {snippet.mark!r}; known: slow, covered by, skip"
    assert_is_a_test(snippet.mark.removeprefix("covered by "))


def assert_is_a_test(name: str) -> None:
    path, _, function = name.partition("::")
    tree = ast.parse((CHECKOUT / path).read_text(encoding="utf-8"))
    assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page):
    for name in re.findall(r"`(tests/\S+?::\w+)`", page.read_text(encoding="utf-8")):
        assert_is_a_test(name)


def test_no_fence_escapes_the_convention():
    """A fence with other spacing or an indented one would be shown but not run."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^\s*```\s*(?:python|bash|sh|shell|console|py)\b", text, re.MULTILINE)
        assert len(fences) == len(snippets(page)), page


README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
#: Name -> shell commands under <!-- command: NAME -->.
COMMANDS: dict[str, str] = dict(
    re.findall(r"^<!-- command: (\w+) -->\n```bash\n(.+?)^```$", README, re.MULTILINE | re.DOTALL)
)


def test_the_readme_stays_one_screen():
    assert README.count("![") == 1
    assert README.count("```bash") == 3
    prose = re.sub(r"<!-- table: .*?<!-- end table -->", "", README, flags=re.DOTALL)
    assert len(prose.splitlines()) <= 80


def test_the_readme_holds_the_three_commands_that_ci_runs():
    assert list(COMMANDS) == ["demo", "predict", "test"]
    assert all(len(code.strip().splitlines()) == 1 for code in COMMANDS.values())
    ci = (CHECKOUT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(f"$(readme_command {name})" in ci for name in COMMANDS)


@pytest.mark.slow
def test_the_readme_predicts_with_the_shipped_model(tmp_path):
    for name in ("medmamba", "tests"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", COMMANDS["predict"]], cwd=tmp_path, env=environment, check=True)
    references = CHECKOUT / "medmamba" / "demo" / "data" / "Dataset004_Hippocampus" / "labelsTr"
    names = {path.name for path in references.iterdir()}
    assert {path.name for path in (tmp_path / "segmentations").glob("*.nii.gz")} == names


def test_the_files_that_the_readme_shows_exist():
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert targets
    assert not [target for target in targets if not (CHECKOUT / target.partition("#")[0]).exists()]


@pytest.mark.parametrize("path", [CHECKOUT / "README.md", *PAGES], ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_words_we_do_not_use(path):
    """No superlatives, and no path of the machine a page was written on."""
    text = path.read_text(encoding="utf-8").lower()
    words = (
        "state-of-the-art",
        "state of the art",
        "revolution",
        "blazing",
        "cutting-edge",
        "unparalleled",
        "/work/",
        "/root/",
    )
    assert not [word for word in words if word in text]


def test_research_use_is_stated_where_users_look():
    for path in ("README.md", "docs/index.md", "SECURITY.md"):
        assert "not a medical device" in (CHECKOUT / path).read_text(encoding="utf-8"), path
