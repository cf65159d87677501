"""The line that a message gives for what is missing can be typed: it names packages that an index has."""

import importlib.metadata

import pytest

from nnunet_lgms import requirements

LISTED = [
    "torch>=2.6",
    'monai>=1.4; extra == "evaluation"',
    'jinja2>=3; extra == "evaluation"',
    "snakemake>=9.27; python_version >= '3.11' and extra == 'study'",
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names that count as installed."""
    names: set[str] = set()

    def version(name: str) -> str:
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(requirements, "version", version)
    monkeypatch.setattr(requirements, "requires", lambda name: LISTED)
    return names


def test_what_is_missing_of_an_extra_is_named_with_its_bound(installed: set[str]):
    assert requirements.install_extra("evaluation") == "pip install 'monai>=1.4' 'jinja2>=3'"
    assert requirements.install_extra("study") == "pip install 'snakemake>=9.27'"
    installed.add("jinja2")
    assert requirements.install_extra("evaluation") == "pip install 'monai>=1.4'"


def test_all_of_it_where_what_is_there_cannot_be_imported(installed: set[str]):
    installed |= {"jinja2", "monai"}
    assert requirements.install_extra("evaluation") == "pip install 'monai>=1.4' 'jinja2>=3'"


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(requirements, "requires", requires)
    assert requirements.install_extra("study") == "pip install '.[study]' in the folder that nnunet_lgms comes from"
