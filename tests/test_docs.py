"""The documentation: its links lead somewhere, and every row of the matrix of features names a test that exists."""

import re
from pathlib import Path

import pytest

from nnunet_lgms.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def links(text: str) -> list[tuple[str, str]]:
    return re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_documentation_lead_somewhere(page: Path):
    for _, target in links(page.read_text("utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{target} does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{target}: no such heading"


def test_every_row_of_the_matrix_links_to_its_test():
    page = ROOT / "docs" / "reference" / "features.md"
    header, _, *rows = [line for line in page.read_text("utf-8").split("\n## ")[0].splitlines() if line.startswith("|")]
    assert header == "| feature | test | run on |" and len(rows) > 30
    for row in rows:
        _, test, run_on = (cell.strip() for cell in row.strip("|").split(" | "))
        shown_by = links(test)
        assert shown_by and run_on, row
        for text, target in shown_by:  # a test of that file, or the file itself
            file = (page.parent / target).resolve()
            if text.startswith("test_") and not text.endswith(".py"):
                assert re.search(rf"^def {re.escape(text)}\(", file.read_text("utf-8"), re.M), row
            else:
                relative = str(file.relative_to(ROOT))
                assert file.is_file() and relative.startswith(("tests/", "benchmarks/")) and target.endswith(text), row


def test_the_page_of_commands_names_each():
    table = "".join(f"| `{name}` | {line} |\n" for name, line in COMMANDS.items())
    assert table in (ROOT / "docs" / "reference" / "commands.md").read_text("utf-8"), table


def test_the_navigation_has_every_page():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))


def test_docs_tell_no_dates():
    """Machines and days belong to the diary, benchmarks/LOG.md."""
    for page in PAGES:
        assert not re.search(r"\b20\d\d-\d\d-\d\d\b", page.read_text("utf-8")), page
