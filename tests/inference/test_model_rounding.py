"""Packages with rounded weights and limited scans: what a network gets of them, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from medmamba import cli
from medmamba.inference.model import ModelRefused, convert_model, export_model, load_model
from medmamba.inference.model.architecture import Blueprint
from medmamba.inference.model.rounding import PRECISIONS, SCALE, check_int8, decoded, encoded, layout
from medmamba.inference.model.tensors import to_bytes
from medmamba.mixers import scan_names

TESTS = Path(__file__).resolve().parents[1]
SHIPPED = TESTS / "data" / "models" / "hippocampus"
ROUNDED = ("bfloat16", "int8")
SCAN_PARAMETERS = ("A_log", "D", "dt_bias", "dt_proj", "x_proj")


@pytest.fixture(scope="module")
def scanning(tmp_path_factory, make_trained):
    """A trained folder of a network with scans, two folds."""
    return make_trained(tmp_path_factory.mktemp("scanning"), "vmunet", folds=("0", "1"))


@pytest.fixture(scope="module")
def source(tmp_path_factory, scanning):
    return export_model(scanning.folder, tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def int8(source, tmp_path) -> Path:
    return convert_model(source, tmp_path / "int8", precision="int8").path


def limits_of(model, value: float = 0.5) -> dict:
    names = scan_names(model.network("0"))
    limits = {fold: dict.fromkeys(names, value) for fold in model.folds}
    return {"quantile": 0.9999, "cases": 3, "limits": limits}


def refused(code: str, folder: Path) -> str:
    with pytest.raises(ModelRefused) as error:
        load_model(folder)
    assert error.value.code == code, error.value
    return str(error.value)


def rewrite(folder: Path, reseal, change) -> None:
    """Change the tensors of fold 0, in a file that still names its model, with new checksums."""
    path = folder / "fold_0.safetensors"
    tensors = load_file(path)
    change(tensors)
    binding = hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()
    path.write_bytes(to_bytes(tensors, binding, "0"))
    reseal(folder)


def blueprint(axis: int, *shape: int) -> Blueprint:
    return Blueprint({"w": torch.empty(*shape, device="meta")}, {"w": "w"}, {"w": axis}, [])


# One weight.


@settings(deadline=None, max_examples=100)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    exponent=st.integers(-44, 37),
    seed=st.integers(0, 99),
    axis=st.integers(0, 1),
)
def test_int8_is_off_by_at_most_half_a_step_of_its_channel(shape, exponent, seed, axis):
    plan = blueprint(axis, *shape)
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    w = torch.where(w.isfinite(), w, 0)
    w.select(axis, 0).zero_()
    stored = encoded("w", w, plan, "int8", Path("file"))
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == layout(plan, "int8")
    for name, tensor in stored.items():
        check_int8(Path("file"), name, tensor)
    loaded = decoded(stored, plan)["w"]
    assert loaded.dtype == torch.float32
    step = stored["w" + SCALE].double().view([-1 if each == axis else 1 for each in range(len(shape))])
    # float32 rounds the quotient and the product as well, and below 1e-38 has fewer digits.
    assert ((loaded.double() - w.double()).abs() <= step * 0.5001 + 2e-45 * 127).all()
    again = encoded("w", loaded, plan, "int8", Path("file"))
    assert torch.equal(decoded(again, plan)["w"], loaded) or exponent < -30


def test_a_channel_at_the_ends_of_its_range_is_exact():
    w = torch.tensor([[127.0, -127.0, 0.0, 64.0], [0.5, -0.25, 0.0, 0.5]])
    stored = encoded("w", w, blueprint(0, 2, 4), "int8", Path("file"))
    assert stored["w"].tolist() == [[127, -127, 0, 64], [127, -64, 0, 127]]
    assert stored["w" + SCALE].tolist() == pytest.approx([1.0, 0.5 / 127])


def test_what_bfloat16_cannot_hold_is_refused():
    w = torch.full((2, 2), torch.finfo(torch.float32).max)
    with pytest.raises(ModelRefused) as error:
        encoded("w", w, blueprint(0, 2, 2), "bfloat16", Path("file"))
    assert error.value.code == "MM-MD-036"


# A package.


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("network", ["vmunet", "mednext", "ResidualEncoderUNet"])
def test_a_package_holds_the_rounded_weights_of_the_training(network, precision, make_trained, tmp_path):
    trained = make_trained(tmp_path, network)
    model = export_model(trained.folder, tmp_path / "model", precision=precision)
    loaded = load_model(tmp_path / "model").network("0")
    original = trained.networks["0"].state_dict()
    assert loaded.state_dict().keys() == original.keys()
    linear = {
        f"{path}.weight"
        for path, module in loaded.named_modules(remove_duplicate=False)
        if isinstance(module, torch.nn.Linear | torch.nn.modules.conv._ConvNd)
    }
    assert linear
    changed = set()
    for key, tensor in loaded.state_dict().items():
        assert tensor.dtype == original[key].dtype
        if not torch.equal(tensor, original[key]):
            changed.add(key)
            assert (tensor - original[key]).abs().max() <= original[key].abs().max() / 2 ** (7 if key in linear else 10)
    assert changed <= (set() if precision == "float32" else linear if precision in ROUNDED else set(original))
    assert precision == "float32" or len(changed & linear) > len(linear) / 2
    stored = load_file(tmp_path / "model" / "fold_0.safetensors")
    assert {t.dtype for name, t in stored.items() if name.rpartition(".")[2] in SCAN_PARAMETERS} <= {
        torch.float16 if precision == "float16" else torch.float32
    }
    assert model.description.precision == precision
    assert json.loads((tmp_path / "model" / "model.json").read_text())["format"] == (2 if precision in ROUNDED else 1)


def test_the_channels_of_every_weight_have_their_own_scale(make_trained, tmp_path):
    """Scaling an output channel of a layer scales its stored weights' scale and nothing else."""
    trained = make_trained(tmp_path, "mednext")
    model = export_model(trained.folder, tmp_path / "model", precision="int8")
    stored = load_file(model.path / "fold_0.safetensors")
    network = trained.networks["0"]
    kinds = set()
    for path, module in network.named_modules():
        if not isinstance(module, torch.nn.modules.conv._ConvNd):
            continue
        kinds.add((type(module).__name__, module.groups > 1))
        if f"{path}.weight{SCALE}" in stored:
            assert stored[f"{path}.weight{SCALE}"].shape == (module.out_channels,)
    assert ("ConvTranspose3d", True) in kinds
    assert ("Conv3d", True) in kinds


