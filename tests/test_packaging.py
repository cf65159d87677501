"""What `pip install` puts on a machine: built from the checkout and from the sdist, installed, used, and removed.

Nothing is downloaded. The environments are made from the running interpreter and see its torch and nnunetv2.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import timeit
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PTH = "nnunet_lgms_trainers.pth"
FIND = """
import json, os, sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
trainer = recursive_find_trainer_class_by_name("nnUNetTrainerLGMSNet")
import nnunet_lgms
print(json.dumps([trainer.__name__, trainer.__module__, nnunet_lgms.__file__, os.environ["nnUNet_extTrainer"]]))
"""


def run(*command: str | Path, env: dict[str, str], cwd: Path | None = None) -> str:
    done = subprocess.run([str(c) for c in command], env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("nnUNet", "PYTHON"))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from, so that no build output lands in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("nnunet_lgms", "trainers", "plans", "studies", "workflow", "models"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheels(source: Path, environment: dict[str, str]) -> dict[str, Path]:
    """The wheel built from the checkout, and the one built from the sdist that was built from the checkout."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "-o"]
    found = {}
    for origin, flags in {"checkout": ["--wheel"], "sdist": []}.items():
        run(*build, source / "dist" / origin, *flags, env=environment, cwd=source)
        (found[origin],) = (source / "dist" / origin).glob("*.whl")
    return found


def holds_distributions(path: str) -> bool:
    return any(Path(path or ".").glob("*.dist-info"))


