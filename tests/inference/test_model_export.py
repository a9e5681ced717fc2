"""Export: the package holds exactly the network of the trained folder, nothing else of it, and appears whole."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from medmamba.inference.model import PROBLEMS, ModelRefused, export_model, load_model, seal_card
from medmamba.inference.model.run import TRAINERS_THAT_FOLLOW_PLANS
from medmamba.networks import NETWORKS

REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
STOCK = ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet")


def refused(code, *arguments, **options):
    with pytest.raises(ModelRefused) as error:
        export_model(*arguments, **options)
    assert error.value.code == code, error.value
    return str(error.value)


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
@pytest.mark.parametrize("network", [*STOCK, *NETWORKS])
def test_a_package_holds_the_network_of_the_training(network, configuration, make_trained, tmp_path):
    trained = make_trained(tmp_path, network, configuration)
    model = export_model(trained.folder, tmp_path / "model")
    original = trained.networks["0"].eval()
    original.decoder.deep_supervision = False
    loaded = load_model(tmp_path / "model").network("0")
    assert not loaded.training
    assert loaded.decoder.deep_supervision is False
    weights = loaded.state_dict()
    assert weights.keys() == original.state_dict().keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in original.state_dict().items())
    x = torch.randn(1, 1, *[8] * len(model.configuration["patch_size"]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(x), original(x))
    assert model.parameters == sum(parameter.numel() for parameter in original.parameters())


def test_every_fold_has_its_own_weights(trained, package):
    model = load_model(package)
    assert model.folds == ("0", "1")
    for fold, original in trained.networks.items():
        loaded = model.network(int(fold)).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in original.state_dict().items())


def test_building_a_network_leaves_the_random_numbers_of_the_caller(package):
    model = load_model(package)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model.network("0")
    assert torch.equal(torch.rand(2), expected)


def test_a_package_says_what_nnunet_needs(trained, package):
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    model = load_model(package)
    stock = PlansManager(json.loads((trained.folder / "plans.json").read_text()))
    manager = PlansManager(model.plans)
    ours, theirs = manager.get_configuration("3d_fullres"), stock.get_configuration("3d_fullres")
    assert ours.configuration == theirs.configuration
    assert manager.transpose_forward == stock.transpose_forward
    assert manager.image_reader_writer_class is stock.image_reader_writer_class
    assert manager.foreground_intensity_properties_per_channel == stock.foreground_intensity_properties_per_channel
    assert list(model.plans["configurations"]) == ["3d_fullres"]
    assert model.configuration == ours.configuration
    assert model.configuration_name == "3d_fullres"
    assert model.orientation == "file"
    assert model.mirror_axes == (0, 1, 2)


def test_a_configuration_brings_what_it_inherits(make_trained, plans_of, tmp_path):
    plans = plans_of("PlainConvUNet")
    configurations = plans["configurations"]
    configurations["3d_small_batch"] = {"inherits_from": "3d_fullres", "batch_size": 2}
    architecture = {"architecture": configurations["3d_fullres"]["architecture"]}
    trained = make_trained(
        tmp_path,
        configuration="3d_small_batch",
        plans={
            **plans,
            "configurations": {
                **configurations,
                "3d_small_batch": {**configurations["3d_small_batch"], **architecture},
            },
        },
    )
    trained.change("plans.json", lambda content: content["configurations"]["3d_small_batch"].pop("architecture"))
    trained.checkpoints["0"]["init_args"]["plans"] = json.loads((trained.folder / "plans.json").read_text())
    trained.write("0")
    settings = export_model(trained.folder, tmp_path / "model").configuration
    expected = {**configurations["3d_fullres"], "batch_size": 2}
    assert settings == expected


def test_the_reorienting_reader_means_a_fixed_orientation(make_trained, plans_of, tmp_path):
    plans = {**plans_of("PlainConvUNet"), "image_reader_writer": "NibabelIOWithReorient"}
    trained = make_trained(tmp_path, plans=plans)
    assert export_model(trained.folder, tmp_path / "model").orientation == "SAR"


def test_labels_are_those_of_nnunet(package, make_trained, tmp_path):
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    plain = load_model(package)
    assert dict(plain.labels) == {0: "background", 1: "Anterior", 2: "Posterior"}
    assert plain.outputs.num_heads == LabelManager(plain.dataset_json["labels"], None).num_segmentation_heads == 3
    trained = make_trained(tmp_path, labels=REGIONS)
    model = export_model(trained.folder, tmp_path / "model")
    manager = LabelManager(model.dataset_json["labels"], model.dataset_json["regions_class_order"])
    assert model.outputs.num_heads == manager.num_segmentation_heads == 3
    as_tuples = tuple(region if isinstance(region, tuple) else (region,) for region in manager.foreground_regions)
    assert model.outputs.regions == as_tuples == ((1, 2, 3), (2, 3), (3,))
    assert list(model.outputs.region_values) == manager.regions_class_order
    assert model.outputs.ignore == manager.ignore_label == 4
    assert dict(model.labels) == {0: "background", 1: "whole", 2: "core", 3: "enhancing"}


def test_old_plans_get_the_architecture_that_nnunet_reads_into_them(make_trained, plans_of, tmp_path):
    plans = plans_of("PlainConvUNet")
    trained = make_trained(tmp_path, plans=plans)
    settings = plans["configurations"]["3d_fullres"]
    arguments = settings.pop("architecture")["arch_kwargs"]
    settings |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 8,
        "n_conv_per_stage_encoder": arguments["n_conv_per_stage"],
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [2, 2, 2],
        "pool_op_kernel_sizes": arguments["strides"],
        "conv_kernel_sizes": arguments["kernel_sizes"],
    }
    (trained.folder / "plans.json").write_text(json.dumps(plans))
    trained.checkpoints["0"]["init_args"]["plans"] = plans
    trained.write("0")
    model = export_model(trained.folder, tmp_path / "model")
    assert model.network_name == "PlainConvUNet"
    assert model.configuration["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8, 8]


def test_nothing_of_the_patients_goes_into_a_package(package):
    for path in package.iterdir():
        content = path.read_bytes()
        assert b"Jane_Doe" not in content, path
        assert b"/home/doe" not in content, path


def test_fingerprint_metrics_and_card(package):
    model = load_model(package)
    fingerprint = model.fingerprint
    assert fingerprint["cases"] == 2
    assert fingerprint["spacing_mm"][0] == [1.0, 1.0, 0.5]
    assert fingerprint["spacing_mm"][3] == [1.5, 1.0, 0.75]
    assert fingerprint["shape_vox"][-1] == [40.0, 50.0, 40.0]
    assert fingerprint["extent_mm"][-1] == [80.0, 50.0, 40.0]
    assert fingerprint["intensities"]["0"]["percentile_99_5"] == 8.0
    fold = model.description.metrics["folds"]["1"]
    assert fold == {
        "cases": 1,
        "foreground_mean": {"Dice": 0.75, "IoU": 0.6},
        "mean": {"1": {"Dice": 0.75, "IoU": 0.6}, "2": {"Dice": None, "IoU": None}},
    }
    for text in (
        "not a medical device",
        "Known failures",
        "Scanners",
        "Population",
        "| 0 | 1 | 1 | 0.7500 |",
        "CC-BY-4.0",
    ):
        assert text in model.card
    assert model.card.count("To be filled in") == 4
    assert model.description.intended_use == "Tests of medmamba. Research use only, not a medical device."


def test_an_unknown_licence_is_not_invented(trained, tmp_path):
    model = export_model(trained.folder, tmp_path / "model")
    assert model.description.licence is None
    assert "Not stated. Ask the authors" in model.card


def test_sha256sum_accepts_the_checksums(package):
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=package, check=True)


def test_half_rounds_to_float16_and_says_so(trained, package, tmp_path):
    model = export_model(trained.folder, tmp_path / "half", folds=[1], precision="float16")
    assert model.folds == ("1",)
    loaded, original = model.network("1").state_dict(), trained.networks["1"].state_dict()
    for key, tensor in original.items():
        assert loaded[key].dtype == torch.float32
        assert torch.equal(loaded[key], tensor.half().float())
    assert "rounded to float16" in model.card
    assert "rounded to float16" not in load_model(package).card
    assert (tmp_path / "half" / "fold_1.safetensors").stat().st_size < (package / "fold_1.safetensors").stat().st_size


def test_weights_beyond_float16_are_refused_in_half_only(make_trained, tmp_path):
    trained = make_trained(tmp_path)
    trained.checkpoints["0"]["network_weights"]["decoder.seg_layers.0.bias"][:] = 1e5
    trained.write("0")
    assert "reaches 1e+05" in refused("MM-MD-036", trained.folder, tmp_path / "model", precision="float16")
    export_model(trained.folder, tmp_path / "model")


def test_all_folds_but_fold_all_are_taken_unless_it_is_alone(make_trained, tmp_path):
    both = make_trained(tmp_path / "both", folds=("2", "all"))
    assert export_model(both.folder, tmp_path / "model").folds == ("2",)
    alone = make_trained(tmp_path / "alone", folds=("all",))
    assert export_model(alone.folder, tmp_path / "all").folds == ("all",)
    assert load_model(tmp_path / "all").network("all") is not None


def test_wrappers_around_a_network_are_taken_off(make_trained, tmp_path):
    trained = make_trained(tmp_path)
    weights = trained.checkpoints["0"]["network_weights"]
    trained.checkpoints["0"]["network_weights"] = {f"module._orig_mod.{key}": value for key, value in weights.items()}
    trained.write("0")
    loaded = export_model(trained.folder, tmp_path / "model").network(0).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in weights.items())


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_in_a_checkpoint_is_not_run(make_trained, tmp_path):
    trained = make_trained(tmp_path)
    trained.checkpoints["0"]["logging"] = Malicious(tmp_path / "was here")
    trained.write("0")
    message = refused("MM-MD-032", trained.folder, tmp_path / "model")
    assert "would run code" in message
    assert not (tmp_path / "was here").exists()
    torch.load(trained.folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert (tmp_path / "was here").exists(), "the file was not dangerous, and the test showed nothing"


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_truncated_checkpoint_is_refused(size, make_trained, tmp_path):
    trained = make_trained(tmp_path)
    os.truncate(trained.folder / "fold_0" / "checkpoint_final.pth", size)
    refused("MM-MD-032", trained.folder, tmp_path / "model")


def test_a_checkpoint_of_another_program_is_refused(make_trained, tmp_path):
    trained = make_trained(tmp_path)
    del trained.checkpoints["0"]["trainer_name"]
    trained.write("0")
    assert "lacks what nnU-Net writes" in refused("MM-MD-032", trained.folder, tmp_path / "model")


@pytest.mark.parametrize("file", ["plans.json", "dataset.json"])
def test_a_folder_that_no_training_wrote_is_refused(file, make_trained, tmp_path):
    trained = make_trained(tmp_path)
    path = trained.folder / file
    path.write_text("{")
    assert "cannot be read" in refused("MM-MD-030", trained.folder, tmp_path / "model")
    path.write_text("[]")
    assert "holds a list" in refused("MM-MD-030", trained.folder, tmp_path / "model")
    path.unlink()
    assert "is no trained folder" in refused("MM-MD-030", trained.folder, tmp_path / "model")


def test_a_missing_fold_is_named_with_what_there_is(make_trained, tmp_path):
    trained = make_trained(tmp_path, folds=("0", "1"))
    message = refused("MM-MD-031", trained.folder, tmp_path / "model", folds=[0, 3])
    assert "no checkpoint_final.pth in fold_3" in message
    trained.write("1", "checkpoint_best.pth")
    message = refused("MM-MD-031", trained.folder, tmp_path / "model", checkpoint="checkpoint_latest.pth")
    assert "in any fold" in message
    assert "checkpoint_best.pth" in message
    assert export_model(trained.folder, tmp_path / "model", checkpoint="checkpoint_best.pth").folds == ("1",)
    refused("MM-MD-031", trained.folder, tmp_path / "other", checkpoint="../fold_1/checkpoint_final.pth")


def test_the_second_stage_of_a_cascade_is_refused(make_trained, tmp_path):
    trained = make_trained(tmp_path)
    trained.change("plans.json", lambda plans: plans["configurations"]["3d_fullres"].update(previous_stage="3d_lowres"))
    assert "3d_lowres" in refused("MM-MD-033", trained.folder, tmp_path / "model")


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("plans", lambda c: c["init_args"]["plans"]["configurations"]["3d_fullres"].update(spacing=[2.0, 1.0, 1.0])),
        (
            "labels and channels",
            lambda c: c["init_args"]["dataset_json"].update(labels={"background": 0, "b": 1, "a": 2}),
        ),
        ("mirror axes", lambda c: c.update(inference_allowed_mirroring_axes=None)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_folds_that_were_not_trained_alike_are_refused(what, change, make_trained, tmp_path):
    trained = make_trained(tmp_path, folds=("0", "1"))
    content = torch.load(trained.folder / "fold_1" / "checkpoint_final.pth", weights_only=False)
    change(content)
    trained.checkpoints["1"] = content
    trained.write("1")
    assert f"with other {what} than" in refused("MM-MD-034", trained.folder, tmp_path / "model")
    export_model(trained.folder, tmp_path / "model", folds=["0"])


def test_a_trainer_that_may_build_another_network_needs_trust(make_trained, tmp_path):
    trained = make_trained(tmp_path)
    trained.checkpoints["0"]["trainer_name"] = "nnUNetTrainerSomebodyElse"
    trained.write("0")
    assert "--trust-plans" in refused("MM-MD-035", trained.folder, tmp_path / "model")
    assert export_model(trained.folder, tmp_path / "model", trust_plans=True).description.trainer.endswith(
        "SomebodyElse"
    )


def stock_trainers() -> dict[str, tuple[set[str], bool]]:
    """Trainer of the installed nnU-Net -> its bases, and whether it builds its network itself; nothing is imported."""
    import nnunetv2

    found = {}
    for path in (Path(nnunetv2.__path__[0]) / "training" / "nnUNetTrainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                functions = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                found[node.name] = (bases, "build_network_architecture" in functions and node.name != "nnUNetTrainer")
    return found


def test_every_trusted_trainer_builds_the_network_of_the_plans():
    trainers = stock_trainers()

    def builds_itself(name: str) -> bool:
        bases, own = trainers.get(name, (set(), False))
        return own or any(builds_itself(base) for base in bases)

    assert len(TRAINERS_THAT_FOLLOW_PLANS) > 50
    assert set(trainers) >= TRAINERS_THAT_FOLLOW_PLANS
    assert not [name for name in TRAINERS_THAT_FOLLOW_PLANS if builds_itself(name)]
    assert builds_itself("nnUNetTrainerBN")
    assert builds_itself("nnUNet_Primus_S_Trainer")


def test_weights_of_another_network_are_refused(make_trained, tmp_path):
    trained = make_trained(tmp_path)
    weights = trained.checkpoints["0"]["network_weights"]
    first = next(iter(weights))
    for name, changed in {
        "1 missing": {key: value for key, value in weights.items() if key != first},
        "1 unknown": {**weights, "extra.weight": torch.zeros(1)},
        "of another shape": {**weights, first: weights[first][..., :1]},
        "shape or type": {**weights, first: weights[first].double()},
    }.items():
        trained.checkpoints["0"]["network_weights"] = changed
        trained.write("0")
        assert name in refused("MM-MD-015", trained.folder, tmp_path / "model")


def test_two_names_of_one_tensor_with_two_values_are_refused(make_trained, tmp_path):
    trained = make_trained(tmp_path)
    weights = {key: value.clone() for key, value in trained.checkpoints["0"]["network_weights"].items()}
    weights[next(key for key in weights if key.startswith("decoder.encoder."))] += 1
    trained.checkpoints["0"]["network_weights"] = weights
    trained.write("0")
    assert "are one tensor of the network and differ" in refused("MM-MD-015", trained.folder, tmp_path / "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, make_trained, tmp_path):
    trained = make_trained(tmp_path)
    trained.checkpoints["0"]["network_weights"]["decoder.seg_layers.0.bias"][0] = value
    trained.write("0")
    assert "decoder.seg_layers.0.bias" in refused("MM-MD-017", trained.folder, tmp_path / "model")


def test_a_foreign_network_is_not_exported(make_trained, tmp_path):
    trained = make_trained(tmp_path)

    def rename(plans):
        plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "os.system"

    trained.change("plans.json", rename)
    trained.checkpoints["0"]["init_args"]["plans"] = json.loads((trained.folder / "plans.json").read_text())
    trained.write("0")
    assert "os.system" in refused("MM-MD-010", trained.folder, tmp_path / "model")


def test_a_place_that_is_taken_stays_as_it_is(trained, tmp_path):
    (tmp_path / "model").mkdir()
    assert "exists already" in refused("MM-MD-037", trained.folder, tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused("MM-MD-037", trained.folder, tmp_path / "link")
    refused("MM-MD-037", trained.folder, tmp_path / "missing" / "model")


def test_a_refused_export_leaves_nothing(make_trained, tmp_path):
    trained = make_trained(tmp_path, folds=("0", "1"))
    trained.checkpoints["1"]["network_weights"].popitem()
    trained.write("1")
    (tmp_path / "out").mkdir()
    refused("MM-MD-015", trained.folder, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_package_is_readable_for_all_that_the_umask_allows(trained, tmp_path):
    before = os.umask(0o022)
    try:
        export_model(trained.folder, tmp_path / "model", folds=[0])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()} == {0o644}


EXPORT = """
    import sys
    from medmamba.inference.model import export_model
    print("ready", flush=True)
    export_model(sys.argv[1], sys.argv[2])