def test_sizes_fall_with_the_precision(tmp_path):
    """Of the shipped model, in which 77 % of the weights are of convolutions and linear maps."""
    model, sizes = load_model(SHIPPED), {}
    for precision in PRECISIONS:
        convert_model(model, tmp_path / precision, precision=precision)
        sizes[precision] = (tmp_path / precision / "fold_0.safetensors").stat().st_size
    share = 412_928 / model.parameters
    for precision, bytes_per_rounded in {"float32": 4, "bfloat16": 2, "int8": 1}.items():
        expected = model.parameters * (4 - share * (4 - bytes_per_rounded))
        assert sizes[precision] == pytest.approx(expected, rel=0.03)  # headers and scales


def test_old_packages_are_read_as_they_are():
    content = json.loads((SHIPPED / "model.json").read_text())
    assert content["format"] == 1
    assert "scan_input" not in content
    model = load_model(SHIPPED)
    assert model.description.scan_input is None
    assert model.description.to_bytes() == (SHIPPED / "model.json").read_bytes()


# Limits.


def test_limits_clip_what_the_scans_of_each_fold_read(source, tmp_path):
    given = limits_of(source, 0.01)
    given["limits"]["1"] = dict.fromkeys(given["limits"]["1"], 1e6)
    model = convert_model(source, tmp_path / "clipped", precision="float32", scan_input=given)
    assert load_model(model.path).description.scan_input == given
    read: list[float] = []
    for fold in model.folds:
        network = model.network(fold)
        for name in scan_names(network):
            network.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs: read.append(float(inputs[0].abs().max()))
            )
        with torch.no_grad():
            network(1e3 * torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)))
    half = len(read) // 2
    assert max(read[:half]) == pytest.approx(0.01)
    assert max(read[half:]) > 0.05


def test_calibrated_limits_are_quantiles_of_what_the_scans_read(source, write_image, tmp_path):
    from medmamba.inference.calibrate import scan_input_limits

    (tmp_path / "images").mkdir()
    for seed in (0, 1):
        values = np.random.default_rng(seed).integers(0, 100, (8, 8, 8)).astype(np.int16)
        write_image(tmp_path / "images" / f"{seed}.nii.gz", values=values)
    lines: list[str] = []
    half, whole = (scan_input_limits(source, tmp_path / "images", q, say=lines.append) for q in (0.5, 1.0))
    assert whole["cases"] == 2
    assert len(lines) == 2 * 2 * 2
    assert half["limits"].keys() == {"0", "1"}
    assert half["limits"]["0"] != half["limits"]["1"]
    for fold, limits in half["limits"].items():
        assert sorted(limits) == sorted(scan_names(source.network(fold)))
        assert all(0 < limit < whole["limits"][fold][name] for name, limit in limits.items())


# Copies.


def test_a_copy_is_not_copied_again(source, int8, tmp_path):
    clipped = convert_model(source, tmp_path / "clipped", precision="float32", scan_input=limits_of(source))
    for model in (load_model(int8), clipped):
        with pytest.raises(ModelRefused) as error:
            convert_model(model, tmp_path / "again", precision="int8")
        assert error.value.code == "MM-MD-038"
    assert not (tmp_path / "again").exists()


def test_a_copy_keeps_what_authors_wrote_and_says_what_was_done(source, tmp_path):
    model = load_model(SHIPPED)
    copy = convert_model(model, tmp_path / "copy", precision="int8")
    assert copy.card.startswith(model.card.rstrip("\n"))
    assert f"Made from the package {model.id}" in copy.card
    assert "rounded to int8" in copy.card
    assert copy.id != model.id
    fresh = convert_model(source, tmp_path / "fresh", precision="int8", scan_input=limits_of(source))
    assert "Smaller copy" not in fresh.card
    assert "parameters, int8;" in fresh.card
    assert "0.9999 quantile" in fresh.card


