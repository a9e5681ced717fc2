"""The output folder: a second run replaces the first, and nothing else is ever touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medmamba.command import CommandError
from medmamba.demo.folder import MARKER, check_folder, claim_folder

PATHS = ["nnUNet_raw/Dataset004_X", "predictions", "report.json"]


def make_run(folder: Path, paths: list[str] = PATHS) -> None:
    """Claim the folder and leave something at every path, as a run does."""
    claim_folder(folder, paths)
    for path in paths:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix:
            target.write_text("ours")
        else:
            target.mkdir()
            (target / "file").write_text("ours")


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("kind", ["missing", "missing in missing", "empty"])
def test_a_new_or_empty_folder_is_taken(tmp_path, kind):
    folder = tmp_path / {"missing": "new", "missing in missing": "a/b/c", "empty": "."}[kind]
    check_folder(folder)
    claim_folder(folder, PATHS)
    assert json.loads((folder / MARKER).read_text())["paths"] == PATHS


def test_a_second_run_replaces_the_files_of_the_first(tmp_path):
    make_run(tmp_path)
    claim_folder(tmp_path, PATHS)
    assert list(content(tmp_path)) == [MARKER]
    assert not (tmp_path / "nnUNet_raw").exists()


def test_a_run_with_other_paths_removes_those_of_the_run_before(tmp_path):
    make_run(tmp_path)
    make_run(tmp_path, ["nnUNet_raw/Dataset999_Y", "report.json"])
    assert sorted(content(tmp_path)) == [MARKER, "nnUNet_raw/Dataset999_Y/file", "report.json"]


def test_foreign_files_survive_beside_and_above_ours(tmp_path):
    make_run(tmp_path)
    foreign = {"notes.txt": "mine", "nnUNet_raw/Dataset005_Mine/image": "mine", "other/deep/file": "mine"}
    for path, text in foreign.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    claim_folder(tmp_path, PATHS)
    assert {path: text for path, text in content(tmp_path).items() if path != MARKER} == foreign


def test_a_path_taken_by_somebody_else_is_refused_and_kept(tmp_path):
    make_run(tmp_path, ["predictions"])
    (tmp_path / "report.json").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(CommandError, match=r"report\.json was not made by medmamba demo"):
        claim_folder(tmp_path, PATHS)
    assert content(tmp_path) == before


def test_a_folder_with_content_and_no_marker_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CommandError, match="not empty and was not made by medmamba demo"):
        claim_folder(tmp_path, PATHS)
    assert content(tmp_path) == {"thesis.tex": "mine"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(CommandError, match="is a file"):
        check_folder(path)


DAMAGED = {
    "no json": "{",
    "no paths": "{}",
    "absolute path": '{"paths": ["/etc"]}',
    "path that leaves": '{"paths": ["../precious"]}',
    "path through": '{"paths": ["a/../../precious"]}',
    "empty path": '{"paths": [""]}',
    "no string": '{"paths": [3]}',
}


@pytest.mark.parametrize("marker", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_marker_is_refused_and_nothing_is_removed(tmp_path, marker):
    folder, precious = tmp_path / "out", tmp_path / "precious"
    folder.mkdir()
    precious.write_text("mine")
    (folder / MARKER).write_text(marker)
    with pytest.raises(CommandError, match="is damaged"):
        claim_folder(folder, PATHS)
    assert precious.read_text() == "mine"


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    make_run(folder, ["report.json"])
    make_run(folder, ["predictions"])
    (folder / "predictions" / "file").unlink()
    (folder / "predictions").rmdir()
    (folder / "predictions").symlink_to(elsewhere)
    claim_folder(folder, ["predictions"])
    assert not (folder / "predictions").is_symlink()
    assert content(elsewhere) == {"file": "mine"}


def test_a_linked_parent_is_not_followed(tmp_path):
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (elsewhere / "Dataset004_X").mkdir(parents=True)
    (elsewhere / "Dataset004_X" / "file").write_text("mine")
    claim_folder(folder, PATHS)
    (folder / "nnUNet_raw").symlink_to(elsewhere)
    with pytest.raises(CommandError, match="leads through a link"):
        claim_folder(folder, PATHS)
    assert content(elsewhere) == {"Dataset004_X/file": "mine"}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(CommandError, match="cannot write in"):
        claim_folder(blocker / "out", PATHS)
