"""``nnunet_lgms doctor``: is this machine ready to train?

One line a finding; a finding that needs something done is followed by the line to type. Exit code 1 when
``nnUNetv2_train … -tr nnUNetTrainerLGMSNet`` would fail as things are, 0 otherwise.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from nnunet_lgms import __version__
from nnunet_lgms.files import one_line
from nnunet_lgms.requirements import RequirementError, require_nnunetv2

OK, WARNING, PROBLEM = "ok", "warning", "PROBLEM"
GIB = 2**30

# A run of 3d_fullres writes three checkpoints of about 50 MB each; a preprocessed dataset is often several GiB.
DISK_PROBLEM_GIB, DISK_WARNING_GIB = 0.5, 10
# Batches travel from nnU-Net's augmentation workers to training in shared memory; a container's default is 64 MiB.
SHARED_MEMORY_WARNING_GIB = 1


# Measured on an H100 (benchmarks/results/depthwise.md)
SLOWER = "On an H100 a 3D depthwise convolution takes 18 (kernel 3) to 54 times (kernel 9) as long so."
CUDA_BUILDS = "https://download.pytorch.org/whl/cu128"
OLDER_CUDA_BUILDS = "https://download.pytorch.org/whl/cu126"  # the last ones for cards before the T4, up to torch 2.14


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: ``OK``; ``WARNING``, training works but not as well as it could; ``PROBLEM``, training would fail.
        topic: one word for the left column.
        text: what was found.
        fix: the line to type, where there is one.
    """

    state: str
    topic: str
    text: str
    fix: str | None = None

    def __str__(self) -> str:
        line = f"{self.state:8} {self.topic:20} {self.text}"
        return f"{line}\n{'':30}-> {self.fix}" if self.fix else line


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "doctor",
        help="is this machine ready to train?",
        description="Checks versions, the trainers, GPU, compiling, nnU-Net's folders and disk space. "
        "Exit code 1 when training would fail.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, for programs")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.json:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries say as they are imported
            findings = list(examine())
        problems = sum(finding.state == PROBLEM for finding in findings)
        print(json.dumps({"ready": not problems, "findings": [asdict(finding) for finding in findings]}, indent=1))
        return int(problems > 0)
    findings = []
    for finding in examine():
        print(finding, flush=True)
        findings.append(finding)
    problems = sum(finding.state == PROBLEM for finding in findings)
    if problems:
        print(f"\nnot ready: {problems} {'problem' if problems == 1 else 'problems'} to solve first")
        return 1
    device = "" if _has_cuda() else f" -device {_device_without_cuda()}"
    print(f"\nready: nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerLGMSNet{device}")
    return 0


def examine() -> Iterator[Finding]:
    """All findings, each as soon as it is known. What depends on a package that is missing is left out."""
    versions = check_versions()
    yield versions
    if versions.state == PROBLEM:
        return
    numbers = list(check_numbers())
    yield from numbers
    if not numbers:  # nnU-Net cannot be imported with these
        yield check_trainers()
    yield check_gpu()
    yield check_compile()
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        yield check_folder(variable, must_write=variable != "nnUNet_raw")
    yield from check_disk()
    yield from check_shared_memory()


def check_versions() -> Finding:
    ours = f"nnunet_lgms {__version__}"
    python = f"Python {platform.python_version()}"
    try:
        nnunet = require_nnunetv2()
    except RequirementError as error:
        sentence, _, fix = str(error).partition(": ")
        return Finding(PROBLEM, "versions", f"{ours}, {python}; {sentence}", fix)
    try:
        import torch
    except ImportError as error:
        return Finding(PROBLEM, "versions", f"{ours}, {python}; torch cannot be imported: {error}", "pip install torch")
    return Finding(OK, "versions", f"{ours}, nnunetv2 {nnunet}, torch {torch.__version__}, {python}")


def check_numbers() -> Iterator[Finding]:
    """Numbers that nnU-Net reads from the environment as it is imported; what is no number stops it."""
    for variable, least in (("nnUNet_def_n_proc", 1), ("nnUNet_n_proc_DA", 0)):
        value = os.environ.get(variable)
        try:
            if value is None or int(value) >= least:
                continue
            text = f"is {value!r}, not a number from {least} on"
        except ValueError:
            text = f"is {value!r}, not a number"
        yield Finding(PROBLEM, variable, f"{text}: nnU-Net starts that many processes", _unset(variable))