def test_the_command_line_makes_copies_and_calibrated_packages(scanning, source, write_image, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images" / "a.nii.gz", values=np.arange(512, dtype=np.int16).reshape(8, 8, 8))
    clipping = ["--scan-input-quantile", "0.999", "--calibrate-on", str(tmp_path / "images")]
    for name, run in {"run": scanning.folder, "package": source.path}.items():
        out = tmp_path / name
        assert cli.main(["export", str(run), "-o", str(out), "--weights", "int8", *clipping]) == 0
        printed = capsys.readouterr().out
        model = load_model(out)
        size = sum(path.stat().st_size for path in out.iterdir())
        assert f"{size / 1e6:.2f} MB" in printed
        assert (model.description.precision, model.description.scan_input["quantile"]) == ("int8", 0.999)
        assert cli.main(["info", str(out)]) == 0
        assert "clipped at the 0.999 quantile of 1 cases" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"images", "run", "package"}
    weights = [load_model(tmp_path / name).network("0").state_dict() for name in ("run", "package")]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scan-input-quantile", "0.999"], "belong together"),
        (["--calibrate-on", "images"], "belong together"),
        (["--weights", "int8", "--fold", "0"], "takes no --fold"),
        ([], "wants --weights"),
        (["--scan-input-quantile", "0.999", "--calibrate-on", "nowhere"], "holds no image"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message, source, tmp_path, capsys):
    assert cli.main(["export", str(source.path), "-o", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_network_without_scans_has_nothing_to_clip(package, write_image, tmp_path, capsys):
    write_image(tmp_path / "a.nii.gz")
    options = ["--scan-input-quantile", "0.999", "--calibrate-on", str(tmp_path / "a.nii.gz")]
    assert cli.main(["export", str(package), "-o", str(tmp_path / "out"), *options]) == 2
    assert "no scan" in capsys.readouterr().err


# Refusals.


def a_scale(tensors) -> str:
    return next(name for name in tensors if name.endswith(SCALE))


@pytest.mark.parametrize("value", [0.0, -1.0, 3e36, math.nan, math.inf])
def test_scales_that_no_export_writes_are_refused(value, int8, reseal):
    def change(tensors) -> None:
        tensors[a_scale(tensors)][-1] = value

    rewrite(int8, reseal, change)
    refused("MM-MD-019" if math.isfinite(value) else "MM-MD-017", int8)


def test_an_int8_weight_below_minus_127_is_refused(int8, reseal):
    def change(tensors) -> None:
        tensors[a_scale(tensors).removesuffix(SCALE)].view(-1)[0] = -128

    rewrite(int8, reseal, change)
    assert "below -127" in refused("MM-MD-019", int8)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(a_scale(tensors)),
        lambda tensors: tensors.update({"extra" + SCALE: torch.ones(1)}),
        lambda tensors: tensors.update({a_scale(tensors): tensors[a_scale(tensors)].double()}),
        lambda tensors: tensors.update({a_scale(tensors): tensors[a_scale(tensors)][:1].repeat(999)}),
        lambda tensors: tensors.update(
            {a_scale(tensors).removesuffix(SCALE): tensors[a_scale(tensors).removesuffix(SCALE)].float()}
        ),
    ],
    ids=["missing", "unknown", "float64", "another length", "weight in float32"],
)
def test_scales_that_do_not_fit_are_refused(change, int8, reseal):
    rewrite(int8, reseal, change)
    refused("MM-MD-015", int8)


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "int4"},
        {"precision": "float32"},
        {"format": 1},
        {"scan_input": {}},
        {"scan_input": {"quantile": 0.9, "cases": 1, "limits": {}}},
        {"scan_input": {"quantile": 0.9, "cases": 1, "limits": {"0": {}, "1": {}}}},
        {"scan_input": {"quantile": 0.9, "cases": 1, "limits": {"0": {"stem": 1.0}, "1": {"stem": 1.0}}}},
    ],
    ids=str,
)
def test_values_that_format_2_does_not_know_are_refused(change, int8, change_model):
    change_model(int8, lambda content: content.update(change))
    refused("MM-MD-009", int8)


@pytest.mark.parametrize(
    ("key", "value"), [("quantile", 0), ("quantile", 2), ("cases", 0), ("limit", 0), ("limit", "1")]
)
def test_limits_that_are_none_are_refused(key, value, source, change_model, tmp_path):
    model = convert_model(source, tmp_path / "out", precision="float32", scan_input=limits_of(source))

    def change(content) -> None:
        if key == "limit":
            content["scan_input"]["limits"]["0"][scan_names(source.network("0"))[0]] = value
        else:
            content["scan_input"][key] = value

    change_model(model.path, change)
    assert "scan_input" in refused("MM-MD-009", model.path)
