"""Our plans from stock ones."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from medmamba.networks import NETWORKS
from medmamba.nnunet.architecture import network_of
from medmamba.nnunet.schedule import Schedule
from medmamba_plans.derive import PlanError, Request, derive_plans

FILES = ["isotropic", "anisotropic", "cascade", "images"]
SMALL = {"base_features": 8, "depths": 1, "decoder_depths": 1, "d_state": 2}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("file", FILES)
def test_only_the_architecture_and_the_name_change(network, file, load_plans):
    stock = load_plans(file)
    before = deepcopy(stock)
    options = {key: value for key, value in SMALL.items() if NETWORKS[network].has_scans or key != "d_state"}
    plans = derive_plans(stock, Request(network, options=options))
    assert stock == before
    assert plans.pop("medmamba")["network"] == network
    assert plans.pop("plans_name") != stock.pop("plans_name")
    for name, configuration in plans["configurations"].items():
        ours, theirs = configuration.pop("architecture", None), stock["configurations"][name].pop("architecture", None)
        assert (ours is None) == (theirs is None)
        assert ours is None or network_of(ours) == network
    assert plans == stock


@pytest.mark.parametrize("file", FILES)
def test_nnunet_builds_every_configuration_from_the_written_file(file, load_plans, tmp_path):
    plans = derive_plans(load_plans(file), Request("vmunet", options=SMALL))
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    manager = PlansManager(str(tmp_path / "plans.json"))
    for name in manager.available_configurations:
        configuration = manager.get_configuration(name)
        network = get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            1,
            3,
            deep_supervision=True,
        )
        assert len(network.decoder.seg_layers) == len(configuration.pool_op_kernel_sizes) - 1


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request("vmunet"), "nnUNetMedMambaVMUNetPlans"),
        (Request("vmunet", options={"geometry": "native", "ssm_mode": "scan"}), "nnUNetMedMambaVMUNetPlans"),
        (Request("vmunet", variant="small"), "nnUNetMedMambaVMUNetSmallPlans"),
        (Request("vmunet", options={"geometry": "faithful"}), "nnUNetMedMambaVMUNetFaithfulPlans"),
        (Request("vmunet", options={"ssm_mode": "identity"}), "nnUNetMedMambaVMUNetIdentityPlans"),
        (Request("vmunet", options={"routes": "raster12"}), "nnUNetMedMambaVMUNetRaster12Plans"),
        (Request("vmunet", variant="small", dt_init="route"), "nnUNetMedMambaVMUNetSmallDtRoutePlans"),
        (Request("mednext", variant="Lk5"), "nnUNetMedMambaMedNeXtLk5Plans"),
        (
            Request("mednextmamba", variant="S", options={"ssm_mode": "identity"}),
            "nnUNetMedMambaMedNeXtMambaSIdentityPlans",
        ),
        (Request("vmunet", options={"mixer": "vim3d"}), "nnUNetMedMambaVMUNetVim3DPlans"),
        (
            Request("mhsvm", variant="small", options={"mixer": "s4nd3d", "ssm_mode": "identity"}),
            "nnUNetMedMambaMHSVMSmallS4ND3DIdentityPlans",
        ),
        (Request("vmunet", variant="small", name="Mine"), "Mine"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_experiment_has_a_name_of_its_own(request_, expected):
    assert request_.plans_name == expected


@pytest.mark.parametrize("file", FILES)
def test_a_mixer_replaces_what_describes_the_own_blocks_and_knows_the_spacing(file, load_plans):
    request = Request("msvmunet", variant="small", options={"mixer": "vmamba3d"})
    for configuration in derive_plans(load_plans(file), request)["configurations"].values():
        if "architecture" not in configuration:
            continue
        arguments = configuration["architecture"]["arch_kwargs"]
        assert arguments["mixer"] == {"name": "vmamba3d", "spacing": configuration["spacing"]}
        assert len(arguments["mixer"]["spacing"]) == len(configuration["patch_size"])
        assert not {"d_state", "expand", "mlp_ratio", "ffn_scales", "routes"} & arguments.keys()


@pytest.mark.parametrize("file", FILES)
def test_step_sizes_per_route_follow_patch_and_spacing_of_each_configuration(file, load_plans):
    plans = json.loads(json.dumps(derive_plans(load_plans(file), Request("vmunet", options=SMALL, dt_init="route"))))
    for configuration in plans["configurations"].values():
        if "architecture" in configuration:
            assert configuration["architecture"]["arch_kwargs"]["dt_init"] == {
                "patch_size": configuration["patch_size"],
                "spacing": configuration["spacing"],
            }
    default = derive_plans(load_plans(file), Request("vmunet", options=SMALL))
    assert "dt_init" not in json.dumps(default["configurations"])


def test_options_win_over_the_variant(load_plans):
    request = Request("vmunet", variant="small", options={"d_state": 4})
    arguments = derive_plans(load_plans("isotropic"), request)["configurations"]["3d_fullres"]["architecture"][
        "arch_kwargs"
    ]
    assert arguments["d_state"] == 4
    assert arguments["base_features"] == NETWORKS["vmunet"].presets["small"]["base_features"]


def test_batch_and_patch_change_where_they_fit(load_plans):
    request = Request("vmunet", options=SMALL, batch_size=3, patch_size=[64, 64, 96])
    configurations = derive_plans(load_plans("cascade"), request)["configurations"]
    patches = {name: configuration.get("patch_size") for name, configuration in configurations.items()}
    assert patches == {
        "2d": [512, 512],
        "3d_lowres": [64, 64, 96],
        "3d_fullres": [64, 64, 96],
        "3d_cascade_fullres": None,
    }
    assert {configuration.get("batch_size", 3) for configuration in configurations.values()} == {3}


def test_the_schedule_goes_into_the_plans(load_plans):
    schedule = Schedule.create(num_epochs=3, optimizer="AdamW")
    plans = derive_plans(load_plans("isotropic"), Request("vmunet", options=SMALL, schedule=schedule))
    assert Schedule.from_plans(json.loads(json.dumps(plans))) == schedule


@pytest.mark.parametrize(
    ("wanted", "kept", "next_stage"),
    [
        (["3d_fullres"], ["3d_fullres"], None),
        (["3d_lowres"], ["3d_lowres"], None),
        (["3d_cascade_fullres"], ["3d_lowres", "3d_fullres", "3d_cascade_fullres"], "3d_cascade_fullres"),
        (["2d", "3d_lowres"], ["2d", "3d_lowres"], None),
    ],
    ids=str,
)
def test_chosen_configurations_bring_what_they_need_and_leave_nothing_dangling(wanted, kept, next_stage, load_plans):
    request = Request("vmunet", options=SMALL, configurations=wanted)
    configurations = derive_plans(load_plans("cascade"), request)["configurations"]
    assert sorted(configurations) == sorted(kept)
    assert configurations.get("3d_lowres", {}).get("next_stage") == next_stage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "vmnet"}, r"no network 'vmnet'; known: .*vmunet"),
        ({"dt_init": "long"}, "unknown dt_init 'long'; known: default, route"),
        ({"variant": "XXL"}, "network vmunet has no variant 'XXL'; known: .*small"),
        ({"options": {"geometry": "round"}}, "'round'; known: native, faithful"),
        ({"options": {"ssm_mode": "magic"}}, "'magic'; known: .*identity, .*scan"),
        ({"options": {"routes": "zigzag"}}, "'zigzag'; known: .*raster6"),
        ({"options": {"routes": ["dhw", "abc"]}, "name": "P"}, "'abc'"),
        ({"options": {"routes": ["dhw", "hwd"]}}, "name its plans with --plans-name"),
        ({"options": {"no_such_argument": 1}}, "no_such_argument"),
        ({"batch_size": 0}, "batch size 0"),
        ({"patch_size": [40, 50, 40]}, "configuration 3d_fullres: patch 40x50x40 .* use 48 or 56"),
        ({"patch_size": [40]}, "patch size 40 has 1 axes; no configuration among 2d, 3d_fullres has as many"),
        ({"configurations": ["3d_lowres"]}, "no configuration 3d_lowres; known: 2d, 3d_fullres"),
        ({"name": "a__b"}, "contains '__' or '/'"),
        ({"network": "mednext", "options": {"ssm_mode": "identity"}}, "mednext has no scans, so there is no ssm_mode"),
        ({"options": {"mixer": "vim"}}, "no mixer 'vim'; known: .*vim3d"),
        ({"options": {"mixer": {"name": "vim3d", "merge": "sum"}}}, "name its plans with --plans-name"),
        (
            {"options": {"mixer": {"name": "vim3d", "corn": 1}}, "name": "P"},
            "a block has no option corn; known: .*core",
        ),
        ({"options": {"mixer": "vim3d", "routes": "raster2"}}, "routes say something of the blocks that the mixer"),
        ({"network": "mednext", "options": {"mixer": "vim3d"}}, "mednext has no scans, so there is no mixer"),
        ({"network": "mednext", "dt_init": "route"}, "mednext has no scans, so there is no dt_init"),
    ],
    ids=str,
)
def test_a_request_that_does_not_fit_says_why_and_what_is_known(arguments, message, load_plans):
    with pytest.raises(PlanError, match=message):
        derive_plans(load_plans("isotropic"), Request(**{"network": "vmunet", **arguments}))


def test_plans_for_a_network_of_ours_are_no_place_to_start(load_plans):
    plans = derive_plans(load_plans("isotropic"), Request("vmunet", options=SMALL))
    with pytest.raises(
        PlanError, match=r"made for the network vmunet; start from nnU-Net's own \(--from nnUNetPlans\)"
    ):
        derive_plans(plans, Request("vmunet"))
