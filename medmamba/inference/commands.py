"""The commands of prediction. Light; the work is imported when they run."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.command import Command, CommandError

if TYPE_CHECKING:
    from medmamba.inference.model import Model

_CHECKPOINT = "checkpoint_final.pth"
#: As medmamba.inference.model.rounding has them; importing that loads torch.
_PRECISIONS = ("float32", "float16", "bfloat16", "int8")


def _configure_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="trained folder: nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION, "
        "or a model package, to make a smaller copy of it"
    )  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, metavar="MODEL", help="folder to write; it must not exist")
    parser.add_argument(
        "--fold", nargs="+", metavar="FOLD", help="folds: 0 1 ... or all; default: all that are trained"
    )
    parser.add_argument("--checkpoint", default=_CHECKPOINT, metavar="NAME", help="file of each fold to export")
    parser.add_argument("--licence", metavar="TEXT", help="licence of the weights; default: not stated")
    parser.add_argument(
        "--intended-use", metavar="TEXT", help="what the model is for; that it is for research is added"
    )
    parser.add_argument(
        "--weights", choices=_PRECISIONS, help="how weights are stored; bfloat16 and int8 round those of convolutions "
        "and linear maps, float16 all; default: float32"
    )  # fmt: skip
    parser.add_argument(
        "--half", dest="weights", action="store_const", const="float16", help="the same as --weights float16"
    )
    parser.add_argument(
        "--scan-input-quantile", type=_share, metavar="Q", help="clip what the scans read at this quantile of its "
        "size, e.g. 0.9999; default: no clipping"
    )  # fmt: skip
    parser.add_argument(
        "--calibrate-on", type=Path, metavar="IMAGES", help="folder of images on which that quantile is taken"
    )
    parser.add_argument(
        "--trust-plans", action="store_true", help="the trainer is not known, but builds the network of the plans"
    )
    parser.add_argument(
        "--seal", action="store_true", help="RUN is a model package: accept its MODEL_CARD.md as it now is"
    )


def _export(arguments: argparse.Namespace) -> int:
    from medmamba.inference.model import ModelRefused, seal_card

    if arguments.seal == (arguments.out is not None):
        raise CommandError("give either -o MODEL, the folder to write, or --seal for a package whose card was edited")
    try:
        model = seal_card(arguments.run) if arguments.seal else _written(arguments)
    except ModelRefused as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"the package cannot be written ({error}); nothing was changed", exit_code=1) from error
    size = sum(path.stat().st_size for path in model.path.iterdir())
    print(f"wrote {model.path}: folds {', '.join(model.folds)}, {size / 1e6:.2f} MB\nid: {model.id}")
    if not arguments.seal:
        print(f"fill in {model.path / 'MODEL_CARD.md'}, then run: medmamba export {model.path} --seal")
    return 0


def _written(arguments: argparse.Namespace) -> Model:
    """The package that the arguments ask for."""
    from medmamba.inference.model import convert_model, load_model
    from medmamba.inference.model.package import MODEL, TRAINED

    if (arguments.scan_input_quantile is None) != (arguments.calibrate_on is None):
        raise CommandError("--scan-input-quantile Q and --calibrate-on IMAGES belong together; give both or none")
    precision = arguments.weights or "float32"
    is_package = (arguments.run / MODEL).is_file() and not (arguments.run / TRAINED).is_file()
    if is_package:
        _refuse_options_of_runs(arguments)
        source = load_model(arguments.run)
        precision = arguments.weights or source.description.precision
        return convert_model(source, arguments.out, precision=precision, scan_input=_limits(source, arguments))
    if arguments.calibrate_on is None:
        return _exported(arguments, arguments.out, precision)
    with tempfile.TemporaryDirectory(prefix=f".{arguments.out.name}.", dir=arguments.out.absolute().parent) as folder:
        source = _exported(arguments, Path(folder) / "model", "float32")
        return convert_model(source, arguments.out, precision=precision, scan_input=_limits(source, arguments))


def _exported(arguments: argparse.Namespace, out: Path, precision: str) -> Model:
    from medmamba.inference.model import export_model

    return export_model(
        arguments.run,
        out,
        folds=arguments.fold,
        checkpoint=arguments.checkpoint,
        licence=arguments.licence,
        intended_use=arguments.intended_use,
        precision=precision,
        trust_plans=arguments.trust_plans,
    )


def _limits(source: Model, arguments: argparse.Namespace) -> dict[str, Any] | None:
    from medmamba.inference.calibrate import scan_input_limits

    if arguments.calibrate_on is None:
        return None
    return scan_input_limits(source, arguments.calibrate_on, arguments.scan_input_quantile)


def _refuse_options_of_runs(arguments: argparse.Namespace) -> None:
    given = {
        "--fold": arguments.fold,
        "--checkpoint": arguments.checkpoint != _CHECKPOINT,
        "--licence": arguments.licence,
        "--intended-use": arguments.intended_use,
        "--trust-plans": arguments.trust_plans,
    }
    named = [name for name, value in given.items() if value]
    if named or not (arguments.weights or arguments.calibrate_on):
        problem = f"takes no {', '.join(named)}" if named else "wants --weights or --scan-input-quantile"
        raise CommandError(f"{arguments.run} is a model package, and a copy of it {problem}; see medmamba export -h")


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return share


EXPORT = Command(
    help="a trained folder of nnU-Net as a model package: safe files with checksums and a model card",
    configure=_configure_export,
    run=_export,
)