class Environment:
    """A virtual environment that sees the packages of the running one, but not this one, and no ``.pth`` file."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder, env=env)
        self.env = env
        self.folder = folder
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        self.site = Path(run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", env=env)[:-1])
        (self.site / "packages.pth").write_text(f"{folder / 'packages'}\n")
        (folder / "packages").mkdir()
        for path in filter(holds_distributions, reversed(sys.path)):
            for package in Path(path).iterdir():
                link = folder / "packages" / package.name
                if not package.name.startswith("nnunet_lgms") and package.suffix != ".pth":
                    link.unlink(missing_ok=True)  # the first on sys.path counts, as in an import
                    link.symlink_to(package)
        self.files_before = self.files()

    def files(self) -> set[str]:
        found = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*"))
        return {path for path in found if "__pycache__" not in path}

    def pip(self, *args: str | Path) -> str:
        return run(sys.executable, "-m", "pip", "--python", self.python, *args, env=self.env)

    def install(self, *what: str | Path) -> None:
        self.pip("install", "--no-index", "--no-deps", "--force-reinstall", "--no-build-isolation", *what)

    def uninstall(self) -> None:
        self.pip("uninstall", "--yes", "nnunet-lgms")

    def run(self, code: str, **env: str) -> str:
        return run(self.python, "-c", code, env={**self.env, **env}, cwd=self.folder)


@pytest.fixture
def installed(tmp_path: Path, environment: dict[str, str]) -> Environment:
    return Environment(tmp_path / "venv", environment)


def source_files() -> set[str]:
    """Every file of the checkout that must be in the wheel, by its path there."""
    found = [p for p in (ROOT / "nnunet_lgms").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    files = {p.relative_to(ROOT).as_posix() for p in found}
    files |= {f"nnunet_lgms/trainers/{p.name}" for p in (ROOT / "trainers").glob("*.py")}
    files |= {f"nnunet_lgms/plans/{p.name}" for p in (ROOT / "plans").glob("*.json")}
    data = [p for folder in ("studies", "workflow", "models") for p in (ROOT / folder).rglob("*") if p.is_file()]
    return files | {f"nnunet_lgms/{p.relative_to(ROOT).as_posix()}" for p in data}


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["checkout", "sdist"])
def test_wheel_holds_the_package_the_trainers_the_plans_and_nothing_else(wheels: dict[str, Path], origin: str) -> None:
    names = set(zipfile.ZipFile(wheels[origin]).namelist())
    assert {name for name in names if ".dist-info/" not in name} == {*source_files(), PTH}
    assert "nnunet_lgms/trainers/__init__.py" not in names  # a package there would break compiling and pickling


@pytest.mark.slow
def test_the_sdist_makes_the_same_wheel(wheels: dict[str, Path]) -> None:
    contents = [
        {member.filename: member.CRC for member in zipfile.ZipFile(wheels[origin]).infolist()}
        for origin in ("checkout", "sdist")
    ]
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_installed_trainer_is_found_without_any_variable_and_uninstall_leaves_nothing(
    wheels: dict[str, Path], installed: Environment
) -> None:
    installed.install(wheels["sdist"])
    name, module, package, variable = json.loads(installed.run(FIND).splitlines()[-1])
    assert name == "nnUNetTrainerLGMSNet"
    assert Path(package) == installed.site / "nnunet_lgms" / "__init__.py"
    assert Path(variable) == (installed.site / "nnunet_lgms" / "trainers").resolve()
    assert module.startswith("nnunet_lgms."), "a class that lives in trainers/ cannot be pickled by nnU-Net's workers"

    installed.uninstall()
    assert installed.files() == installed.files_before
    assert installed.run("import os; print(os.environ.get('nnUNet_extTrainer'))") == "None\n"


@pytest.mark.slow
def test_editable_install_finds_the_trainer_and_uninstall_leaves_nothing(source: Path, installed: Environment) -> None:
    installed.install("--editable", source)
    name, _, package, variable = json.loads(installed.run(FIND).splitlines()[-1])
    assert name == "nnUNetTrainerLGMSNet"
    assert Path(package) == source / "nnunet_lgms" / "__init__.py"
    assert Path(variable) == (source / "trainers").resolve()

    installed.uninstall()
    assert installed.files() == installed.files_before


@pytest.mark.slow
def test_pth_keeps_the_users_own_paths_first_and_adds_nothing_twice(
    wheels: dict[str, Path], installed: Environment
) -> None:
    installed.install(wheels["checkout"])
    ours = str((installed.site / "nnunet_lgms" / "trainers").resolve())
    show = "import os; print(os.environ['nnUNet_extTrainer'])"
    child = (
        f"import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', {show!r}], text=True), end='')"
    )
    mine = os.pathsep.join(["/mine", "/other"])
    for code in (show, child):
        assert installed.run(code) == f"{ours}\n"
        assert installed.run(code, nnUNet_extTrainer="") == f"{ours}\n"
        assert installed.run(code, nnUNet_extTrainer=mine) == f"{mine}{os.pathsep}{ours}\n"
        chosen = os.pathsep.join([ours, "/mine"])
        assert installed.run(code, nnUNet_extTrainer=chosen) == f"{chosen}\n"


@pytest.mark.slow
def test_pth_imports_nothing_and_takes_no_measurable_time(wheels: dict[str, Path], installed: Environment) -> None:
    modules = "import sys; print(sorted(sys.modules))"
    before = installed.run(modules)
    installed.install(wheels["checkout"])
    assert installed.run(modules) == before

    line = compile((installed.site / PTH).read_text(), PTH, "exec")
    variable = os.environ.pop("nnUNet_extTrainer", None)
    try:
        seconds = min(timeit.repeat(lambda: exec(line, {"sitedir": str(installed.site)}), number=100, repeat=5)) / 100
    finally:
        os.environ.pop("nnUNet_extTrainer", None)
        if variable is not None:
            os.environ["nnUNet_extTrainer"] = variable
    assert seconds < 1e-3  # starting Python takes about 20 ms


@pytest.mark.slow
def test_requirements_are_lower_bounds_and_agree(wheels: dict[str, Path]) -> None:
    from nnunet_lgms.requirements import MINIMUM_NNUNETV2

    archive = zipfile.ZipFile(wheels["checkout"])
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    requirements = re.findall(r"^Requires-Dist: (.+)$", archive.read(metadata).decode(), re.M)
    assert f"nnunetv2>={MINIMUM_NNUNETV2}" in requirements
    assert not [line for line in requirements if re.search(r"[<~]|==\d|!=", line.split(";")[0])]


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "nnunet_lgms").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_importing_the_package_loads_no_torch(environment: dict[str, str]) -> None:
    code = "import sys, nnunet_lgms; print([m for m in ('torch', 'numpy', 'nnunetv2') if m in sys.modules])"
    assert run(sys.executable, "-c", code, env={**environment, "PYTHONPATH": str(ROOT)}) == "[]\n"


def test_missing_and_old_nnunet_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    from nnunet_lgms import requirements

    monkeypatch.setattr(requirements, "version", lambda name: "2.6.2")
    with pytest.raises(requirements.RequirementError, match=r"nnunetv2 2\.8 or newer, found 2\.6\.2: pip install"):
        requirements.require_nnunetv2()

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(requirements, "version", missing)
    with pytest.raises(requirements.RequirementError, match="which is not installed: pip install"):
        requirements.require_nnunetv2()
    monkeypatch.setattr(requirements, "version", lambda name: "2.10.0")
    assert requirements.require_nnunetv2() == "2.10.0"
