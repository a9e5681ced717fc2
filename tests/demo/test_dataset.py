"""The demo's input: the shipped volumes, the user's own, and everything that can be wrong with them."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
import SimpleITK

from medmamba.command import CommandError
from medmamba.demo.dataset import SHIPPED, check_volumes, read_dataset


def test_the_shipped_dataset_has_six_cases_to_train_on_and_two_unseen():
    dataset = read_dataset()
    assert dataset.is_shipped
    assert dataset.name == "Dataset004_Hippocampus"
    assert len(dataset.training) == 6
    assert [case.name for case in dataset.unseen] == ["hippocampus_243", "hippocampus_320"]
    assert dataset.structures == {"Anterior": 1, "Posterior": 2}
    check_volumes(dataset)


def test_the_shipped_dataset_mixes_integer_and_real_images_in_both_parts():
    kinds = {
        part: {SimpleITK.ReadImage(str(case.images[0])).GetPixelIDTypeAsString() for case in cases}
        for part, cases in (("training", read_dataset().training), ("unseen", read_dataset().unseen))
    }
    both = {"8-bit unsigned integer", "32-bit float"}
    assert kinds == {"training": both, "unseen": both}


def test_the_shipped_dataset_carries_its_licence_attribution_and_list_of_changes():
    licence = (SHIPPED / "LICENSE").read_text(encoding="utf-8")
    readme = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert licence.startswith("Attribution-ShareAlike 4.0 International")
    assert "Section 8 -- Interpretation." in licence
    for words in ("CC-BY-SA-4.0", "https://creativecommons.org/licenses/by-sa/4.0/", "Medical Segmentation Decathlon"):
        assert words in readme
    assert re.search(r"^## Changes made to the original$", readme, re.MULTILINE)
    assert json.loads((SHIPPED / "dataset.json").read_text())["licence"] == "CC-BY-SA-4.0"


def test_the_shipped_dataset_is_small_and_holds_nothing_but_its_cases():
    files = sorted(path for path in SHIPPED.rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in files) < 0.5e6
    expected = {path for case in read_dataset().cases for path in case.files}
    assert set(files) - expected == {SHIPPED / "LICENSE", SHIPPED / "README.md", SHIPPED / "dataset.json"}


def test_the_shipped_files_are_the_originals_byte_for_byte():
    """The README says so; the sums were taken from the source repository's files."""
    sums = {
        "imagesTr/hippocampus_148_0000.nii.gz": "5267af87bf5920313e491f8ec461382393de828c42f169f47cf541d87f084b41",
        "imagesTr/hippocampus_243_0000.nii.gz": "f8a5a1eb50123888bcfe859be61ba259d75f3d4ad2ded7fb6ef5ebac5bbabc46",
        "imagesTr/hippocampus_320_0000.nii.gz": "2dc26e26ae7032f3247f1a5633a8252dd1e2c5dd5dbd09b3bd3164c7110950d2",
        "labelsTr/hippocampus_148.nii.gz": "e8a2548ad4fdc6cbe8beccd6d27f7a0154d8d45ab8e993e5d469b70d258230ca",
        "labelsTr/hippocampus_243.nii.gz": "d9a0ce592c0b28d1c042c9a8d5b0a0a7dadbc762068e651e3004bbe77f103c01",
        "labelsTr/hippocampus_320.nii.gz": "bb90d6a3344ef513a50ef7946788e4cc72ea623739dd528a1295d705725195db",
    }
    assert {path: hashlib.sha256((SHIPPED / path).read_bytes()).hexdigest() for path in sums} == sums


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_own_volumes_are_found_with_all_their_channels(make_dataset, ending):
    dataset = read_dataset(make_dataset(num_cases=5, num_channels=2, ending=ending))
    assert [case.name for case in dataset.cases] == [f"case_{i}" for i in range(5)]
    assert [case.name for case in dataset.unseen] == ["case_3", "case_4"]
    assert all(len(case.images) == 2 for case in dataset.cases)
    check_volumes(dataset)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Dataset123_Liver", "Dataset123_Liver"),
        ("my livers (2024)", "Dataset999_my_livers_2024"),
        ("Dataset1_Short", "Dataset999_Dataset1_Short"),
        ("Dataset123_Two__Underscores", "Dataset999_Dataset123_Two_Underscores"),
    ],
    ids=["nnU-Net's style", "any name", "two digits missing", "nnU-Net's separator"],
)
def test_a_folder_of_any_name_gets_a_name_that_nnunet_accepts(make_dataset, folder, name):
    assert read_dataset(make_dataset(folder)).name == name


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def rename_all(folder):
    for path in [*folder.glob("imagesTr/*"), *folder.glob("labelsTr/*")]:
        path.rename(path.with_name(path.name.replace(".nii.gz", ".mha")))


def drop_folder(name):
    def drop(folder):
        for path in (folder / name).iterdir():
            path.unlink()
        (folder / name).rmdir()

    return drop


def empty_folder(name):
    return lambda folder: [path.unlink() for path in (folder / name).iterdir()]


def edit(**changes):
    def change(folder):
        path = folder / "dataset.json"
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