def check_trainers(name: str = "nnUNetTrainerLGMSNet") -> Finding:
    """Asks nnU-Net's own finder for each of our trainers, as nnUNetv2_train does."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find

            variants = sorted(t.__name__ for t in _subclasses(find(name)) if t.__module__.startswith("nnunet_lgms."))
            for variant in variants:
                find(variant)
    except Exception as error:  # the finder imports every trainer it passes, so anything may surface here
        reason = " ".join(str(error).split())
        if "torchvision::" in reason:
            text = "nnU-Net's finder fails: torchvision was built for another torch than the one that is installed"
            return Finding(PROBLEM, "trainers", text, _torch_and_torchvision())
        if isinstance(error, RuntimeError) and "Could not find requested nnunet trainer" in reason:
            folders = os.environ.get("nnUNet_extTrainer", "")
            text = f"nnU-Net does not find {name} (nnUNet_extTrainer={folders!r})"
            return Finding(PROBLEM, "trainers", text, _set("nnUNet_extTrainer", str(_trainers_folder() or "TRAINERS")))
        file = _file_that_failed(error)
        text = f"nnU-Net's finder fails in {file} with {type(error).__name__}: {one_line(reason)}"
        ours = Path(__file__).resolve().parents[1]
        if ours in file.parents or file.parent == _trainers_folder():
            return Finding(PROBLEM, "trainers", text, "pip install --force-reinstall .  # in the clone")
        return Finding(PROBLEM, "trainers", text)
    where = said.getvalue().rsplit("from: ", 1)[-1].strip() if "from: " in said.getvalue() else "nnunetv2 itself"
    also = ", ".join(variant.removeprefix(name) for variant in variants)
    return Finding(OK, "trainers", f"{name} ({also}) found in {where}")


def _subclasses(of: type) -> Iterator[type]:
    for direct in of.__subclasses__():
        yield direct
        yield from _subclasses(direct)


def check_gpu() -> Finding:
    """The card, what PyTorch makes of it, and the path that this package's operators take on it."""
    import torch

    if not _has_cuda():
        return _without_cuda()
    properties = torch.cuda.get_device_properties(0)
    text = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
    if torch.cuda.device_count() > 1:
        text += f", and {torch.cuda.device_count() - 1} more"
    if torch.version.hip is not None:
        text += f", ROCm {torch.version.hip}"
    else:
        text += f", capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
    capability = properties.major, properties.minor
    if torch.version.hip is None and not _is_served(capability, archs := torch.cuda.get_arch_list()):
        text += f"; this torch has no code for that capability, only for {', '.join(archs)}"
        fix = "pip install --force-reinstall torch torchvision"
        return Finding(PROBLEM, "GPU", text, f"{fix} --index-url {OLDER_CUDA_BUILDS}" if capability < (7, 5) else fix)
    from nnunet_lgms.ops import kernels_for
    from nnunet_lgms.ops.backend import HAS_TRITON

    if kernels_for("cuda:0").path == "kernels" and (failure := _launch_one()) is not None:
        return Finding(PROBLEM, "GPU", f"{text}; a small kernel {failure}", _set("NNUNET_LGMS_KERNELS", "off"))
    decision = kernels_for("cuda:0")  # as it is after the launch
    if decision.path == "kernels":
        return Finding(OK, "GPU", f"{text}, Triton {version('triton')}, whose kernels run. {decision.reason}")
    recorded = "without CUDA graphs" if torch.version.hip is not None else "and predictions are CUDA graphs of them"
    text += f"; PyTorch's operators are used, {recorded}. {decision.reason} {SLOWER}"
    can_install = not HAS_TRITON and sys.platform == "linux" and torch.version.hip is None
    return Finding(WARNING, "GPU", text, "pip install triton" if can_install else None)


