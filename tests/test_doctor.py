"""`nnunet_lgms doctor` and the command line around it."""

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnunet_lgms import __version__, cli
from nnunet_lgms.cli import doctor, main
from nnunet_lgms.graphs import compilation
from nnunet_lgms.ops.backend import Decision

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders exist and are set, and the trainers of the checkout are on its path."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(ROOT / "trainers"))
    return tmp_path


@pytest.mark.slow
def test_ready_machine_is_exit_code_0(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"nnunet_lgms {__version__}" in out and "PROBLEM" not in out
    variants = "_1000epochs, _100epochs, _250epochs, _50epochs, _5epochs, _nnUNetDA, _paper2D, _paper3D, _smoke"
    assert f"nnUNetTrainerLGMSNet ({variants}) found in {ROOT / 'trainers'}" in out
    assert out.splitlines()[-1].startswith("ready: nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerLGMSNet")


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_that_is_not_set_or_missing_is_exit_code_1(
    ready: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "check_trainers", lambda: doctor.Finding(doctor.OK, "trainers", "not asked here"))
    monkeypatch.delenv(name)
    assert main(["doctor"]) == 1
    assert f"-> export {name}=" in capsys.readouterr().out
    monkeypatch.setenv(name, str(ready / "a b"))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"-> mkdir -p '{ready / 'a b'}'" in out and "not ready: 1 problem to solve first" in out


def test_folder_must_be_a_folder_and_results_writable_but_raw_data_need_not_be(
    ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ready / "file").touch()
    monkeypatch.setenv("nnUNet_results", str(ready / "file"))
    assert doctor.check_folder("nnUNet_results", must_write=True).state == doctor.PROBLEM
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", _raise(PermissionError("read-only")))
    monkeypatch.setenv("nnUNet_results", str(ready))
    assert "chmod" in doctor.check_folder("nnUNet_results", must_write=True).fix
    assert doctor.check_folder("nnUNet_raw", must_write=False).state == doctor.OK


@pytest.mark.parametrize(
    ("value", "said", "meant"),
    [
        ('"{folder}"', "take the quotes off", "{folder}"),
        ("'{folder}'", "take the quotes off", "{folder}"),
        ("{folder}\r", "line ends around it", "{folder}"),
        (" {folder}", "blanks or line ends", "{folder}"),
        ("~/results", "nobody replaces the ~", "{home}/results"),
        ("$HOME/results", "nobody replaces the $", "{home}/results"),
        ("${{HOME}}/a b", "nobody replaces the $", "'{home}/a b'"),
        ("results", "another folder wherever nnU-Net is started", "{cwd}/results"),
    ],
)
def test_a_misspelt_path_is_named_with_its_value_and_no_folder_of_that_name_is_advised(
    ready: Path, monkeypatch: pytest.MonkeyPatch, value: str, said: str, meant: str
) -> None:
    monkeypatch.setenv("HOME", str(ready))
    monkeypatch.setenv("USERPROFILE", str(ready))
    monkeypatch.chdir(ready)
    (ready / "results").mkdir()
    places = {"folder": ready / "results", "home": ready, "cwd": ready}
    value = value.format(**places)
    monkeypatch.setenv("nnUNet_results", value)
    finding = doctor.check_folder("nnUNet_results", must_write=True)
    assert finding.state == (doctor.WARNING if value == "results" else doctor.PROBLEM)
    assert repr(value) in finding.text and said in finding.text
    assert finding.fix == f"export nnUNet_results={meant.format(**places)}"


@pytest.mark.parametrize("variable", ["nnUNet_def_n_proc", "nnUNet_n_proc_DA"])
@pytest.mark.parametrize("value", ["abc", "", "4.0", "-1"])
def test_a_number_that_is_none_is_named_and_nothing_is_reinstalled(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"{variable:20} is {value!r}, " in out and f"-> unset {variable}" in out
    assert "reinstall nnunet-lgms" not in out and "trainers " not in out


@pytest.mark.parametrize(("variable", "value"), [("nnUNet_def_n_proc", "1"), ("nnUNet_n_proc_DA", "0"), ("x", "x")])
def test_numbers_that_are_some_are_not_spoken_of(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert not list(doctor.check_numbers())


def test_a_trainer_of_the_users_own_that_fails_is_named(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finder imports every file it passes; reinstalling this package would change nothing."""
    (ready / "own").mkdir()
    (ready / "own/trainer_of_mine.py").write_text("from nnunetv2 import no_such_thing\n")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(ready / "own"), str(ROOT / "trainers")]))
    finding = doctor.check_trainers()
    assert finding.state == doctor.PROBLEM and finding.fix is None
    assert f"fails in {ready / 'own/trainer_of_mine.py'} with ImportError: " in finding.text


def test_gpus_hidden_by_a_variable_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_has_cuda", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "as CUDA_VISIBLE_DEVICES is '-1'" in doctor.check_gpu().text


def test_missing_nnunet_is_named_with_the_line_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nnunet_lgms.requirements.version", lambda name: "2.5.1")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "needs nnunetv2 2.8 or newer, found 2.5.1" in out and "-> pip install --upgrade 'nnunetv2>=2.8'" in out


def test_trainer_that_is_not_found_names_the_folder_to_add(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(ready))
    finding = doctor.check_trainers()
    assert finding.state == doctor.PROBLEM
    assert finding.fix.startswith("export nnUNet_extTrainer=") and finding.fix.endswith("trainers")


def test_torchvision_of_another_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("operator torchvision::nms does not exist")
    monkeypatch.setattr("nnunetv2.utilities.find_objects.recursive_find_trainer_class_by_name", _raise(error))
    finding = doctor.check_trainers()
    assert finding.state == doctor.PROBLEM and "torchvision was built for another torch" in finding.text


def test_compiling_needs_a_compiler_and_headers_only_where_nnunet_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_compile", raising=False)
    monkeypatch.setattr(doctor, "_has_cuda", lambda: False)
    assert doctor.check_compile().state == doctor.OK
    monkeypatch.setattr(doctor, "_has_cuda", lambda: True)
    monkeypatch.setattr(compilation, "why_not_compiled", lambda device: "A P100 is too old.")
    finding = doctor.check_compile()
    assert finding.state == doctor.OK and "A P100 is too old. A training on one GPU is recorded" in finding.text
    monkeypatch.setattr(compilation, "why_not_compiled", lambda device: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    finding = doctor.check_compile()
    assert finding.state == doctor.PROBLEM and "a C compiler" in finding.text
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: "/nowhere")
    assert "Python.h" in doctor.check_compile().text
    monkeypatch.setenv("nnUNet_compile", "f")
    assert doctor.check_compile().fix == "unset nnUNet_compile"


@pytest.mark.parametrize(("free_gib", "state"), [(0.1, "PROBLEM"), (3, "warning"), (500, "ok")])
def test_disk_space_is_one_finding_for_a_file_system(
    ready: Path, monkeypatch: pytest.MonkeyPatch, free_gib: float, state: str
) -> None:
    usage = namedtuple("usage", "total used free")(2**50, 0, free_gib * 2**30)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    (finding,) = doctor.check_disk()
    assert finding.state == state and "nnUNet_preprocessed and nnUNet_results" in finding.text


def test_small_shared_memory_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(total=64 * 2**20))
    (finding,) = doctor.check_shared_memory(tmp_path)
    assert finding.state == doctor.WARNING
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert not list(doctor.check_shared_memory(tmp_path))


def test_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docter"]) == 2
    assert capsys.readouterr().err == "nnunet_lgms: unknown command 'docter'; did you mean 'doctor'?\n"
    assert main(["zzz"]) == 2
    assert "there are: " in capsys.readouterr().err


def test_version_help_and_a_missing_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nnunet_lgms {__version__}\n"
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_and_is_imported_alone(command: str, clean_env: dict[str, str]) -> None:
    code = (
        "import sys; from nnunet_lgms import cli; code = cli.main([sys.argv[1], '--help']); "
        "others = [c for c in cli.COMMANDS if c != sys.argv[1] and f'nnunet_lgms.cli.{c}' in sys.modules]; "
        "sys.exit(code or repr(others) * bool(others) or 0)"
    )
    env = {**clean_env, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code, command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: nnunet_lgms {command}")


@pytest.mark.parametrize("error", [ValueError("3 is\nnot 4"), FileNotFoundError("3 is not 4")])
def test_what_the_user_can_put_right_is_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "run", _raise(error))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "nnunet_lgms: 3 is not 4\n"


def _raise(error: Exception):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("kernels", "The Triton kernels run on NVIDIA H100."),
        ("pytorch", "The kernels need compute capability 8.0."),
    ],
)
def test_a_gpu_without_kernels_is_told_with_the_reason(path: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    finding = _on_card(monkeypatch, Decision(path, reason))
    assert finding.text.startswith("A card, 8 GiB, capability 8.6, CUDA 12.8") and reason in finding.text
    assert finding.state == (doctor.OK if path == "kernels" else doctor.WARNING)
    assert ("54 times" in finding.text) == ("CUDA graphs of them" in finding.text) == (path == "pytorch")


def _on_card(
    monkeypatch: pytest.MonkeyPatch,
    decision: Decision,
    launch: str | None = None,
    capability: tuple[int, int] = (8, 6),
) -> doctor.Finding:
    card = SimpleNamespace(name="A card", total_memory=8 << 30, major=capability[0], minor=capability[1])
    monkeypatch.setattr(doctor, "_has_cuda", lambda: True)
    monkeypatch.setattr(doctor, "_launch_one", lambda: launch)
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: card)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("nnunet_lgms.ops.kernels_for", lambda device: decision)
    return doctor.check_gpu()


def test_a_kernel_that_cannot_be_launched_is_a_problem_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    finding = _on_card(monkeypatch, Decision("kernels", "They run."), launch="fails: no kernel image")
    assert finding.state == doctor.PROBLEM and "a small kernel fails: no kernel image" in finding.text
    assert finding.fix == "export NNUNET_LGMS_KERNELS=off"


@pytest.mark.parametrize(
    ("capability", "archs", "served"),
    [
        ((6, 0), ["sm_75", "sm_80", "sm_90"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((7, 5), ["sm_70", "sm_80"], True),
        ((8, 9), ["sm_80", "sm_86"], True),
        ((12, 0), ["sm_90a", "sm_100"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((8, 6), [], True),
    ],
)
def test_a_card_that_this_torch_has_no_code_for_is_a_problem(
    capability: tuple[int, int], archs: list[str], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: archs)
    finding = _on_card(monkeypatch, Decision("pytorch", "Too old."), capability=capability)
    assert (finding.state == doctor.PROBLEM) == (not served)
    if not served:
        assert f"only for {', '.join(archs)}" in finding.text
        assert finding.fix.startswith("pip install --force-reinstall torch")
        assert ("whl/cu126" in finding.fix) == (capability < (7, 5))


def test_rocm_is_named_and_no_triton_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.hip", "6.4")
    finding = _on_card(monkeypatch, Decision("pytorch", "This PyTorch is built for AMD's."))
    assert "ROCm 6.4" in finding.text and "AMD's" in finding.text and finding.fix is None
    assert "without CUDA graphs" in finding.text


@pytest.mark.parametrize(("system", "fix"), [("linux", "pip install triton"), ("win32", None), ("darwin", None)])
def test_triton_is_advised_only_where_it_can_be_installed(
    system: str, fix: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnunet_lgms.ops.backend.HAS_TRITON", False)
    monkeypatch.setattr(doctor.sys, "platform", system)
    assert _on_card(monkeypatch, Decision("pytorch", "No Triton.")).fix == fix


def test_apples_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_has_cuda", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    finding = doctor.check_gpu()
    assert finding.state == doctor.WARNING and "MPS" in finding.text and "-device mps" in finding.text
    assert finding.fix is None and "Not run on such a machine" in finding.text


@pytest.mark.parametrize(
    ("version", "missing"),
    [("2.6.0", "max_pool3d and no upsample_trilinear3d"), ("2.8.0", "max_pool3d there"), ("2.10.0", None)],
)
def test_what_apples_gpu_lacks_is_named_with_the_way_out(
    version: str, missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_has_cuda", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.__version__", version)
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)
    finding = doctor.check_gpu()
    assert (finding.fix is not None) == (missing is not None)
    if missing is not None:
        assert missing in finding.text and finding.fix.startswith("export PYTORCH_ENABLE_MPS_FALLBACK=1")
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    assert doctor.check_gpu().fix is None


@pytest.mark.parametrize(("driver", "fix"), [(12040, "torch<2.11"), (11040, "a newer driver")])
def test_a_driver_that_is_older_than_the_build_is_told(driver: int, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_has_cuda", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch._C._cuda_getDriverVersion", lambda: driver, raising=False)
    finding = doctor.check_gpu()
    assert f"built for CUDA 13.0, and this driver knows {driver // 1000}.{driver % 1000 // 10}" in finding.text
    assert fix in finding.fix


def test_lines_for_windows_are_powershells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "os", SimpleNamespace(name="nt"))
    assert doctor._set("nnUNet_raw", r"C:\it's") == r"$env:nnUNet_raw = 'C:\it''s'"
    assert doctor._unset("nnUNet_compile") == "Remove-Item Env:nnUNet_compile"
    assert doctor._writable("C:") is None


def test_json_is_all_that_is_printed(ready: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(doctor, "check_trainers", lambda: doctor.Finding(doctor.OK, "trainers", "not asked here"))
    monkeypatch.delenv("nnUNet_raw")
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ready"]
    (raw,) = [finding for finding in report["findings"] if finding["topic"] == "nnUNet_raw"]
    assert raw["state"] == doctor.PROBLEM and raw["text"] == "is not set" and raw["fix"].startswith("export ")
