"""Plans of nnU-Net with one configuration: what a package keeps of them, and what it takes from a file.

nnU-Net finds the parts of its preprocessing by the names in the plans, and calls them with arguments from there. A
package may name only parts that nnU-Net ships, with arguments that they have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .architecture import check_architecture
from .problems import ModelRefused, shown
from .values import Check, entry, flag, items, mapping, number, one_of, optional, size, text, whole, wrong

#: The reader of nnU-Net that turns every image to axes S, A, R; with all others the axes are those of the file.
REORIENTING_READER = "NibabelIOWithReorient"
ORIENTATIONS = ("SAR", "file")

_READERS = frozenset({"SimpleITKIO", "NibabelIO", REORIENTING_READER, "NaturalImage2DIO", "Tiff3DIO"})
_NORMALISATIONS = frozenset(
    {
        "CTNormalization",
        "NoNormalization",
        "RGBTo01Normalization",
        "RescaleTo01Normalization",
        "ZScoreNormalization",
    }
)
_INTENSITIES = ("mean", "std", "percentile_00_5", "percentile_99_5")
_LARGEST_AXIS, _LARGEST_PATCH = 2**14, 2**30
_SPACING_MM = (1e-6, 1e6)


def _order(value: object, where: str) -> int:
    return whole(value, where, 0, 5)


def _mode(value: object, where: str) -> str:
    return one_of(value, where, ("linear", "nearest", "nearest-exact"))


def _separate(value: object, where: str) -> bool | None:
    return optional(value, where, flag)


def _threads(value: object, where: str) -> int:
    return whole(value, where, 1, 1024)


#: Function of nnU-Net -> the arguments that plans may give it.
_RESAMPLING: Mapping[str, Mapping[str, Check[object]]] = {
    "resample_data_or_seg_to_shape": {
        "is_seg": flag,
        "order": _order,
        "order_z": _order,
        "force_separate_z": _separate,
        "separate_z_anisotropy_threshold": size,
    },
    "resample_torch_fornnunet": {
        "is_seg": flag,
        "num_threads": _threads,
        "memefficient_seg_resampling": flag,
        "force_separate_z": _separate,
        "separate_z_anisotropy_threshold": size,
        "mode": _mode,
        "aniso_axis_mode": _mode,
    },
    "no_resampling_hack": {},
}
_RESAMPLED = ("data", "seg", "probabilities")
#: The resampling of logits that :mod:`medmamba.inference.predictor.resample` repeats, and what it is called with.
_LOGITS_RESAMPLING = "resample_data_or_seg_to_shape"
_LOGITS_ARGUMENTS = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}

_PLANS_NEEDED = (
    "dataset_name",
    "plans_name",
    "image_reader_writer",
    "transpose_forward",
    "transpose_backward",
    "configurations",
    "label_manager",
    "foreground_intensity_properties_per_channel",
)
_PLANS_KEPT = (
    *_PLANS_NEEDED,
    "original_median_spacing_after_transp",
    "original_median_shape_after_transp",
    "experiment_planner_used",
    "medmamba",
)
_CONFIGURATION_NEEDED = (
    "preprocessor_name",
    "patch_size",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    *(f"resampling_fn_{what}{kwargs}" for what in _RESAMPLED for kwargs in ("", "_kwargs")),
    "architecture",
)
_CONFIGURATION_KEPT = (
    *_CONFIGURATION_NEEDED,
    "data_identifier",
    "batch_size",
    "median_image_size_in_voxels",
    "batch_dice",
)
_OLD_INTENSITIES = "foreground_intensity_properties_by_modality"


def reduce_plans(plans: Mapping[str, Any], configuration_name: str) -> dict[str, Any]:
    """Plans with one configuration, which has what it inherits, and nothing that a prediction does not need.

    Args:
        plans: of nnU-Net, also in the form of its versions before 2.5.
        configuration_name: of the plans.

    Raises:
        ModelRefused: MM-MD-030: no plans, or no such configuration; MM-MD-033: the second stage of a cascade.
    """
    configurations = plans.get("configurations")
    if not isinstance(configurations, Mapping):
        raise ModelRefused("MM-MD-030", "plans.json has no configurations; give a trained folder of nnU-Net")
    configuration = _inherited(configurations, configuration_name)
    if configuration.get("previous_stage") is not None:
        raise ModelRefused(
            "MM-MD-033",
            f"{configuration_name} is the second stage of a cascade: it needs the segmentation of "
            f"{shown(configuration['previous_stage'])}, and a package holds one model; export another configuration",
        )
    if "architecture" not in configuration:
        configuration = _modern(configuration)
    reduced = {key: plans[key] for key in _PLANS_KEPT if key in plans}
    reduced.setdefault("label_manager", "LabelManager")
    if _OLD_INTENSITIES in plans:
        reduced.setdefault("foreground_intensity_properties_per_channel", plans[_OLD_INTENSITIES])
    kept = {key: configuration[key] for key in _CONFIGURATION_KEPT if key in configuration}
    reduced["configurations"] = {configuration_name: kept}
    # As a file has it: keys are texts and there are no tuples.
    result: dict[str, Any] = json.loads(json.dumps(reduced))
    return result


def check_plans(plans: object, configuration_name: str, num_channels: int) -> None:
    """Raise unless these are reduced plans of one configuration, made of parts that a file may name.

    Raises:
        ModelRefused: MM-MD-009, MM-MD-010, MM-MD-011.
    """
    given = _with_keys(plans, "plans", _PLANS_NEEDED, _PLANS_KEPT)
    text(given["dataset_name"], "plans.dataset_name")
    text(given["plans_name"], "plans.plans_name")
    _part(given["image_reader_writer"], "plans.image_reader_writer", _READERS)
    _part(given["label_manager"], "plans.label_manager", ("LabelManager",))
    forward, backward = (items(given[key], f"plans.{key}", whole, length=3) for key in _TRANSPOSES)
    if sorted(forward) != [0, 1, 2] or [forward[i] for i in backward] != [0, 1, 2]:
        wrong("plans.transpose_forward and transpose_backward", [forward, backward], "orders of 0, 1, 2 that undo it")
    configurations = mapping(given["configurations"], "plans.configurations", (configuration_name,))
    schemes = _check_configuration(configurations[configuration_name], f"plans.{configuration_name}", num_channels)
    _check_intensities(given["foreground_intensity_properties_per_channel"], schemes)


_TRANSPOSES = ("transpose_forward", "transpose_backward")


def orientation_of(plans: Mapping[str, Any]) -> str:
    """Axes of the arrays that the network was trained on: "SAR", or "file" for those of each file."""
    return ORIENTATIONS[0] if plans["image_reader_writer"] == REORIENTING_READER else ORIENTATIONS[1]


def _check_configuration(value: object, where: str, num_channels: int) -> list[str]:
    """The normalisation schemes of a good configuration."""
    given = _with_keys(value, where, _CONFIGURATION_NEEDED, _CONFIGURATION_KEPT)
    _part(given["preprocessor_name"], f"{where}.preprocessor_name", ("DefaultPreprocessor",))
    patch = items(given["patch_size"], f"{where}.patch_size", _axis)
    voxels = 1
    for axis in patch:
        voxels *= axis
    if len(patch) not in (2, 3) or voxels > _LARGEST_PATCH:
        wrong(f"{where}.patch_size", patch, f"2 or 3 axes and at most {_LARGEST_PATCH} voxels")
    spacing = items(given["spacing"], f"{where}.spacing", size, length=len(patch))
    if not all(_SPACING_MM[0] <= mm <= _SPACING_MM[1] for mm in spacing):
        wrong(f"{where}.spacing", spacing, f"millimetres from {_SPACING_MM[0]:g} to {_SPACING_MM[1]:g}")
    schemes = items(given["normalization_schemes"], f"{where}.normalization_schemes", _scheme, length=num_channels)
    items(given["use_mask_for_norm"], f"{where}.use_mask_for_norm", flag, length=num_channels)
    for what in _RESAMPLED:
        _check_resampling(given, f"resampling_fn_{what}", where)
    check_logits_resampling(given, f"model.json: {where}")
    check_architecture(given["architecture"], f"{where}.architecture", patch)
    return schemes


def check_logits_resampling(configuration: Mapping[str, Any], where: str) -> None:
    """Compare with the one way to resample logits that is known here.

    Raises:
        ModelRefused: MM-MD-011.
    """
    name = configuration["resampling_fn_probabilities"]
    arguments = {**_LOGITS_ARGUMENTS, **configuration["resampling_fn_probabilities_kwargs"]}
    if name != _LOGITS_RESAMPLING or arguments != _LOGITS_ARGUMENTS:
        raise ModelRefused(
            "MM-MD-011",
            f"{where} resamples logits with {name} {shown(arguments)}; only nnU-Net's default, {_LOGITS_RESAMPLING} "
            f"with {_LOGITS_ARGUMENTS}, is known here: predict with nnUNetv2_predict",
        )


def _check_resampling(given: Mapping[str, Any], key: str, where: str) -> None:
    function = _part(given[key], f"{where}.{key}", _RESAMPLING)
    allowed = _RESAMPLING[function]
    for name, value in mapping(given[f"{key}_kwargs"], f"{where}.{key}_kwargs").items():
        if name not in allowed:
            raise ModelRefused(
                "MM-MD-011",
                f"model.json: {where}.{key}_kwargs has {shown(name)}, which is no argument that a package may give to "
                f"{function}; known: {', '.join(allowed) or 'none'}",
            )
        allowed[name](value, f"{where}.{key}_kwargs.{name}")


def _check_intensities(value: object, schemes: list[str]) -> None:
    where = "plans.foreground_intensity_properties_per_channel"
    given = mapping(value, where)
    for channel, scheme in enumerate(schemes):
        # nnU-Net wants a mapping for every channel, and looks into it for CT only.
        properties = mapping(entry(given, str(channel), where), f"{where}.{channel}")
        if scheme == "CTNormalization":
            mean, std, low, high = (number(entry(properties, key, where), f"{where}.{key}") for key in _INTENSITIES)
            if std < 0 or low > high or not low <= mean <= high:
                wrong(f"{where}.{channel}", properties, "std of 0 or more, and a mean between the percentiles")


def _scheme(value: object, where: str) -> str:
    return _part(value, where, _NORMALISATIONS)


def _axis(value: object, where: str) -> int:
    return whole(value, where, 1, _LARGEST_AXIS)


def _part(value: object, where: str, known: Any) -> str:
    if not isinstance(value, str) or value not in known:
        raise ModelRefused(
            "MM-MD-011",
            f"model.json: {where} is {shown(value)}, which is no part of nnU-Net that a package may name; known: "
            f"{', '.join(sorted(known))}",
        )
    return value


def _with_keys(value: object, where: str, needed: tuple[str, ...], known: tuple[str, ...]) -> dict[str, Any]:
    given = mapping(value, where)
    for key in needed:
        entry(given, key, where)
    surplus = [key for key in given if key not in known]
    if surplus:
        wrong(where, surplus, f"nothing besides {', '.join(known)}")
    return given


def _inherited(configurations: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with what it inherits, nearest first."""
    merged: dict[str, Any] = {}
    visited: list[str] = []
    following: object = name
    while following is not None:
        parent = configurations.get(following) if isinstance(following, str) else None
        if not isinstance(parent, Mapping) or following in visited:
            raise ModelRefused(
                "MM-MD-030",
                f"plans.json has no configuration {shown(following)} that is not its own parent; known: "
                f"{', '.join(map(str, configurations))}; restore plans.json",
            )
        merged = {**parent, **merged}
        visited.append(str(following))
        following = parent.get("inherits_from")
    return merged


def _modern(configuration: dict[str, Any]) -> dict[str, Any]:
    """A configuration from before nnU-Net 2.5 with the architecture block that nnU-Net reads into it."""
    import warnings

    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the form is old
            converted: dict[str, Any] = ConfigurationManager(dict(configuration)).configuration
    except (KeyError, RuntimeError, TypeError) as error:
        raise ModelRefused(
            "MM-MD-030",
            f"plans.json has no architecture, and nnU-Net cannot read one from its older form ({shown(error)}); plan "
            "and train again with nnunetv2 2.8 or newer",
        ) from error
    return converted