def _is_served(capability: tuple[int, int], archs: list[str]) -> bool:
    """Whether PyTorch's code runs on a card: machine code of its generation, or code that the driver compiles."""
    for arch in archs:
        kind, _, number = arch.partition("_")
        digits = number.rstrip("af")
        built = int(digits[:-1]), int(digits[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return not archs  # a build that does not say


def _without_cuda() -> Finding:
    import torch

    if torch.backends.mps.is_available():
        text = (
            "Apple's GPU (MPS): PyTorch's operators are used, in float32, with -device mps. The Triton kernels need an "
            "NVIDIA GPU. Not run on such a machine"
        )
        missing = missing_on_mps(torch.__version__)
        if not missing or os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK", "0") not in ("", "0"):
            return Finding(WARNING, "GPU", text)
        text += (
            f". torch {torch.__version__} has no {' and no '.join(missing)} there, which 3D needs: those go to the CPU"
        )
        return Finding(
            WARNING, "GPU", text, f"{_set('PYTORCH_ENABLE_MPS_FALLBACK', '1')}  # or: pip install 'torch>=2.10'"
        )
    if shutil.which("nvidia-smi"):
        if torch.version.cuda is None:
            text = f"torch {torch.__version__} is a build without CUDA, though an NVIDIA driver is installed"
            index = f" --index-url {CUDA_BUILDS}" if os.name == "nt" else ""  # PyPI has those for Linux only
            fix = f"pip install --force-reinstall torch torchvision{index}  # a CUDA build"
            return Finding(WARNING, "GPU", text, fix)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            text = f"no CUDA device, as CUDA_VISIBLE_DEVICES is {visible!r}"
            return Finding(WARNING, "GPU", text, _unset("CUDA_VISIBLE_DEVICES"))
        if (driver := _driver_version()) and driver < _major_and_minor(torch.version.cuda):
            knows = ".".join(map(str, driver))
            text = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, and this driver knows {knows}"
            fix = "a newer driver, or: pip install 'torch<2.11' torchvision" if driver[0] == 12 else "a newer driver"
            return Finding(WARNING, "GPU", text, fix)
    return Finding(WARNING, "GPU", "no CUDA device: training needs -device cpu, and suits small data only")


def missing_on_mps(torch_version: str) -> list[str]:
    """The operators of LGMSNet that PyTorch's builds for macOS of that version lack on Apple's GPU.

    Read from the lists of operators in those builds (torchgen's native_functions.yaml in 2.6.0, 2.7.1, 2.8.0, 2.10.0
    and 2.11.0); 2.9 is none of nnU-Net's.
    """
    release = _major_and_minor(torch_version)
    since = {"max_pool3d": (2, 9), "upsample_trilinear3d": (2, 8)}
    return [operator for operator, first in since.items() if release < first]


def _device_without_cuda() -> str:
    import torch

    return "mps" if torch.backends.mps.is_available() else "cpu"


def _driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver can run; None if it does not say."""
    import torch

    number = getattr(torch._C, "_cuda_getDriverVersion", int)()
    return (number // 1000, number % 1000 // 10) if number else None


def _major_and_minor(version_of_cuda: str) -> tuple[int, int]:
    major, minor, *_ = (*version_of_cuda.split("."), "0")
    return int(major), int(minor)


def _launch_one() -> str | None:
    """Pools a small map with this package's kernel. Returns what is wrong with that; None if nothing is."""
    import torch

    from nnunet_lgms.ops import max_pool

    try:
        x = torch.rand(1, 16, 32, 32, device="cuda:0").to(memory_format=torch.channels_last)
        same = torch.equal(max_pool(x, (2, 2)), torch.nn.functional.max_pool2d(x, 2))
    except Exception as error:  # of a driver, a compiler or a library: whatever it is, training would meet it
        return f"fails: {one_line(error)}"
    return None if same else "computes something else than PyTorch"


def check_compile() -> Finding:
    """Would nnU-Net compile the network, and does what torch.compile and Triton build with exist?"""
    if not _has_cuda():
        return Finding(OK, "compile", "nnU-Net does not compile on this machine, nothing is needed")
    from nnunet_lgms.graphs.compilation import is_wanted, why_not_compiled

    if not is_wanted():
        text = f"switched off (nnUNet_compile is {os.environ['nnUNet_compile']!r}), so training is slower"
        return Finding(WARNING, "compile", text, _unset("nnUNet_compile"))
    if (reason := why_not_compiled("cuda:0")) is not None:
        return Finding(OK, "compile", f"{reason} A training on one GPU is recorded as CUDA graphs instead")
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CC") or "gcc", "gcc", "cc", "clang"])), None)
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = [what for what, there in (("a C compiler", compiler), (f"{header}", header.exists())) if not there]
    if missing:
        text = f"nnU-Net compiles the network, which needs {' and '.join(missing)}"
        fix = "apt-get install build-essential python3-dev  # or, slower: export nnUNet_compile=f"
        return Finding(PROBLEM, "compile", text, fix)
    return Finding(OK, "compile", f"nnU-Net compiles the network, with {compiler}")


def check_folder(variable: str, must_write: bool) -> Finding:
    """One of nnU-Net's three folders: set, there, and writable. Raw data is read-only on many clusters."""
    value = os.environ.get(variable)
    if not value:
        place = Path.home() / "nnunet" / variable
        return Finding(PROBLEM, variable, "is not set", _set(variable, str(place)))
    if misspelt := _misspelt_path(variable, value):
        return misspelt
    folder, quoted = Path(value), _quoted(value)
    if not folder.is_absolute():
        text = f"is {value!r}, another folder wherever nnU-Net is started"
        state = WARNING if folder.is_dir() else PROBLEM
        return Finding(state, variable, text, _set(variable, os.path.abspath(value)))
    if not folder.exists():
        return Finding(
            PROBLEM, variable, f"{value} does not exist", f"mkdir {'' if os.name == 'nt' else '-p '}{quoted}"
        )
    if not folder.is_dir():
        return Finding(PROBLEM, variable, f"{value} is not a folder", _set(variable, "A_FOLDER"))
    if _can_write(folder):
        return Finding(OK, variable, value)
    if not must_write:
        return Finding(OK, variable, f"{value} (read-only, which is enough to train)")
    return Finding(PROBLEM, variable, f"{value} cannot be written to", _writable(value))


def _misspelt_path(variable: str, value: str) -> Finding | None:
    """What a shell, a container or a file of settings left in a path; the folder itself may well be there."""
    bare = value.strip()
    unquoted = bare.strip("\"'")
    if bare != value:
        text = f"is {value!r}, with blanks or line ends around it that belong to no folder"
    elif unquoted != bare:
        text = f"is {value!r}: its quotation marks belong to it, take the quotes off"
    elif bare.startswith("~"):
        text = f"is {value!r}: nobody replaces the ~ in it, write $HOME"
    elif os.path.expandvars(bare) != bare or "$" in bare and not Path(bare).exists():
        text = f"is {value!r}: nobody replaces the $ in it, write the folder's whole name"
    else:
        return None
    meant = os.path.expandvars(os.path.expanduser(unquoted.strip()))
    return Finding(PROBLEM, variable, text, _set(variable, meant))


def check_disk() -> Iterator[Finding]:
    """Free space where preprocessed data and results go; one finding for each file system."""
    places: dict[int, list[str]] = {}
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        value = os.environ.get(variable)
        if value and Path(value).is_dir():
            places.setdefault(os.stat(value).st_dev, []).append(variable)
    for variables in places.values():
        free = shutil.disk_usage(os.environ[variables[0]]).free / GIB
        text = f"{free:.1f} GiB free for {' and '.join(variables)}"
        fix = _set(variables[-1], "A_FOLDER_ON_A_LARGER_DISK")
        if free < DISK_PROBLEM_GIB:
            yield Finding(PROBLEM, "disk", text, fix)
        elif free < DISK_WARNING_GIB:
            yield Finding(WARNING, "disk", text, fix)
        else:
            yield Finding(OK, "disk", text)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """A small /dev/shm, as containers have, kills nnU-Net's augmentation workers."""
    if not folder.is_dir() or os.environ.get("nnUNet_n_proc_DA") == "0":
        return
    size = shutil.disk_usage(folder).total / GIB
    if size < SHARED_MEMORY_WARNING_GIB:
        text = f"{folder} has {size:.2f} GiB, too little for nnU-Net's augmentation workers"
        yield Finding(WARNING, "memory", text, "docker run --ipc=host …  # or: nnUNet_n_proc_DA=0 nnUNetv2_train …")


def _set(variable: str, value: str) -> str:
    """The line that sets a variable, of bash, or of PowerShell on Windows."""
    return f"$env:{variable} = {_quoted(value)}" if os.name == "nt" else f"export {variable}={_quoted(value)}"


def _unset(variable: str) -> str:
    return f"Remove-Item Env:{variable}" if os.name == "nt" else f"unset {variable}"


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'" if os.name == "nt" else shlex.quote(value)


def _writable(folder: str) -> str | None:
    return None if os.name == "nt" else f"chmod u+w {shlex.quote(folder)}  # or choose another folder"


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _can_write(folder: Path) -> bool:
    # os.access says yes to root, and to what a network file system may still refuse
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _file_that_failed(error: Exception) -> Path:
    """The innermost file of a traceback that is no library's: the trainer that cannot be imported, mostly."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    theirs = [file for file in files if not {"site-packages", "dist-packages", "importlib"} & {*file.parts}]
    theirs = [file for file in theirs if file.is_absolute() and file != Path(__file__)]
    return (theirs or files)[-1]


def _trainers_folder() -> Path | None:
    """The trainers of this installation, or of the checkout that the package was imported from."""
    package = Path(__file__).resolve().parents[1]
    return next((folder for folder in (package / "trainers", package.parent / "trainers") if folder.is_dir()), None)


def _torch_and_torchvision() -> str:
    python = shlex.quote(sys.executable)
    return f"{python} -m pip install --force-reinstall torch torchvision  # both from the same index"
