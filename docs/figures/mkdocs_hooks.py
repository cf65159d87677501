"""What the built pages have that the Markdown files do not.

The Markdown files are read in the repository as well, where they link to files outside of docs/. In the built pages a
picture from there is copied, any other such link becomes its text, and the page of the commands gets their options.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

from nnunet_lgms.cli import COMMANDS, build_parser

DOCS = Path(__file__).resolve().parents[1]
RESULTS = DOCS.parent / "benchmarks" / "results"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s]+)\)")


def on_files(files, config):
    for picture in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"images/results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    folder = (DOCS / page.file.src_uri).parent

    def text_or_link(match: re.Match) -> str:
        target = (folder / match[2].split("#")[0]).resolve()
        return match[0] if target.is_relative_to(DOCS) else match[1]

    markdown = LINK.sub(text_or_link, markdown).replace("../../benchmarks/results/", "../images/results/")
    return markdown.replace("<!-- help -->", _help()) if page.file.src_uri == "reference/commands.md" else markdown


def _help() -> str:
    """The options of every command, as ``--help`` prints them."""
    os.environ["COLUMNS"] = "100"
    sections = []
    for name in COMMANDS:
        subparsers = build_parser(name)._subparsers._group_actions[0]
        sections.append(f"## {name}\n\n```text\n{subparsers.choices[name].format_help()}```\n")
    return "\n".join(sections)
