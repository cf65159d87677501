"""The command line: ``nnunet_lgms COMMAND …``.

A command is one module of this package, listed in ``COMMANDS``, with two functions: ``add_parser(subparsers)`` adds its
parser, ``run(args) -> int`` does the work and returns the exit code. Only the module of the command that was called is
imported, so ``--help`` and ``--version`` answer at once.

Exit codes: 0 done; 1 the command ran and the answer is no (``doctor`` found a problem, ``predict`` left a case out); 2
bad input, said in one sentence on stderr; 130 interrupted.
"""

import argparse
import os
import sys
from contextlib import suppress
from importlib import import_module

from nnunet_lgms import __version__
from nnunet_lgms.files import check_utf8
from nnunet_lgms.nearest import did_you_mean
from nnunet_lgms.requirements import RequirementError
from nnunet_lgms.sentences import out_of_memory, sentence

# name of the module and of the command -> its line in `nnunet_lgms --help`
COMMANDS = {
    "doctor": "is this machine ready to train?",
    "convert": "a downloaded dataset of the paper, or any folder, becomes an nnU-Net dataset",
    "predict": "nnUNetv2_predict in less time and memory, for any model of nnU-Net v2",
    "evaluate": "Dice, IoU, HD95, NSD, precision and recall, with a report",
    "zeroshot": "test a trained model on datasets that it has not seen",
    "plan": "nnU-Net's planning, with patch and batch for LGMSNet on your card",
    "override": "new plans with other kernels, ratios, widths, blocks, patch or batch",
    "profile": "parameters, GMAC, receptive field, memory and time of a plan",
    "export": "a trained model as one ONNX file",
    "runtime": "predict with an exported model, without PyTorch and nnU-Net",
    "view": "a local page: drop an image, see its segmentation",
    "study": "data sets x variants x folds on this machine or a cluster, with one report",
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser, complete for ``command``; the other commands are there by name and help line only."""
    parser = argparse.ArgumentParser(
        prog="nnunet_lgms",
        description="LGMSNet on stock nnU-Net. Training stays nnU-Net's own command: "
        "nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerLGMSNet",
    )
    parser.add_argument("--version", action="version", version=f"nnunet_lgms {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        if name == command:
            import_module(f"{__name__}.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=line)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; never a traceback for what the user can put right."""
    argv = sys.argv[1:] if argv is None else argv
    command = next((word for word in argv if not word.startswith("-")), None)
    with suppress(AttributeError):  # whatever the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        for word in argv:
            check_utf8(word, "argument")
        if command is not None and command not in COMMANDS:
            hint = did_you_mean(command, COMMANDS) or f"there are: {', '.join(COMMANDS)}"
            raise ValueError(f"unknown command {command!r}; {hint}")
        args = build_parser(command).parse_args(argv)
        return import_module(f"{__name__}.{args.command}").run(args)
    except BrokenPipeError:  # `nnunet_lgms … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there at exit
        return 1
    except (ValueError, OSError, MemoryError, RuntimeError, RequirementError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        print(f"nnunet_lgms: {sentence(error)}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse: --help, --version, a wrong option
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("nnunet_lgms: interrupted", file=sys.stderr)
        return 130
