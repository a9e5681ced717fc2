"""DICOM series, reports together, and what reports are made of."""

from __future__ import annotations

import json
from datetime import datetime

import numpy as np
import pytest

from medmamba.command import CommandError
from medmamba.inference.folder import Options, merge_reports, run_folder
from medmamba.inference.folder.facts import command_without_folders, label_facts
from medmamba.inference.folder.progress import estimated_end, to_stdout
from medmamba.inference.folder.report import unexplained
from medmamba.inference.reading import Image


def test_a_dicom_series_becomes_a_nifti(tmp_path, fake, write_dicom):
    write_dicom(tmp_path / "series")
    assert run_folder(tmp_path / "series", tmp_path / "out", fake.Threshold(), Options(say=lambda line: None)) == 0
    assert (tmp_path / "out" / "series.nii.gz").is_file()
    predictor = fake.Threshold()
    assert run_folder(tmp_path / "series", tmp_path / "out", predictor, Options(say=lambda line: None)) == 0
    assert predictor.predicted == 0


def test_merged_parts_are_one_report(tmp_path, fake, write_image):
    for k in range(5):
        write_image(tmp_path / "in" / f"c{k}.nii", seed=k)
    (tmp_path / "in" / "bad.nii").write_bytes(b"")
    quiet = {"num_parts": 3, "say": lambda line: None}
    for part in (0, 2):
        run_folder(tmp_path / "in", tmp_path / "out", fake.Threshold(), Options(part_id=part, **quiet))
    merged = merge_reports(sorted((tmp_path / "out").glob("report*")))
    assert merged.missing_parts == [(1, 3)]
    run_folder(tmp_path / "in", tmp_path / "out", fake.Threshold(), Options(part_id=1, **quiet))
    merged = merge_reports(sorted((tmp_path / "out").glob("report*")))
    assert merged.missing_parts == []
    assert merged.counts == {"done": 5, "refused": 1, "failed": 0}
    assert list(merged.cases) == ["bad", *(f"c{k}" for k in range(5))]
    assert merged.models == ["threshold-1"]
    assert (merged.broken, merged.unfinished) == (0, [])
    merged.write(tmp_path / "all.jsonl")
    again = merge_reports([tmp_path / "all.jsonl"])
    assert (again.cases, again.runs) == (merged.cases, merged.runs)


def test_the_last_line_about_a_case_counts_and_mixtures_show(tmp_path, fake, write_image):
    write_image(tmp_path / "in" / "a.nii")
    (tmp_path / "in" / "b.nii").write_bytes(b"")
    quiet = Options(say=lambda line: None)
    run_folder(tmp_path / "in", tmp_path / "out", fake.Threshold(), quiet)
    write_image(tmp_path / "in" / "b.nii")
    run_folder(tmp_path / "in", tmp_path / "out", fake.Threshold(), quiet)
    merged = merge_reports([tmp_path / "out" / "report.jsonl"])
    assert merged.counts == {"done": 2, "refused": 0, "failed": 0}
    write_image(tmp_path / "in" / "b.nii", seed=2)
    (tmp_path / "in" / "a.nii").unlink()
    run_folder(tmp_path / "in", tmp_path / "out", fake.Threshold(id="threshold-2"), quiet)
    assert merge_reports([tmp_path / "out" / "report.jsonl"]).models == ["threshold-1", "threshold-2"]


def test_a_begun_case_without_an_end_and_a_torn_line_are_counted(tmp_path, fake, write_image):
    write_image(tmp_path / "in" / "a.nii")
    run_folder(tmp_path / "in", tmp_path / "out", fake.Threshold(), Options(say=lambda line: None))
    report = tmp_path / "out" / "report.jsonl"
    with report.open("a") as stream:
        stream.write(json.dumps({"record": "begin", "run": "x", "case": "b"}) + '\n{"record": "ca')
    merged = merge_reports([report])
    assert (merged.unfinished, merged.broken) == (["b"], 1)


@pytest.mark.parametrize(
    ("content", "text"), [(None, "cannot be read"), ("no report\n", "is no medmamba prediction report")]
)
def test_what_is_no_report_is_not_merged(tmp_path, content, text):
    if content is not None:
        (tmp_path / "report.jsonl").write_text(content)
    with pytest.raises(CommandError, match=text):
        merge_reports([tmp_path / "report.jsonl"])


RUN, END = {"record": "run"}, {"record": "end"}
A, B = ({"record": "begin", "case": name} for name in "ab")
DONE = {"record": "case", "case": "a"}


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ([RUN, A, DONE, B], {"b": 1}),
        ([RUN, A, DONE, B, END], {}),
        ([RUN, A, RUN, A, RUN, A, DONE, END], {"a": 2}),
        ([RUN, END], {}),
    ],
)
def test_a_run_that_ended_without_a_word_is_laid_to_its_case(lines, wanted):
    assert dict(unexplained(lines)) == wanted


@pytest.mark.parametrize(
    ("elapsed", "count", "total", "wanted"),
    [
        (60, 1, 3, "; ends about 22:32"),
        (3600, 1, 3, "; ends about Sun 22 Nov 00:30"),
        (60, 3, 3, ""),
    ],
)
def test_the_rest_is_estimated_from_the_cases_so_far(elapsed, count, total, wanted):
    assert estimated_end(datetime(2026, 11, 21, 22, 30), elapsed, count, total) == wanted


def test_a_terminal_without_the_letters_gets_escapes(capsys, monkeypatch):
    import io
    import sys

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    to_stdout("über \udcff")
    assert stream.buffer.getvalue() == b"\\xfcber \\udcff\n"


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (["medmamba", "predict", "-i", "/home/jane/cases"], ["medmamba", "predict", "-i", "cases"]),
        (["--model=/home/jane/m", "--name=a", "-x=1/2"], ["--model=m", "--name=a", "-x=2"]),
    ],
)
def test_a_command_is_reported_without_folders(command, wanted):
    assert command_without_folders(command) == wanted


def test_label_facts_of_a_large_value_and_an_oblique_grid():
    labels = np.zeros((3, 4, 5), np.uint16)
    labels[1, 1, 1] = 300
    affine = np.array([[0, -2.0, 0, 0], [1.5, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]])
    facts = label_facts(labels, Image(labels, affine), {0: "background", 300: "small", 301: "none"})
    assert facts["labels"]["300"] == {"name": "small", "voxels": 1, "ml": 0.012, "border": False}
    assert facts["empty_labels"] == ["none"]
