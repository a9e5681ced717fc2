"""The commands ``env``, ``run``, ``train``, ``predict``, ``import-weights``, ``encoder`` and ``doctor``.

Light; the work is imported when they run.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from medmamba.command import Command, CommandError
from medmamba.inference import predict_command
from medmamba.nnunet import train_options
from medmamba.nnunet.names import EXT_TRAINER, TRAINER_NAMES_IN_WORDS, ext_trainer_value


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _env(arguments: argparse.Namespace) -> int:
    print(f"export {EXT_TRAINER}={shlex.quote(ext_trainer_value())}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from medmamba.nnunet.host import console_commands, run_console_command

    if not arguments.arguments or arguments.arguments[0] in ("-h", "--help"):
        print("usage: medmamba run nnUNetv2_COMMAND ...\n")
        print(f"Runs a command of nnU-Net with medmamba's trainers in reach:\n  {TRAINER_NAMES_IN_WORDS}\n")
        print("\n".join(["commands:", *(f"  {name}" for name in console_commands())]))
        return 0 if arguments.arguments else 2
    name, *rest = arguments.arguments
    return run_console_command(name, rest)


def _train(arguments: argparse.Namespace) -> int:
    from medmamba.nnunet.host import passing_signals_on, run_console_command
    from medmamba.nnunet.preflight import check_training

    if {"-h", "--help"} & set(arguments.arguments):
        print(train_options.HELP)
    for_nnunet = train_options.take(arguments.arguments)
    with passing_signals_on():
        return run_console_command("nnUNetv2_train", check_training(for_nnunet))


def _predict(arguments: argparse.Namespace) -> int:
    from medmamba.nnunet.host import run_console_command
    from medmamba.nnunet.preflight import check_prediction

    if "arguments" not in arguments:
        return predict_command.PREDICT.run(arguments)
    return run_console_command("nnUNetv2_predict", check_prediction(arguments.arguments))


def _configure_predict(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "segments images with a model package (-m), without any setting of nnU-Net; without -m it is nnUNetv2_predict "
        "with -tr filled in, and takes what `medmamba run nnUNetv2_predict -h` lists"
    )
    predict_command.PREDICT.configure(parser)


def _is_for_nnunet(words: Sequence[str]) -> bool:
    """nnUNetv2_predict has no argument that begins like ours for the package."""
    asks_for_help = not words or {"-h", "--help"} & set(words)
    return not asks_for_help and not any(word.startswith(("-m", "--mo")) for word in words)


def _configure_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="weights of VMamba, VM-UNet, MSVM-UNet or MHS-VM (.pth, .pt or .safetensors)",
    )
    parser.add_argument("-d", dest="dataset", metavar="DATASET", help="dataset name or number, e.g. 4")
    parser.add_argument(
        "-p", dest="plans", metavar="PLANS", required=True, help="plans of the dataset, or without -d a plans file"
    )
    parser.add_argument("-c", dest="configuration", metavar="CONFIG", required=True, help="e.g. 3d_fullres")
    parser.add_argument(
        "-o", dest="output", type=Path, metavar="OUT", required=True, help="file for -pretrained_weights"
    )
    parser.add_argument(
        "--mirror-decoder",
        action="store_true",
        help="with an encoder of VMamba: start the decoder's blocks like the encoder's, as VM-UNet does",
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="load what fits and report the rest; native plans need it, their fine stages have no counterpart",
    )
    parser.add_argument("--input-channels", type=int, metavar="N", help="default: as dataset.json says")
    parser.add_argument("--num-classes", type=int, metavar="N", help="default: as dataset.json says")


def _import(arguments: argparse.Namespace) -> int:
    from medmamba.nnunet.import_weights import Import, import_weights

    print(import_weights(Import(**vars(arguments))))
    print(f"wrote {arguments.output}")
    dataset, plans = arguments.dataset or "DATASET", Path(arguments.plans).stem
    print(
        f"next: nnUNetv2_train {dataset} {arguments.configuration} 0 -p {plans} -pretrained_weights {arguments.output}"
    )
    return 0


def _configure_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="encoder.safetensors of `medmamba pretrain run`")
    parser.add_argument(
        "--nnssl",
        type=Path,
        metavar="OUT",
        help="write the encoder as a .pth with the block that the tools of nnssl read as well",
    )


def _encoder(arguments: argparse.Namespace) -> int:
    from medmamba.nnunet.describe_encoder import describe_encoder
    from medmamba.weights import WeightsError, read_encoder, write_nnssl_checkpoint

    try:
        description, tensors = read_encoder(arguments.file)
        print(describe_encoder(description, tensors))
        if arguments.nnssl is not None:
            write_nnssl_checkpoint(arguments.nnssl, arguments.file)
            print(f"wrote {arguments.nnssl}")
    except WeightsError as error:
        raise CommandError(str(error)) from error
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CommandError(f"{arguments.nnssl} cannot be written ({error}); choose another --nnssl") from error
    return 0


def _configure_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mixer",
        metavar="NAME",
        help="check a mixer instead, ours or that of an installed package: the laws of cores and mixers, one line each",
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from medmamba.nnunet.doctor import examine, heading, line, summary
    from medmamba.nnunet.doctor_mixer import examine_mixer

    found = examine() if arguments.mixer is None else examine_mixer(arguments.mixer)
    print(heading(), flush=True)
    checks = []
    for check in found:
        checks.append(check)
        print(line(check), flush=True)
    print(summary(checks))
    return 1 if any(check.status == "fail" for check in checks) else 0


ENV = Command(
    help='print what lets stock nnU-Net find our trainers: eval "$(medmamba env)"',
    configure=_no_arguments,
    run=_env,
)
RUN = Command(
    help="run any nnUNetv2_ command with our trainers in reach",
    configure=_no_arguments,
    run=_run,
    passthrough=True,
)
TRAIN = Command(
    help="nnUNetv2_train with our trainers, and with --restart, --seed, --save-minutes, --no-rehearsal, --teacher",
    configure=_no_arguments,
    run=_train,
    passthrough=True,
)
PREDICT = Command(
    help="segment images with a model package (-m), or as nnUNetv2_predict from nnUNet_results",
    configure=_configure_predict,
    run=_predict,
    passthrough=_is_for_nnunet,
)
IMPORT = Command(
    help="published 2D weights into the network of a plan, for -pretrained_weights",
    configure=_configure_import,
    run=_import,
)
ENCODER = Command(
    help="what the file of a pretrained encoder says about it",
    configure=_configure_encoder,
    run=_encoder,
)
DOCTOR = Command(
    help="check this installation, or a mixer, and name the remedy for what fails",
    configure=_configure_doctor,
    run=_doctor,
)
