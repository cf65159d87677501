"""The supported versions, each with the tests that touch what differs between them.

    pip install nox && nox                # every Python that is installed, with each of the versions
    nox -s "tests-3.12(newest)"           # one of them
    nox -s "tests-3.11(oldest)" -- tests  # the whole suite

What was run, and with what, is in docs/reference/requirements.md and benchmarks/LOG.md.
"""

import nox

# the lower bounds of setup.py, what is newest, and PyTorch between: each of these brought or took something of ours
VERSIONS = {
    "oldest": ["torch==2.6.*", "nnunetv2==2.8.0"],
    "torch-2.8": ["torch==2.8.*", "nnunetv2"],
    "torch-2.10": ["torch==2.10.*", "nnunetv2"],
    "newest": ["torch", "nnunetv2"],
}
# imports, signatures, trainers, plans, the network, its operators on a CPU, what surrounds those of a GPU, compilation,
# processes and their ends, and nnU-Net's own commands with two kinds of data
SELECTION = [
    "tests/test_signatures.py",
    "tests/test_trainer.py",
    "tests/test_config.py",
    "tests/test_network_errors.py",
    "tests/test_ops_cpu.py",
    "tests/test_launch.py",
    "tests/test_ops_backend.py",
    "tests/test_graphs.py",
    "tests/test_features.py::test_regions",
    "tests/test_features.py::test_rgb_image",
    "tests/test_features.py::test_compiled_training_leaves_an_ordinary_checkpoint",
    "tests/test_faults.py::test_a_training_does_not_wait_for_ever_for_a_killed_process",
    "tests/test_faults.py::test_killed_at_random_moments",
]

nox.options.error_on_missing_interpreters = False


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
@nox.parametrize("versions", list(VERSIONS), ids=list(VERSIONS))
def tests(session: nox.Session, versions: str) -> None:
    if versions.startswith("torch") and session.python != "3.11":
        session.skip("versions in between are run with one Python")
    session.install(".[test]", *VERSIONS[versions])
    # as the Makefile does, where a CPU build of torch stands beside the index's torchvision
    if session.run("python", "-c", "import torchvision", success_codes=[0, 1], silent=True, log=False):
        session.install("./tools/torchvision_without_ops")
    packages = ("torch", "nnunetv2", "numpy")
    session.run("python", "-c", f"from importlib.metadata import version as v; print([(p, v(p)) for p in {packages}])")
    session.run("pytest", "-q", "-m", "not gpu", *(session.posargs or SELECTION))
