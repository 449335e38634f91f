"""Code blocks and links of Markdown pages, and how a command of a page is run."""

import re
import shlex
from pathlib import Path

import pytest

from lightning_znorm.cli import main
from lightning_znorm.compare.processes import Processes
from tests.compare.captured import capture_here
from tests.processes import run_forked

REPOSITORY = Path(__file__).parents[1]
OURS = re.compile(r"^(python -m lightning_znorm|lightning-znorm) ")


def code_blocks(page: Path, language: str | None = None) -> list[tuple[str, str]]:
    """Return the language and the code of each fenced block; directives of the site, ``{...}``, are none."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [(kind, code) for kind, code in found if language in (None, kind)]


def commands(page: Path) -> list[str]:
    """Return the commands of the page's bash blocks, each on one line."""
    blocks = [code.replace("\\\n", "") for _, code in code_blocks(page, "bash")]
    return [command.strip() for code in blocks for command in code.replace("&&", "\n").strip().split("\n")]


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of this package in this process: ``compare`` without training, the others with one batch."""
    args = shlex.split(OURS.sub("", command))
    if args[0] == "compare":
        args.append("--dry-run")
        monkeypatch.setattr(Processes, "capture", capture_here)
        monkeypatch.setattr(Processes, "run", lambda self, args, log, *_, **__: run_forked(args, log))
    else:
        args += ["--trainer.fast_dev_run", "true"]
    main([*args, "--trainer.accelerator", "cpu"])


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and pictures within the repository, as they are written."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "", text))
    return [link for link in found if not re.match(r"\w+:", link)]


def broken_links(page: Path) -> list[str]:
    """Return the links of a page that lead to no file, or to no heading of it."""
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    return broken


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