"""


def start(trained, out: Path, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(EXPORT), str(trained.folder), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_disk_that_is_full_leaves_nothing(trained, tmp_path):
    size = (trained.folder / "fold_0" / "checkpoint_final.pth").stat().st_size // 8

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    process = start(trained, tmp_path / "model", preexec_fn=limit)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "OSError: [Errno 27]" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_a_killed_export_leaves_a_whole_package_or_none(delay, trained, tmp_path):
    out = tmp_path / "model"
    process = start(trained, out)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.communicate(timeout=60)
    if out.exists():
        load_model(out)
    else:
        assert all(path.name.startswith(".model.") for path in tmp_path.iterdir())
        export_model(trained.folder, out)


def test_an_edited_card_is_accepted_when_it_is_sealed(copied):
    before = load_model(copied)
    card = copied / "MODEL_CARD.md"
    card.write_text(card.read_text().replace("_To be filled in by the authors._", "Two healthy volunteers.", 1))
    with pytest.raises(ModelRefused, match="MM-MD-006"):
        load_model(copied)
    sealed = seal_card(copied)
    assert "Two healthy volunteers." in sealed.card
    assert sealed.id == load_model(copied).id != before.id
    assert sealed.id == hashlib.sha256((copied / "SHA256SUMS").read_bytes()).hexdigest()


@pytest.mark.parametrize("file", ["model.json", "fold_0.safetensors"])
def test_a_seal_accepts_nothing_but_the_card(file, copied):
    content = bytearray((copied / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / file).write_bytes(content)
    before = (copied / "SHA256SUMS").read_bytes()
    with pytest.raises(ModelRefused, match="MM-MD-006"):
        seal_card(copied)
    assert (copied / "SHA256SUMS").read_bytes() == before


def test_every_problem_has_its_number():
    assert all(len(code) == 9 and code.startswith("MM-MD-") and code[6:].isdigit() for code in PROBLEMS)
    assert len(set(PROBLEMS.values())) == len(PROBLEMS)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [("resample_data_or_seg_to_shape", {"order": 3}), ("resample_torch_fornnunet", {}), ("no_resampling_hack", {})],
)
def test_a_resampling_of_logits_that_prediction_does_not_know_is_refused(
    make_trained, plans_of, tmp_path, function, arguments
):
    plans = plans_of("PlainConvUNet")
    plans["configurations"]["3d_fullres"]["resampling_fn_probabilities"] = function
    plans["configurations"]["3d_fullres"]["resampling_fn_probabilities_kwargs"] = arguments
    trained = make_trained(tmp_path / "trained", plans=plans)
    with pytest.raises(ModelRefused, match="predict with nnUNetv2_predict") as refusal:
        export_model(trained.folder, tmp_path / "model")
    assert refusal.value.code == "MM-MD-011"
    assert not (tmp_path / "model").exists()
