"""The commands of prediction. Light; the work is imported when they run."""

from __future__ import annotations

import argparse
from pathlib import Path

from medmamba.command import Command, CommandError


def _configure_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="trained folder: nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION"
    )
    parser.add_argument("-o", "--out", type=Path, metavar="MODEL", help="folder to write; it must not exist")
    parser.add_argument(
        "--fold", nargs="+", metavar="FOLD", help="folds: 0 1 ... or all; default: all that are trained"
    )
    parser.add_argument(
        "--checkpoint", default="checkpoint_final.pth", metavar="NAME", help="file of each fold to export"
    )
    parser.add_argument("--licence", metavar="TEXT", help="licence of the weights; default: not stated")
    parser.add_argument(
        "--intended-use", metavar="TEXT", help="what the model is for; that it is for research is added"
    )
    parser.add_argument("--half", action="store_true", help="round the weights to float16: half the size")
    parser.add_argument(
        "--trust-plans", action="store_true", help="the trainer is not known, but builds the network of the plans"
    )
    parser.add_argument(
        "--seal", action="store_true", help="RUN is a model package: accept its MODEL_CARD.md as it now is"
    )


def _export(arguments: argparse.Namespace) -> int:
    from medmamba.inference.model import ModelRefused, export_model, seal_card

    if arguments.seal == (arguments.out is not None):
        raise CommandError("give either -o MODEL, the folder to write, or --seal for a package whose card was edited")
    try:
        if arguments.seal:
            model = seal_card(arguments.run)
        else:
            model = export_model(
                arguments.run,
                arguments.out,
                folds=arguments.fold,
                checkpoint=arguments.checkpoint,
                licence=arguments.licence,
                intended_use=arguments.intended_use,
                half=arguments.half,
                trust_plans=arguments.trust_plans,
            )
    except ModelRefused as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"the package cannot be written ({error}); nothing was changed", exit_code=1) from error
    print(f"wrote {model.path}: folds {', '.join(model.folds)}\nid: {model.id}")
    if not arguments.seal:
        print(f"fill in {model.path / 'MODEL_CARD.md'}, then run: medmamba export {model.path} --seal")
    return 0


EXPORT = Command(
    help="a trained folder of nnU-Net as a model package: safe files with checksums and a model card",
    configure=_configure_export,
    run=_export,
)