WRONG_NAMES = {
    "no dataset.json": (remove("dataset.json"), "no file .*dataset.json; expected nnU-Net raw layout"),
    "broken dataset.json": (lambda folder: (folder / "dataset.json").write_text("{"), "not readable JSON"),
    "dataset.json is a list": (lambda folder: (folder / "dataset.json").write_text("[]"), "no usable entry"),
    "no file ending": (edit(file_ending=None), "no usable entry 'file_ending'"),
    "labels as a list": (edit(labels=["a", "b"]), "no usable entry 'labels'"),
    "labels as words": (edit(labels={"background": 0, "a": "1"}), "labels as whole numbers"),
    "background only": (edit(labels={"background": 0}), "at least one structure"),
    "no background": (edit(labels={"a": 1, "b": 2}), "background 0"),
    "ignore label": (edit(labels={"background": 0, "a": 1, "ignore": 2}), "ignore label"),
    "unknown ending": (edit(file_ending=".png"), r"the demo reads \.nii\.gz"),
    "no images folder": (drop_folder("imagesTr"), "has no imagesTr"),
    "no labels folder": (drop_folder("labelsTr"), "has no labelsTr"),
    "no images": (empty_folder("imagesTr"), r"no file named CASE_0000\.nii\.gz: it is empty"),
    "no labels": (empty_folder("labelsTr"), "case case_0 has no labelsTr/case_0.nii.gz"),
    "other ending than stated": (rename_all, r"it holds 4 other file\(s\) such as case_0_0000.mha"),
    "one label missing": (remove("labelsTr/case_2.nii.gz"), "case case_2 has no labelsTr/case_2.nii.gz"),
    "a channel missing": (edit(channel_names={"0": "a", "1": "b"}), "has no imagesTr/case_0_0001.nii.gz"),
    "two cases": (
        remove(*(f"imagesTr/case_{i}_0000.nii.gz" for i in (2, 3))),
        r"has 2 case\(s\); the demo needs at least 3",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG_NAMES.values(), ids=WRONG_NAMES)
def test_a_wrong_layout_is_one_line_with_cause_and_remedy(make_dataset, spoil, message):
    folder = make_dataset()
    spoil(folder)
    with pytest.raises(CommandError, match=message) as caught:
        read_dataset(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CommandError, match=f"no folder {tmp_path / 'nowhere'}"):
        read_dataset(tmp_path / "nowhere")


SHAPE = (20, 24, 28)
IMAGE, LABEL = "imagesTr/case_1_0000.nii.gz", "labelsTr/case_1.nii.gz"
WRONG_VOLUMES = {
    "other shape": (IMAGE, np.zeros((20, 24, 27), np.float32), (1, 1, 1), "has shape .*, its label map"),
    "other spacing": (IMAGE, np.zeros(SHAPE, np.float32), (2, 1, 1), "has spacing .*, its label map"),
    "2D": (IMAGE, np.zeros((24, 28), np.float32), (1, 1), "expected 3 axes"),
    "unknown label": (LABEL, np.full(SHAPE, 7, np.uint8), (1, 1, 1), "label map holds 7, dataset.json names 0, 1, 2"),
    "half a label": (LABEL, np.full(SHAPE, 0.5, np.float32), (1, 1, 1), "label map holds 0.5"),
}


@pytest.mark.parametrize(("part", "array", "spacing", "message"), WRONG_VOLUMES.values(), ids=WRONG_VOLUMES)
def test_a_volume_that_does_not_fit_is_named(make_dataset, write_volume, part, array, spacing, message):
    folder = make_dataset()
    write_volume(folder / part, array, spacing)
    with pytest.raises(CommandError, match=f"case case_1: .*{message}") as caught:
        check_volumes(read_dataset(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_a_volume_that_is_not_finite_is_named(make_dataset, write_volume, value, ending):
    folder = make_dataset(ending=ending)
    array = np.zeros(SHAPE, np.float32)
    array[1, 2, 3] = value
    write_volume(folder / f"imagesTr/case_1_0000{ending}", array)
    with pytest.raises(CommandError, match=r"case case_1: .* holds NaN or infinity"):
        check_volumes(read_dataset(folder))


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_a_truncated_file_is_named(make_dataset, ending):
    folder = make_dataset(ending=ending)
    path = folder / f"imagesTr/case_1_0000{ending}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CommandError, match=r"case case_1: .*case_1_0000") as caught:
        check_volumes(read_dataset(folder))
    assert "\n" not in str(caught.value)


def test_a_compressed_file_with_a_wrong_checksum_is_named(make_dataset):
    folder = make_dataset()
    content = bytearray((folder / IMAGE).read_bytes())
    # The last eight bytes of a gzip stream are its checksum and its length.
    content[-8] ^= 0xFF
    (folder / IMAGE).write_bytes(content)
    with pytest.raises(CommandError, match=r"case case_1: case_1_0000\.nii\.gz is damaged or truncated"):
        check_volumes(read_dataset(folder))


def test_all_cases_with_problems_are_counted(make_dataset, write_volume):
    folder = make_dataset()
    for number in range(3):
        write_volume(folder / f"labelsTr/case_{number}.nii.gz", np.full(SHAPE, 9, np.uint8))
    with pytest.raises(CommandError, match=r"case case_0: .*\(and 2 more cases with problems\)"):
        check_volumes(read_dataset(folder))


def test_labels_of_a_region_are_known_labels(make_dataset):
    folder = make_dataset(labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    dataset = read_dataset(folder)
    check_volumes(dataset)
    assert dataset.structures == {"whole": [1, 2], "core": 2}
