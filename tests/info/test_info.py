"""The command ``medmamba info``: what it counts, reads and draws, and how it answers mistakes."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from medmamba import cli
from medmamba.diagnostics import GB, MemoryModel, footprint, operations, token_dynamics
from medmamba.info import report
from medmamba.info.subject import Subject
from medmamba.mixers import ScanCore, SpatialCore
from medmamba.networks import create_network
from medmamba_plans.derive import Request, derive_plans

PLANS = Path(__file__).resolve().parents[1] / "data" / "plans"
SMALL = {"base_features": 8, "depths": 1, "decoder_depths": 1, "d_state": 2}
DATASET = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "a": 1, "b": 2, "c": 3},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}


@pytest.fixture
def plans(tmp_path) -> Path:
    """A plans file of ours beside its dataset.json."""
    stock = json.loads((PLANS / "anisotropic.json").read_text())
    path = tmp_path / "ours.json"
    path.write_text(json.dumps(derive_plans(stock, Request("vmunet", options=SMALL))))
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET))
    return path


def run(capsys, *arguments) -> list[str]:
    assert cli.main(["info", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def scan_lines(lines: list[str]) -> list[str]:
    """The lines of the table, one per scan or route."""
    head = next(i for i, line in enumerate(lines) if line.startswith("scan "))
    return list(itertools.takewhile(bool, lines[head + 1 :]))


def built(plans: Path, configuration: str = "3d_fullres"):
    arguments = json.loads(plans.read_text())["configurations"][configuration]["architecture"]["arch_kwargs"]
    torch.manual_seed(0)
    return create_network("vmunet", 2, 4, **arguments)


def test_parameters_are_counted_and_every_scan_has_its_line(plans, capsys):
    lines = run(capsys, "--plans", plans)
    network = built(plans)
    total = sum(p.numel() for p in network.parameters())
    cores = {name: module for name, module in network.named_modules() if isinstance(module, ScanCore)}
    inside = sum(p.numel() for core in cores.values() for p in core.parameters())
    assert lines[0].startswith("vmunet, 2 in, 4 out, patch 56x160x192 at 3.27x0.98x0.98 mm")
    assert f"{total / 1e6:.3f} M, of these {inside / 1e6:.3f} M ({inside / total:.1%}) in {len(cores)}" in lines[1]
    assert {line.split()[0] for line in scan_lines(lines)} == set(cores)
    first = scan_lines(lines)[0].split()
    assert first[1:6] == ["14x20x24", "6720", "128", "2", "raster6"]
    assert first[7] == "14-24/336-480/6720"


def test_eigenvalues_are_those_of_the_token_dynamics(plans, capsys):
    rows = {line.split()[0]: line.split() for line in scan_lines(run(capsys, "--plans", plans))}
    dynamics = token_dynamics(built(plans).state_dict())
    assert set(rows) == set(dynamics)
    for name, row in rows.items():
        assert row[-1] == f"{dynamics[name].smallest.min():.2g}..{dynamics[name].largest.max():.2g}"


class OnTokens(torch.nn.Sequential):
    """Cores one after the other on the voxels of a volume."""

    def forward(self, x):
        tokens = x.flatten(2).mT
        for core in self:
            tokens = core(tokens, x.shape[2:])
        return tokens


def test_routes_that_share_weights_show_them_each_and_a_scan_without_projections_shows_no_eigenvalues():
    core = ScanCore(6, d_state=2, dt_rank=1, routes="raster6", parameters="direction")
    network = OnTokens(core, SpatialCore(6, d_state=1, dt_rank=1, routes="raster6"))
    subject = Subject("none", network, 6, 2, (4, 4, 4), None, "initial")
    rows = [line.split() for line in report.table(report.scans_of(subject), by_route=True)][1:]
    assert len(rows) == 12
    assert len({row[6] for row in rows[:6]}) == len({row[-1] for row in rows[:6]}) == 2
    assert {row[-1] for row in rows[6:]} == {"-"}


def test_a_block_with_several_scans_has_a_line_for_each(tmp_path, capsys):
    stock = json.loads((PLANS / "isotropic.json").read_text())
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(derive_plans(stock, Request("mhsvm", options=SMALL))))
    rows = [line.split() for line in scan_lines(run(capsys, "--plans", path))]
    blocks = [name.partition(".heads.")[0] for name, *_ in rows]
    assert {blocks.count(block) for block in blocks} == {4}
    assert [row[5] for row in rows[:4]] == ["mhs_c6", "mhs_x6", "mhs_s6", "mhs_z6"]


def test_work_and_memory_are_those_of_the_diagnostics(plans, capsys):
    lines = run(capsys, "--plans", plans)
    network, patch = built(plans), (56, 160, 192)
    macs, counted = operations(network, 2, patch), footprint(network, 2, patch)
    assert (
        f"{macs.total / 1e9:.1f} GMAC, of these {macs.scans / 1e9:.1f} GMAC ({macs.scans / macs.total:.1%})" in lines[2]
    )
    model = MemoryModel.load("cuda")
    assert (
        f"{model.without_batch(counted) / GB:.2f} GB + {model.per_sample(counted) / GB:.2f} GB per sample" in lines[3]
    )
    assert ("not calibrated" in lines[3]) != model.is_calibrated
    assert f"; {counted.kept_by_scans / counted.kept:.1%} of what is kept" in lines[3]


def test_a_line_per_route(plans, capsys):
    lines = run(capsys, "--plans", plans, "--by-route", "--routes", "dhw", "hwd:reset=line")
    rows = [line.split() for line in scan_lines(lines)]
    assert [row[5] for row in rows[:2]] == ["dhw", "hwd:reset=line"]
    line, plane, volume = rows[1][8].split("/")
    assert line != "0%"
    assert plane == volume == "0%"


def test_longer_step_sizes_leave_more(plans, capsys):
    def after_a_plane(*arguments) -> list[float]:
        rows = [line.split() for line in scan_lines(run(capsys, "--plans", plans, *arguments))]
        return [float(row[8].split("/")[1].rstrip("%")) for row in rows]

    default, route = after_a_plane(), after_a_plane("--dt-init", "route")
    first = 0  # the finest grid: 480 tokens a plane
    assert route[first] > 2 * default[first]


@pytest.mark.parametrize(
    ("arguments", "patch"),
    [([], "128x128x128, "), (["--plans", PLANS / "isotropic.json"], "40x56x40 at 1x1x1 mm, ")],
    ids=["no plans", "stock plans"],
)
def test_a_name_is_enough_and_stock_plans_are_followed(arguments, patch, capsys):
    lines = run(capsys, "vmunet", *arguments)
    assert lines[0].startswith(f"vmunet, 1 in, 2 out, patch {patch}")
    assert scan_lines(lines)


@pytest.mark.parametrize("arguments", [["--dt-init", "route"], ["--routes", "line6"]], ids=" ".join)
def test_the_ways_to_a_longer_memory_need_no_plans(arguments, capsys):
    assert scan_lines(run(capsys, "vmunet", *arguments))


def test_other_configurations_and_the_control(plans, capsys):
    assert "patch 160x192 at 0.98x0.98 mm" in run(capsys, "--plans", plans, "--configuration", "2d")[0]
    stock = json.loads((PLANS / "anisotropic.json").read_text())
    plans.write_text(json.dumps(derive_plans(stock, Request("vmunet", options={**SMALL, "ssm_mode": "identity"}))))
    lines = run(capsys, "--plans", plans)
    assert "of these 0.000 M (0.0%) in 0 scans" in lines[1]
    assert "(0.0%) in the scans" in lines[2]
    assert "; 0.0% of what is kept" in lines[3]
    assert lines[4].startswith("no scans")


def test_the_horizon_is_drawn(plans, tmp_path, capsys):
    picture = tmp_path / "horizon.png"
    lines = run(capsys, "--plans", plans, "--horizon", picture)
    assert lines[-1] == f"wrote {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def write_checkpoint(plans: Path, path: Path, **extra) -> torch.nn.Module:
    """A checkpoint as nnU-Net writes it: weights next to numpy scalars and the trainer's arguments."""
    network = built(plans)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, ScanCore):
                module.dt_bias.fill_(-5.0)  # softplus: 0.00672, so the slowest state remembers 149 tokens
    arguments = {
        "plans": json.loads(plans.read_text()),
        "configuration": "3d_fullres",
        "fold": 0,
        "dataset_json": DATASET,
        "device": torch.device("cpu"),
    }
    logging = {"mean_fg_dice": [np.float64(0.5)], "ema_fg_dice": [np.float32(0.5)], "lrs": [0.01]}
    checkpoint = {"network_weights": network.state_dict(), "logging": logging, "init_args": arguments, **extra}
    torch.save(checkpoint, path)
    return network


