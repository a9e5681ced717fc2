"""Loading: everything that is not exactly a package is refused, with the id that says why."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from medmamba.inference.model import PROBLEMS, ModelRefused, load_model
from medmamba.inference.model.tensors import BINDING, FOLD, to_bytes

CONFIGURATION = ("plans", "configurations", "3d_fullres")
ARCHITECTURE = (*CONFIGURATION, "architecture")
ARGUMENTS = (*ARCHITECTURE, "arch_kwargs")
DNA = "dynamic_network_architectures.architectures"


def refused(code: str, folder: Path) -> str:
    with pytest.raises(ModelRefused) as error:
        load_model(folder)
    assert error.value.code == code, error.value
    assert "\n" not in str(error.value)
    return str(error.value)


def put(content, path, value) -> None:
    """Put a value at a path of keys; ``...`` as the value deletes."""
    *parents, last = path
    for key in parents:
        content = content[key]
    if value is ...:
        del content[last]
    else:
        content[last] = value


# The folder and its checksums.


def test_a_folder_that_is_no_package_is_refused(tmp_path, copied):
    refused("MM-MD-001", tmp_path / "missing")
    (tmp_path / "file").write_text("")
    refused("MM-MD-001", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "has no SHA256SUMS" in refused("MM-MD-001", tmp_path / "empty")
    (copied / "model.json").unlink()
    assert "has no model.json" in refused("MM-MD-001", copied)


@pytest.mark.parametrize("file", ["model.json", "fold_0.safetensors", "MODEL_CARD.md", "SHA256SUMS"])
def test_a_link_is_not_followed(file, copied, tmp_path):
    (copied / file).rename(tmp_path / "elsewhere")
    (copied / file).symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link" in refused("MM-MD-002", copied)


def test_a_package_may_be_reached_through_a_link(copied, tmp_path):
    (tmp_path / "current").symlink_to(copied)
    assert load_model(tmp_path / "current").folds == ("0", "1")


def test_a_pipe_and_a_folder_are_refused_without_waiting(copied):
    (copied / "fold_0.safetensors").unlink()
    os.mkfifo(copied / "fold_0.safetensors")
    assert "is a special file" in refused("MM-MD-002", copied)
    (copied / "fold_0.safetensors").unlink()
    (copied / "fold_0.safetensors").mkdir()
    assert "is a folder" in refused("MM-MD-002", copied)


@pytest.mark.parametrize(
    "name",
    [
        "../model.json",
        "/etc/passwd",
        "sub/model.json",
        "..",
        "fold_0.safetensors/",
        "~/x",
        "model.json ",
        "fold_00.safetensors",
    ],
)
def test_a_name_that_leads_out_of_the_package_is_refused(name, copied):
    with (copied / "SHA256SUMS").open("a") as stream:
        stream.write(f"{'0' * 64}  {name}\n")
    refused("MM-MD-002", copied)


def test_a_missing_file_is_named(copied):
    (copied / "fold_1.safetensors").unlink()
    assert "has no fold_1.safetensors" in refused("MM-MD-003", copied)


def test_a_fold_that_model_json_names_is_needed(copied, reseal):
    (copied / "fold_1.safetensors").unlink()
    reseal(copied)
    assert "has no fold_1.safetensors" in refused("MM-MD-003", copied)


@pytest.mark.parametrize("name", ["fold_2.safetensors", "notes.txt", "model.pth", ".DS_Store", "a\nb"])
def test_a_file_too_many_is_named(name, copied, reseal):
    (copied / name).write_text("x")
    refused("MM-MD-004", copied)


def test_a_fold_that_model_json_does_not_name_is_refused(copied, reseal):
    shutil.copy(copied / "fold_1.safetensors", copied / "fold_2.safetensors")
    reseal(copied)
    assert "fold_2.safetensors" in refused("MM-MD-004", copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text + text,
        lambda text: text.upper(),
        lambda text: text.replace("  ", " *"),
        lambda text: text[1:],
        lambda text: "\n" + text,
        lambda text: "\x00" + text,
    ],
    ids=["empty", "twice", "capitals", "binary mark", "short", "blank line", "zero"],
)
def test_checksums_of_another_form_are_refused(change, copied):
    path = copied / "SHA256SUMS"
    path.write_text(change(path.read_text()))
    refused("MM-MD-005", copied)


@pytest.mark.parametrize("file", ["model.json", "fold_1.safetensors", "MODEL_CARD.md"])
def test_a_changed_file_is_refused(file, copied):
    with (copied / file).open("ab") as stream:
        stream.write(b"\n")
    assert file in refused("MM-MD-006", copied)


def test_a_fold_that_changes_after_the_check_is_refused(copied):
    model = load_model(copied)
    path = copied / "fold_0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelRefused, match="MM-MD-006"):
        model.network(0)
    model.network(1)
    path.unlink()
    path.symlink_to(copied / "fold_1.safetensors")
    with pytest.raises(ModelRefused, match="MM-MD-003"):
        model.network(0)


# model.json and the card.


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b'{"format": NaN}',
        b'{"format": 1, "format": 1}',
        b"[" * 100_000,
        b'{"name": "\\ud800"}',
        b"1" * 10_000,
    ],
    ids=["empty", "cut off", "no utf-8", "nan", "twice", "deep", "half a pair", "long number"],
)
def test_text_that_is_no_json_is_refused(content, copied, reseal):
    (copied / "model.json").write_bytes(content)
    reseal(copied)
    refused("MM-MD-007", copied)


def test_texts_that_are_too_long_are_refused_unread(copied, reseal):
    with (copied / "model.json").open("r+b") as stream:
        stream.truncate(2**34)  # without blocks on the disk
    assert "more than 16777216 bytes" in refused("MM-MD-007", copied)


def test_a_card_that_is_no_text_is_refused(copied, reseal):
    (copied / "MODEL_CARD.md").write_bytes(b"\xff")
    reseal(copied)
    refused("MM-MD-007", copied)


def test_a_newer_format_asks_for_a_newer_version(copied, change_model):
    change_model(copied, lambda content: content.update(format=3, something_new=True))
    assert "install" in refused("MM-MD-008", copied)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 0),
        (("format",), True),
        (("format",), "1"),
        (("something_new",), 1),
        (("name",), ...),
        (("name",), ""),
        (("name",), 3),
        (("created",), "yesterday"),
        (("configuration",), "2d"),
        (("plans",), []),
        (("plans", "transpose_forward"), [0, 1, 1]),
        (("plans", "transpose_backward"), [1, 0, 2]),
        (("plans", "something"), 1),
        (("plans", "foreground_intensity_properties_per_channel"), {}),
        ((*CONFIGURATION, "spacing"), [1.0, 1.0]),
        ((*CONFIGURATION, "spacing"), [1.0, 1.0, 0.0]),
        ((*CONFIGURATION, "spacing"), [1.0, 1.0, 1e-9]),
        ((*CONFIGURATION, "spacing"), [1.0, 1.0, True]),
        ((*CONFIGURATION, "patch_size"), [8, 8, 9]),
        ((*CONFIGURATION, "patch_size"), [8, 8]),
        ((*CONFIGURATION, "patch_size"), [2**14] * 3),
        ((*CONFIGURATION, "patch_size"), [-8, 8, 8]),
        ((*CONFIGURATION, "normalization_schemes"), []),
        ((*CONFIGURATION, "use_mask_for_norm"), [0]),
        ((*CONFIGURATION, "resampling_fn_data_kwargs", "order"), 99),
        ((*CONFIGURATION, "inherits_from"), "3d_fullres"),
        ((*ARGUMENTS, "strides"), [[1, 1, 1]] + [[3, 2, 2]] * 2),
        ((*ARGUMENTS, "n_conv_per_stage"), 10**9),
        ((*ARGUMENTS, "features_per_stage"), [8] * 1000),
        ((*ARGUMENTS, "norm_op_kwargs"), {"eps": 1e-5, "device": "cuda"}),
        ((*ARGUMENTS, "nonlin_kwargs"), [[[[[[1]]]]]]),
        ((*ARCHITECTURE, "_kw_requires_import"), ["conv_op"]),
        ((*ARCHITECTURE, "_kw_requires_import"), ["strides"]),
        (("dataset", "labels", "background"), 1),
        (("dataset", "labels", "Posterior"), 3),
        (("dataset", "labels", "Posterior"), 1),
        (("dataset", "labels", "Posterior"), [1, 2]),
        (("dataset", "labels", "ignore"), 2),
        (("dataset", "channel_names"), {}),
        (("dataset", "channel_names"), {"1": "MRI"}),
        (("dataset", "training"), []),
        (("fingerprint", "cases"), 0),
        (("fingerprint", "percentiles"), [0, 100]),
        (("fingerprint", "spacing_mm", 0), [9.0, 9.0, 9.0]),
        (("orientation",), "SAR"),
        (("orientation",), "RAS"),
        (("inference_allowed_mirroring_axes",), [3]),
        (("inference_allowed_mirroring_axes",), [0, 0]),
        (("epochs",), {}),
        (("epochs", "../../fold_0"), 1),
        (("epochs", "0"), -1),
        (("precision",), "int8"),
        (("versions",), {"torch": 2}),
        (("intended_use",), "Diagnosis."),
        (("licence",), 5),
        (("metrics", "folds", "0", "cases"), "1"),
        (("metrics", "folds", "0", "foreground_mean", "Dice"), "good"),
        (("citation",), "text"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else repr(value)[:40],
)
def test_a_wrong_value_is_named(path, value, copied, change_model):
    change_model(copied, lambda content: put(content, path, value))
    refused("MM-MD-009", copied)


def test_labels_of_another_network_are_refused(copied, change_model):
    change_model(copied, lambda content: put(content, ("dataset", "labels"), {"background": 0, "both": 1}))
    refused("MM-MD-015", copied)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*ARCHITECTURE, "network_class_name"), "os.system"),
        ((*ARCHITECTURE, "network_class_name"), "medmamba.cli.main"),
        ((*ARCHITECTURE, "network_class_name"), f"{DNA}.resnet.ResNetD"),
        ((*ARCHITECTURE, "network_class_name"), "PlainConvUNet"),
        ((*ARGUMENTS, "conv_op"), "torch.nn.Conv2d"),
        ((*ARGUMENTS, "conv_op"), "subprocess.Popen"),
        ((*ARGUMENTS, "norm_op"), "builtins.eval"),
        ((*ARGUMENTS, "nonlin"), "torch.nn.modules.conv.Conv3d"),
        ((*ARGUMENTS, "dropout_op"), {}),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else str(value),
)
def test_a_class_that_is_not_on_the_list_is_refused_and_not_imported(path, value, copied, change_model):
    before = set(sys.modules)
    change_model(copied, lambda content: put(content, path, value))
    refused("MM-MD-010", copied)
    assert not {name for name in set(sys.modules) - before if name.endswith("resnet")}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("plans", "image_reader_writer"), "os"),
        (("plans", "label_manager"), "Path"),
        ((*CONFIGURATION, "preprocessor_name"), "join"),
        ((*CONFIGURATION, "normalization_schemes"), ["ABC"]),
        ((*CONFIGURATION, "resampling_fn_data"), "recursive_find_python_class"),
        ((*CONFIGURATION, "resampling_fn_data_kwargs", "device"), "cuda"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else str(value),
)
def test_a_part_of_the_preprocessing_that_is_not_on_the_list_is_refused(path, value, copied, change_model):
    change_model(copied, lambda content: put(content, path, value))
    refused("MM-MD-011", copied)


# Network and weights.


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*ARGUMENTS, "no_such_argument"), 1),
        ((*ARGUMENTS, "deep_supervision"), True),
        ((*ARGUMENTS, "num_classes"), 5),
        ((*ARGUMENTS, "n_stages"), 2),
        ((*ARGUMENTS, "strides"), [[1, 1, 1], [2, 2, 2]]),
        ((*ARGUMENTS, "n_conv_per_stage"), "two"),
        ((*ARGUMENTS, "kernel_sizes"), None),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else repr(value),
)
def test_arguments_that_the_network_refuses_are_named(path, value, copied, change_model):
    change_model(copied, lambda content: put(content, path, value))
    refused("MM-MD-012", copied)


@pytest.mark.parametrize("key", ["n_conv_per_stage", "n_conv_per_stage_decoder"])
def test_a_network_far_larger_than_its_weights_is_not_built(key, copied, change_model):
    change_model(copied, lambda content: put(content, (*ARGUMENTS, key), 2**16))
    refused("MM-MD-013", copied)


def test_a_layer_of_terabytes_is_not_allocated(copied, change_model):
    """In float32 its convolutions would take 3 x 65536^2 x 27 x 4 bytes: more than a terabyte."""
    change_model(copied, lambda content: put(content, (*ARGUMENTS, "features_per_stage"), [2**16] * 3))
    assert "of another shape" in refused("MM-MD-015", copied)


@pytest.mark.parametrize("size", [0, 7, 8, 100, 0.5, -1])
def test_truncated_weights_are_refused(size, copied, reseal):
    path = copied / "fold_0.safetensors"
    whole = path.stat().st_size
    os.truncate(path, int(size * whole) if isinstance(size, float) else whole + size if size < 0 else size)
    refused("MM-MD-006", copied)
    reseal(copied)
    refused("MM-MD-014", copied)


def test_a_header_that_promises_more_than_the_file_holds_is_refused(copied, reseal):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (copied / "fold_0.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    reseal(copied)
    refused("MM-MD-014", copied)


def rewrite(copied: Path, change, reseal) -> None:
    """Change the tensors of fold 0, in a file that still names its model."""
    path = copied / "fold_0.safetensors"
    tensors = load_file(path)
    change(tensors)
    binding = hashlib.sha256((copied / "model.json").read_bytes()).hexdigest()
    path.write_bytes(to_bytes(tensors, binding, "0"))
    reseal(copied)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("1 missing", lambda tensors: tensors.popitem()),
        ("1 unknown", lambda tensors: tensors.update({"extra\x1b[31m": torch.zeros(1)})),
        (
            "shape or type",
            lambda tensors: tensors.update({name: t[..., :1] for name, t in tensors.items() if t.dim() == 5}),
        ),
        ("shape or type", lambda tensors: tensors.update({name: t.double() for name, t in tensors.items()})),
        ("shape or type", lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()})),
    ],
    ids=["missing", "unknown", "shape", "float64", "bfloat16"],
)
def test_weights_that_do_not_fit_are_refused(message, change, copied, reseal):
    rewrite(copied, change, reseal)
    text = refused("MM-MD-015", copied)
    assert message in text
    assert "\x1b" not in text


def test_weights_of_another_fold_or_model_are_refused(copied, reseal):
    shutil.copy(copied / "fold_1.safetensors", copied / "fold_0.safetensors")
    reseal(copied)
    refused("MM-MD-016", copied)
    save_file(load_file(copied / "fold_1.safetensors"), copied / "fold_0.safetensors", {BINDING: "0" * 64, FOLD: "0"})
    reseal(copied)
    refused("MM-MD-016", copied)
    save_file(load_file(copied / "fold_1.safetensors"), copied / "fold_0.safetensors")
    reseal(copied)
    refused("MM-MD-016", copied)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(value, copied, reseal):
    def change(tensors) -> None:
        tensors["decoder.seg_layers.0.bias"][1] = value

    rewrite(copied, change, reseal)
    assert "decoder.seg_layers.0.bias" in refused("MM-MD-017", copied)


@pytest.mark.parametrize("fold", [2, "all", "../0", "00", None])
def test_a_fold_that_is_not_there_is_named(fold, package):
    with pytest.raises(ModelRefused, match=r"MM-MD-018: .* it has 0, 1"):
        load_model(package).network(fold)


def test_a_model_cannot_be_changed_through_what_it_returns(package):
    model = load_model(package)
    model.plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"] = []
    model.configuration["spacing"] = []
    model.dataset_json["labels"] = {}
    model.description.plans.clear()
    assert model.network(0) is not None
    assert len(model.configuration["spacing"]) == 3
    assert len(model.labels) == 3


def test_a_model_does_not_depend_on_the_current_folder(package, tmp_path, monkeypatch):
    monkeypatch.chdir(package.parent)
    model = load_model(package.name)
    monkeypatch.chdir(tmp_path)
    assert model.network(0) is not None


def test_a_loaded_package_is_not_written_to(package):
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in package.iterdir()}
    load_model(package).network(0)
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in package.iterdir()} == before


def test_every_id_is_asserted_by_a_test():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_model_*.py"))
    assert set(re.findall(r"MM-MD-\d{3}", tests)) >= set(PROBLEMS)
