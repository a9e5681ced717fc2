"""Write the generated tables of the documents, or check that they are fresh.

    python tools/tables.py            rewrites every table in place
    python tools/tables.py --check    names the stale ones and returns 1

A table stands between ``<!-- table: NAME -->`` and ``<!-- end table -->``; ``TABLES`` holds the function that
makes NAME. Development only: the package does not import this file.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end table -->)", re.DOTALL)

# The example of every parameter count: 3D, 1 input channel, 3 classes, six stages.
INPUT_CHANNELS, NUM_CLASSES = 1, 3
STRIDES = [[1, 1, 1], *[[2, 2, 2]] * 5]


def count_parameters(name: str, **kwargs: object) -> int:
    """Parameters of a network, built without memory for them."""
    import torch

    from medmamba.networks import create_network

    with torch.device("meta"):
        network = create_network(name, INPUT_CHANNELS, NUM_CLASSES, **kwargs)
    return sum(parameter.numel() for parameter in network.parameters())


def networks_table(page: str = "") -> str:
    """Networks and their sizes; the changes are counted, and listed on ``page`` (default: the table's own)."""
    from medmamba.networks import NETWORKS

    rows = []
    for name in sorted(NETWORKS):
        spec = NETWORKS[name]
        native = count_parameters(name, strides=STRIDES)
        published = count_parameters(name, strides=[[s] * 3 for s in spec.published_strides], geometry="faithful")
        paper = (
            f"[{spec.paper.title.partition(':')[0]}]({spec.paper.link}), {spec.paper.year}, {spec.paper.dimensions}D"
        )
        changes = f"[{len(spec.departures)} changes]({page}#{name})"
        rows.append([f"`{name}`", paper, spec.summary, _millions(native), _millions(published), changes])
    return _table(
        [
            "network",
            "paper",
            "in one line",
            "parameters, `native`",
            "parameters, `faithful`",
            "what we changed against the paper",
        ],
        rows,
    )


def changes_lists() -> str:
    """A section per network: the paper in full, and what we changed against it."""
    from medmamba.networks import NETWORKS

    lines = []
    for name, spec in sorted(NETWORKS.items()):
        paper = f"[{spec.paper.title}]({spec.paper.link}), {spec.paper.authors}, {spec.paper.year}"
        lines += [f"### {name}", "", paper, ""]
        lines += [*(f"{i}. {text}" for i, text in enumerate(spec.departures, start=1)), ""]
    return "\n".join(lines).rstrip()


def model_problems_table() -> str:
    """Ids of the refusals of model packages."""
    from medmamba.inference.model import PROBLEMS

    return _table(["id", "meaning"], [[code, meaning] for code, meaning in PROBLEMS.items()])


def route_sets_table() -> str:
    from medmamba_kernels import ROUTE_SETS

    rows = [
        [f"`{name}`", str(len(routes)), " ".join(f"`{route}`" for route in routes)]
        for name, routes in sorted(ROUTE_SETS.items())
    ]
    return _table(["set", "routes", "in the order of the scan's route axis"], rows)


def curves_table() -> str:
    from medmamba_kernels.curves import CURVES, LINEWISE_CURVES, PLANEWISE_CURVES

    rows = []
    for name, curve in sorted(CURVES.items()):
        resets = ["`volume`", "`phase`"]
        resets += ["`plane`"] * (name in PLANEWISE_CURVES) + ["`line`"] * (name in LINEWISE_CURVES)
        how = _first_line(sys.modules[curve.__module__].__doc__)
        rows.append([f"`{name}`", how, ", ".join(resets)])
    return _table(["curve", "how it fills the grid", "possible resets"], rows)


def ssm_modes_table() -> str:
    from medmamba.mixers import CORES

    return _table(
        ["`ssm_mode`", "what stands in the place of the scan"],
        [[f"`{name}`", _first_line(core.__doc__)] for name, core in sorted(CORES.items())],
    )


def mixers_table() -> str:
    """Published mixers, and the size of a small VM-UNet with their blocks at nnU-Net's usual plan."""
    from medmamba.presets import MIXERS

    rows = [["", "", "VM-UNet's own blocks", *_size_with_mixer(None)]]
    for name, spec in sorted(MIXERS.items()):
        paper = f"[{spec.source.title.partition(':')[0]}]({spec.source.link}), {spec.source.year}"
        rows.append([f"[`{name}`](#{name})", paper, _cell(spec.summary), *_size_with_mixer(name)])
    return _table(["mixer", "paper", "in one line", "parameters", "GMAC"], rows)


def _size_with_mixer(mixer: str | None) -> list[str]:
    """Parameters and multiply-accumulates of a small VM-UNet with a mixer."""
    import torch

    from medmamba.diagnostics.operations import operations
    from medmamba.networks import NETWORKS, create_network
    from medmamba.networks.spec import USUAL_PATCH, USUAL_STRIDES

    spec = NETWORKS["vmunet"]
    small = {
        name: value for name, value in spec.presets["small"].items() if not mixer or name not in spec.block_arguments
    }
    with torch.device("meta"):
        network = create_network("vmunet", INPUT_CHANNELS, NUM_CLASSES, strides=USUAL_STRIDES, mixer=mixer, **small)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return [_millions(parameters), f"{operations(network, INPUT_CHANNELS, USUAL_PATCH).total / 1e9:.1f}"]


def mixers_cost_table(channels: str) -> str:
    """What a block of every mixer costs on one CPU thread, beside a full convolution of the same width."""
    rows = [row for row in _bench("mixers") if row["channels"] == channels]
    blocks: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        blocks.setdefault((row["contender"], row["layout"]), {})[row["pass"]] = row
    ratios = _ratios(rows)
    lines = [
        _cost_of(passes["forward"], passes["training"], ratios[block])
        for block, passes in blocks.items()
        # Of the convolution, the faster memory format.
        if passes["forward"]["kind"] == "mixer" or ratios[block][channels, "forward"] == 1
    ]
    head = ["block", "parameters", "MMAC", "tokens x routes", "elements", "CPU ms", "x the convolution", "peak MiB"]
    return _table(head, lines)


def _cost_of(
    forward: Mapping[str, str], training: Mapping[str, str], ratios: Mapping[tuple[Any, str], float]
) -> list[str]:
    """A line of the table of costs."""
    voxels = math.prod(map(int, forward["grid"].split("x")))
    tokens = int(forward["scan_tokens"] or 0) / voxels
    elements = int(forward["scan_elements"] or 0) / voxels / int(forward["channels"])
    both = [
        ", ".join(f"{float(row[column]):.0f}" for row in (forward, training)) for column in ("cpu_min_ms", "peak_mib")
    ]
    return [
        f"`{forward['contender']}`" if forward["kind"] == "mixer" else f"{forward['contender']}, {forward['layout']}",
        f"{int(forward['parameters']):,}",
        f"{float(forward['mega_macs']):.0f}",
        f"{tokens:.3g}" if tokens else "",
        f"{elements:.3g}" if elements else "",
        both[0],
        f"**{_pair(ratios, forward['channels'])}**",
        both[1],
    ]


def _bench(what: str) -> list[dict[str, str]]:
    """Rows of the measurement of cores or mixers on one CPU thread."""
    (file,) = (CHECKOUT / "kernels" / "bench" / "results").glob(f"*_{what}_1thread.csv")
    with file.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _ratios(rows: list[dict[str, str]]) -> dict[tuple[str, str], dict[tuple[Any, str], float]]:
    from medmamba.bench.volumes import ratios

    return ratios(rows)


def mixer_sections() -> str:
    """A section per mixer: the source, what is theirs, what we changed, and the defects that ours does not have."""
    from medmamba.presets import MIXERS

    lines = []
    for name, spec in sorted(MIXERS.items()):
        source = spec.source
        code = f", code: [{source.code}](https://github.com/{source.code})" if source.code else ""
        lines += [f"### {name}", "", f"[{source.title}]({source.link}), {source.authors}, {source.year}{code}", ""]
        lines += [f"{_sentence(spec.summary)} Trainers: `..._{spec.title}`.", ""]
        parts = {"Theirs": spec.theirs, "Changed": spec.changes, "Defects of the code avoided": spec.avoided}
        for head, texts in parts.items():
            lines += [f"{head}:", "", *(f"- {_cell(text)}" for text in texts), ""] if texts else []
        options = json.dumps(dict(spec.block))
        lines += [f"Options: `{options}`", ""]
    return "\n".join(lines).rstrip()


def _sentence(text: str) -> str:
    text = _cell(text)
    return f"{text[0].upper()}{text[1:]}."


def block_options_table() -> str:
    """Options of a block with their defaults, from the docstring of their class."""
    from medmamba.mixers.block import BlockOptions

    # Some versions of Python take the indentation of docstrings away.
    section = inspect.cleandoc(BlockOptions.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    meanings = dict(re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", section + "\n", re.DOTALL | re.MULTILINE))
    rows = []
    for field in fields(BlockOptions):
        made: Any = field.default_factory() if field.default_factory is not MISSING else field.default
        default = json.dumps(list(made) if isinstance(made, tuple) else made)
        text = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", meanings[field.name])
        rows.append([f"`{field.name}`", f"`{default}`", _cell(text).rstrip(".")])
    return _table(["option", "default", "meaning"], rows)


def cores_table() -> str:
    """Cores, whether they read an order, and their time beside a full convolution on one CPU thread."""
    from medmamba.mixers import CORES

    ratios = _ratios(_bench("cores"))
    rows = []
    for name, core in sorted(CORES.items()):
        has_order = hasattr(core(4, d_state=2, dt_rank=1, routes="raster2"), "routes")
        cells = [_pair(ratios.get((name, "tokens"), {}), channels) for channels in ("64", "128", "256")]
        rows.append([f"`{name}`", _first_line(core.__doc__), "routes" if has_order else "none", *cells])
    return _table(["core", "in one line", "order", "64, 48 cubed", "128, 24 cubed", "256, 12 cubed"], rows)


def _pair(ratios: Mapping[tuple[Any, str], float], channels: str) -> str:
    """Ratios of inference and training; a dash for what was not run."""
    found = (ratios.get((channels, name)) for name in ("forward", "training"))
    return ", ".join("-" if ratio is None else f"{ratio:.2g}" if ratio >= 0.005 else "0" for ratio in found)


def accuracy_table(results: str, dataset: str) -> str:
    """Accuracy of every arm of a table of trainings on one dataset: Dice of each run, their mean, Dice per class."""
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in _results(results):
        if row["dataset"] == dataset:
            rows.setdefault((row["network"], row["ssm_mode"]), []).append(row)
    classes = [name for name in next(iter(rows.values()))[0] if name.startswith("dice_") and name != "dice_mean"]
    classes = [name for name in classes if all(row[name] for of_arm in rows.values() for row in of_arm)]
    runs = sorted({row["run"] for of_arm in rows.values() for row in of_arm})
    lines = []
    for (network, mode), of_arm in sorted(rows.items(), key=lambda item: -_mean(item[1], "dice_mean")):
        by_run = {row["run"]: row["dice_mean"] for row in of_arm}
        lines.append(
            [f"`{network}`", mode, f"{int(of_arm[0]['parameters']):,}", f"**{_mean(of_arm, 'dice_mean'):.3f}**"]
            + [f"{float(by_run[run]):.3f}" if run in by_run else "" for run in runs]
            + [f"{_mean(of_arm, name):.3f}" for name in classes]
        )
    head = ["network", "`ssm_mode`", "parameters", "Dice", *(run.replace("_", " ") for run in runs)]
    return _table(head + [name.removeprefix("dice_") for name in classes], lines)


def distillation_table() -> str:
    """The student with and without its teacher, the teacher and the stock network: Dice and processor time."""
    names = {
        "teacher": "teacher (`vmunet` small)",
        "stock_plain": "`PlainConvUNet`, half widths",
        "vmunet_cpu-student_scan": "student (`cpu-student`)",
        "vmunet_cpu-student_scan_taught": "student, taught",
    }
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in _results("distillation"):
        rows.setdefault((row["network"], row["seed"]), []).append(row)
    lines = []
    for (network, seed), of_arm in sorted(rows.items(), key=lambda item: (list(names).index(item[0][0]), item[0][1])):
        seconds = statistics.mean({row["case"]: float(row["cpu_s"]) for row in of_arm}.values())
        parameters, dice = f"{int(of_arm[0]['parameters']):,}", f"**{_mean(of_arm, 'dice'):.3f}**"
        lines.append([names[network], seed, parameters, dice, f"{seconds:.2f}"])
    return _table(["network", "seed", "parameters", "Dice", "processor seconds per volume"], lines)


def first_table_paired() -> str:
    """Differences in Dice between scan and control."""
    return _table(
        ["dataset", "difference", "Dice", "95 % interval", "p", "cases", "runs"],
        [
            [
                row["dataset"].partition("_")[2],
                f"{row['first']} - {row['second']}",
                f"{float(row['dice_difference']):+.3f}",
                f"{float(row['low_95']):+.3f} to {float(row['high_95']):+.3f}",
                row["p_wilcoxon"],
                row["cases"],
                row["runs"],
            ]
            for row in _results("first_table_paired")
        ],
    )


def transfer_table(protocol: str) -> str:
    """Dice of every arm of the transfer experiment: its mean over the seeds, and of each seed."""
    rows = [row for row in _results("transfer", "pretrain") if row["protocol"] == protocol]
    numbers = sorted({int(row["labels"]) for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        line = [f"`{arm}`"]
        for labels in numbers:
            of_arm = [row for row in rows if (row["arm"], row["labels"]) == (arm, str(labels))]
            by_seed = {row["seed"]: f"{float(row['dice_mean']):.3f}" for row in of_arm}
            line += [f"**{_mean(of_arm, 'dice_mean'):.3f}**", *(by_seed.get(seed, "") for seed in seeds)]
        lines.append(line)
    head = [f"{labels} labels{of}" for labels in numbers for of in ("", *(f", seed {seed}" for seed in seeds))]
    return _table(["arm", *head], lines)


def transfer_paired(protocol: str) -> str:
    """Differences in mean Dice between the arms of the transfer experiment."""
    return _table(
        ["labels", "difference", "Dice", "95 %, further cases", "95 %, further seeds", "seed by seed"],
        [
            [
                row["labels"],
                f"{row['first']} - {row['second']}",
                f"{float(row['dice_difference']):+.3f}",
                *(
                    f"{float(row[f'low_95_{over}']):+.3f} to {float(row[f'high_95_{over}']):+.3f}"
                    for over in ("cases", "seeds")
                ),
                ", ".join(f"{float(value):+.3f}" for value in row["differences_of_seeds"].split()),
            ]
            for row in _results("transfer_paired", "pretrain")
            if (row["protocol"], row["structure"]) == (protocol, "mean")
        ],
    )


def transfer_reconstruction() -> str:
    """Error of the pretrained networks at masked voxels, beside what needs no training; means over seeds."""
    rows = _results("transfer_reconstruction", "pretrain")
    lines = []
    for fill in dict.fromkeys(row["fill"] for row in rows):
        of_fill = [row for row in rows if row["fill"] == fill]
        each = ", ".join(f"{float(row['mse_model']):.3f}" for row in of_fill)
        scaled = f"{_mean(of_fill, 'mse_model_scaled'):.3f}"
        lines.append([f"pretrained, `{fill}`", f"{_mean(of_fill, 'mse_model'):.3f} ({each})", scaled])
    for name, words in (
        ("mse_unit_mean", "the mean of the masked unit, which cannot be known"),
        ("mse_nearest", "the nearest visible voxel"),
        ("mse_harmonic", "harmonic inpainting"),
    ):
        scaled = f"{_mean(rows, f'{name}_scaled'):.3f}" if f"{name}_scaled" in rows[0] else ""
        lines.append([words, f"{_mean(rows, name):.3f}", scaled])
    return _table(["what fills the masked voxels", "mean squared error", "with the best single factor"], lines)


def _results(name: str, room: str = "plans") -> list[dict[str, str]]:
    return _read(f"{room}/results/{name}.csv")


def _read(file: str) -> list[dict[str, str]]:
    with (CHECKOUT / file).open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _mean(rows: list[dict[str, str]], column: str) -> float:
    return sum(float(row[column]) for row in rows) / len(rows)


def commands_table() -> str:
    return "\n".join(_command_sections())


def _command_sections() -> Iterator[str]:
    from medmamba import cli

    for name, entry in sorted(cli.find_commands().items()):
        if entry.dist is None or entry.dist.name != "medmamba":
            continue
        command = entry.load()
        parser = cli.command_parser(name, command)
        yield f"### medmamba {name}\n"
        summary = _cell(parser.description or command.help)
        yield f"{summary[0].upper()}{summary[1:]}.\n"
        if command.passthrough is True:
            yield "All further arguments are handed over untouched.\n"
        yield from _argument_tables(parser)


def _argument_tables(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The arguments of a command, or a section for each of its actions."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                summary = _cell(subparser.description or "")
                yield f"#### {subparser.prog}\n"
                yield f"{summary[0].upper()}{summary[1:]}.\n"
                yield from _argument_tables(subparser)
            return
    formatter = parser._get_formatter()
    rows = [
        [f"`{_spelling(action)}`", _default(action), _meaning(formatter, action)]
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS
    ]
    if rows:
        yield _table(["argument", "default", "meaning"], rows)


def _meaning(formatter: argparse.HelpFormatter, action: argparse.Action) -> str:
    """The help text with its placeholders filled in; the default has a column of its own."""
    text = formatter._expand_help(action) if action.help else ""
    return _cell(re.sub(r"[;,]?\s*\(default:? [^()]*\)$", "", text)) if _default(action) else _cell(text)


def _spelling(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else action.metavar or _choices(action) or action.dest.upper()
    if isinstance(value, tuple):
        value = " ".join(value)
    if not action.option_strings:
        return value
    return ", ".join(action.option_strings) + (f" {value}" if value else "")


def _choices(action: argparse.Action) -> str:
    return "|".join(str(choice) for choice in action.choices) if action.choices else ""


def _default(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.nargs == 0 or action.default in (None, argparse.SUPPRESS):
        return ""
    return f"`{action.default}`"


def _first_line(docstring: str | None) -> str:
    """First paragraph of a docstring, its reStructuredText marks turned into Markdown."""
    text = (docstring or "").strip().partition("\n\n")[0].replace("``", "`")
    return _cell(re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", text))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _millions(count: int) -> str:
    return f"{count / 1e6:.3f} M"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def presets_table() -> str:
    """Presets of prediction, and how many forward passes they make of a volume much larger than the tile."""
    from medmamba.inference.presets import PRESETS

    first = PRESETS["accurate"]
    rows = []
    for name, preset in PRESETS.items():
        share = (first.step / preset.step) ** 3 / (1 if preset.mirrors else 8)
        mirrors = "as in training" if preset.mirrors else "none"
        rows.append(
            [f"`{name}`", str(preset.step), mirrors, "skipped" if preset.skips_air else "computed", f"{share:.1%}"]
        )
    return _table(["preset", "step", "mirroring", "tiles of air", "forward passes"], rows)


def presets_cost_table() -> str:
    """Dice and time of the presets, from plans/results/presets.csv; differences are paired by case."""
    presets: dict[str, list[dict[str, str]]] = {}
    for row in _results("presets"):
        presets.setdefault(row["preset"], []).append(row)
    table = []
    for name, rows in presets.items():
        deltas = [b - a for a, b in zip(_dice_of_cases(presets["accurate"]), _dice_of_cases(rows), strict=True)]
        seconds = statistics.median(float(row["predict_s"]) for row in rows)
        scores = [
            f"{_mean(rows, 'dice'):.4f}",
            _interval(deltas) if any(deltas) else "",
            f"{_mean(rows, 'nsd_1mm'):.3f}",
        ]
        table.append([f"`{name}`", *scores, f"{min(_dice_of_cases(rows)):.3f}", f"{seconds:.2f}"])
    return _table(["preset", "Dice", "difference, 95 %", "NSD at 1 mm", "Dice of the worst case", "seconds"], table)


def weights_table() -> str:
    """Size and Dice of copies of a package with rounded weights, from plans/results/weights.csv; paired by case."""
    copies: dict[str, list[dict[str, str]]] = {}
    for row in _results("weights"):
        copies.setdefault(row["copy"], []).append(row)
    table = []
    for name, rows in copies.items():
        deltas = [b - a for a, b in zip(_dice_of_cases(copies["float32"]), _dice_of_cases(rows), strict=True)]
        difference = _interval(deltas) if any(deltas) else ""
        size = f"{int(rows[0]['bytes']) / 1e6:.2f} MB"
        table.append([name, size, f"{_mean(rows, 'dice'):.4f}", difference, f"{_mean(rows, 'changed'):.4%}"])
    return _table(["weights", "package", "Dice", "difference, 95 %", "voxels with another label"], table)


def masked_time_table() -> str:
    """Time of a scan with masked tokens over that without, from kernels/bench/results."""
    ratios: dict[str, dict[str, str]] = {}
    for row in _read("kernels/bench/results/epyc-zen4_torch-2.15_masked_1thread.csv"):
        if row["pattern"] != "none":
            name = f"{row['grid']}, {row['channels']} channels, {row['state_size']} states, {row['pass']}"
            column = f"{row['pattern']} {float(row['masked']):.0%}" if float(row["masked"]) else row["pattern"]
            ratios.setdefault(name, {})[column] = f"{float(row['ratio']):.2f}"
    columns = list(next(iter(ratios.values())))
    return _table(["scan", *columns], [[name, *values.values()] for name, values in ratios.items()])


def masked_air_table() -> str:
    """Share of tokens of real CTs that are air or padding, from kernels/bench/results."""
    sets: dict[tuple[str, ...], dict[int, str]] = {}
    for row in _read("kernels/bench/results/masked_air.csv"):
        key = (row["dataset"], row["images"], row["tile"], f"{float(row['padding']):.0%}")
        cell = f"{float(row['masked']):.0%} ({float(row['masked_least']):.0%} to {float(row['masked_most']):.0%})"
        sets.setdefault(key, {})[int(row["stride"])] = cell
    strides = sorted({stride for cells in sets.values() for stride in cells})
    rows = [[*key, *(cells.get(stride, "") for stride in strides)] for key, cells in sets.items()]
    return _table(["set", "CTs", "tile", "padding", *(f"stride {stride}" for stride in strides)], rows)


def _dice_of_cases(rows: list[dict[str, str]]) -> list[float]:
    """Mean Dice of the labels of every case, in the order of the cases' names."""
    return [
        _mean([row for row in rows if row["case"] == case], "dice") for case in sorted({row["case"] for row in rows})
    ]


def _interval(values: list[float]) -> str:
    """Mean with Student's interval."""
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


def recipes_table() -> str:
    """Recipes and what they cost, from pretrain/results/recipes.csv."""
    from medmamba_pretrain.recipe import read_recipe

    rows = []
    for row in _results("recipes", room="pretrain"):
        recipe = read_recipe(row["recipe"])
        hours = (
            f"{row['training_cpu_h']} on one core"
            if row["training_cpu_h"]
            else f"{row['training_gpu_h_fast']} to {row['training_gpu_h_slow']} on one GPU"
        )
        rows.append(
            [
                f"`{row['recipe']}`",
                f"{'x'.join(map(str, recipe.patch_size))} at {recipe.spacing_mm[0]:g} mm",
                _millions(int(row["encoder_parameters"])),
                f"{int(row['crops']):,}",
                hours,
                *(f"{row[f'disk_gib_{n}']} GiB, {row[f'ingest_core_h_{n}']} core-h" for n in (100, 6814, 100000)),
            ]
        )
    corpora = [f"corpus of {n}" for n in ("100", "6,814", "100,000")]
    return _table(["recipe", "crops", "encoder", "crops seen", "hours of training", *corpora], rows)


def image_messages_table(refuses: bool) -> str:
    """Messages about images: refusals, or notes."""
    from medmamba.inference.reading import MESSAGES

    return _messages_table({name: entry for name, entry in MESSAGES.items() if entry.refuses == refuses})


def model_messages_table() -> str:
    """Notes about images beside a model."""
    from medmamba.inference.check.messages import MODEL_MESSAGES

    return _messages_table(MODEL_MESSAGES)


def _messages_table(messages: Mapping[str, Any]) -> str:
    """Each id is an anchor of the page."""
    rows = [
        [f'<a id="{name.lower()}"></a>{name}', f"`{entry.code}`", _cell(entry.meaning), _cell(entry.remedy)]
        for name, entry in messages.items()
    ]
    return _table(["id", "code", "what it means", "what to do"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "block-options": block_options_table,
    "commands": commands_table,
    "changes": changes_lists,
    "cores": cores_table,
    "curves": curves_table,
    "first-table-hippocampus": lambda: accuracy_table("first_table", "Dataset004_Hippocampus"),
    "first-table-head-and-neck": lambda: accuracy_table("first_table", "Dataset101_OpenKBP_HN"),
    "first-table-paired": first_table_paired,
    "mixers-hippocampus": lambda: accuracy_table("mixers", "Dataset004_Hippocampus"),
    "distillation": distillation_table,
    "masked-air": masked_air_table,
    "masked-time": masked_time_table,
    "messages-model": model_messages_table,
    "messages-notes": lambda: image_messages_table(refuses=False),
    "messages-refusals": lambda: image_messages_table(refuses=True),
    "mixers": mixers_table,
    "mixers-cost-64": lambda: mixers_cost_table("64"),
    "mixers-cost-128": lambda: mixers_cost_table("128"),
    "mixers-sections": mixer_sections,
    "model-problems": model_problems_table,
    "networks": networks_table,
    "networks-readme": lambda: networks_table("docs/reference/networks.md"),
    "presets": presets_table,
    "presets-cost": presets_cost_table,
    "recipes": recipes_table,
    "route-sets": route_sets_table,
    "ssm-modes": ssm_modes_table,
    "transfer-finetune": lambda: transfer_table("finetune"),
    "transfer-finetune-paired": lambda: transfer_paired("finetune"),
    "transfer-probe": lambda: transfer_table("probe"),
    "transfer-probe-paired": lambda: transfer_paired("probe"),
    "transfer-reconstruction": transfer_reconstruction,
    "weights": weights_table,
}


def documents() -> list[Path]:
    """All Markdown files of the repository that may hold a table."""
    top = [CHECKOUT / "README.md", *CHECKOUT.glob("*/README.md")]
    return sorted([*top, *(CHECKOUT / "docs").rglob("*.md")])


def refreshed(text: str) -> str:
    """A document with all its tables made anew.

    Raises:
        KeyError: a marker with a name that ``TABLES`` does not hold.
    """

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise KeyError(f"no table {name!r}; known: {', '.join(sorted(TABLES))}")
        return f"{match[1]}{TABLES[name]().rstrip()}\n{match[3]}"

    return MARKED.sub(fill, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the generated tables of the documents.")
    parser.add_argument("--check", action="store_true", help="write nothing; return 1 when a table is stale")
    check = parser.parse_args(argv).check
    stale = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        fresh = refreshed(text)
        if fresh != text:
            stale.append(str(path.relative_to(CHECKOUT)))
            if not check:
                path.write_text(fresh, encoding="utf-8")
    for name in stale:
        print(f"{'stale' if check else 'written'}: {name}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