def test_a_checkpoint_brings_its_plans_and_weights(plans, tmp_path, capsys):
    path = tmp_path / "checkpoint_final.pth"
    network = write_checkpoint(plans, path)
    lines = run(capsys, "--checkpoint", path)
    assert lines[0].startswith("vmunet, 2 in, 4 out, patch 56x160x192")
    assert {line.split()[6].split("/")[-1] for line in scan_lines(lines)} == {"149"}
    plain = tmp_path / "weights.pth"
    torch.save(network.state_dict(), plain)
    assert run(capsys, "--checkpoint", plain, "--plans", plans)[1:] == lines[1:]


def test_measured_step_sizes_are_near_those_of_the_bias(plans, capsys):
    content = json.loads(plans.read_text())
    content["configurations"]["3d_fullres"]["patch_size"] = [16, 32, 32]
    plans.write_text(json.dumps(content))

    def slowest(*arguments) -> list[float]:
        return [float(line.split()[6].split("/")[-1]) for line in scan_lines(run(capsys, "--plans", plans, *arguments))]

    bias, measured = slowest(), slowest("--measure")
    assert bias != measured
    assert measured == pytest.approx(bias, rel=0.2)


class Malicious:
    def __reduce__(self):
        return (print, ("code ran",))


def test_no_code_in_a_checkpoint_is_run(plans, tmp_path, capsys):
    path = tmp_path / "checkpoint.pth"
    write_checkpoint(plans, path, optimizer_state=Malicious())
    assert cli.main(["info", "--checkpoint", str(path)]) == 2
    output = capsys.readouterr()
    assert "code ran" not in output.out
    assert "cannot be read as weights" in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a network, e.g. `medmamba info vmunet`"),
        (["vmnet"], "no network 'vmnet'; known: "),
        (["--plans", PLANS / "isotropic.json"], "name a network"),
        (["vmunet", "--plans", "nowhere.json"], "nowhere.json is missing"),
        (["vmunet", "--plans", PLANS / "README.md"], "cannot be read"),
        (["vmunet", "--plans", PLANS / "isotropic.json", "--configuration", "4d"], "no configuration '4d'"),
        (["vmunet", "--routes", "zigzag"], "unknown route set 'zigzag'"),
        (["vmunet", "--num-classes", "0"], "must be 1 or more"),
        (["vmunet", "--checkpoint", "nowhere.pth"], "nowhere.pth is missing"),
        (["vmunet", "--checkpoint", PLANS / "README.md"], "cannot be read as weights"),
        (["vmunet", "--checkpoint", "nowhere.pth", "--dt-init", "route"], "leave one of them out"),
        (["vmunet", "--horizon", "/nowhere/h.png"], "is not a folder"),
        (["vmunet", "--horizon", "h.word"], "use a name that ends in .png"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["info", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_weights_of_another_network_are_refused_with_examples(plans, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save(built(plans).state_dict(), path)
    assert cli.main(["info", "vmunet", "--checkpoint", str(path)]) == 2
    error = capsys.readouterr().err
    assert re.search(r"\d+ missing, e\.g\. .*; \d+ of another shape, e\.g\. \S+\); give the plans", error)


def test_plans_of_one_network_are_not_shown_as_another(plans, capsys):
    content = plans.read_text().replace("medmamba.networks.vmunet.vmunet", "medmamba.networks.gone.gone")
    plans.write_text(content)
    assert cli.main(["info", "--plans", str(plans)]) == 2
    assert "this version of medmamba does not have" in capsys.readouterr().err
