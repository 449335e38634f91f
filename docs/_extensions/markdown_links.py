"""Links of Markdown to files of the repository: where they are in a text, and which file or folder each leads to.

The site (`repository_files.py`) and the release (`.ci/release`) write other addresses there, each its own. This module
needs nothing but Python.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

# Code comes first, because nothing in it is a link. What ends a code span is not in another paragraph.
LINK = re.compile(
    r"""
      ^[ ]{0,3}(?P<fence>`{3,}|~{3,}).*?(?:^[ ]{0,3}(?P=fence)[`~]*[ \t]*$|\Z)   # a block of code
    | (?P<tick>(?<!`)`+(?!`)) (?:(?!\n[ \t]*\n).)+? (?<!`)(?P=tick)(?!`)         # code in a line
    | \\.
    | (?P<before> (?P<image>!\[ (?:[^\[\]\\]|\\.)* \]\(<?) | \]\(<?              # ![text](target) and [text](target)
        | ^[ ]{0,3}\[(?!\^)[^\[\]\n]+\]:[ \t]*<?                            # [name]: target
        | (?P<picture><(?:img\b[^<>]*?\bsrc|source\b[^<>]*?\bsrcset)=["']) | <a\b[^<>]*?\bhref=["']
      ) (?P<target>[^\s()<>"']+)
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


class Link(NamedTuple):
    """A link to a file."""

    written: str
    """The link as it is in the text."""
    target: Path
    """The file or folder, if it exists; the path is absolute."""
    fragment: str
    """`#` and the name of a place in the file, or nothing."""
    is_image: bool
    """Whether the page draws it."""


def rewritten(text: str, file: Path, address: Callable[[Link], str]) -> str:
    """Return Markdown with other links. Those to other sites and to places in the same file stay.

    Args:
        text: The Markdown.
        file: The file that it is from: links are relative to its folder.
        address: What is written for a link.
    """

    def replaced(match: re.Match[str]) -> str:
        written = match["target"]
        if not written or written.startswith(("#", "//")) or urlsplit(written).scheme:
            return match[0]
        name, _, anchor = written.partition("#")
        target = Path(os.path.normpath(file.parent / name))
        link = Link(written, target, f"#{anchor}" if anchor else "", bool(match["image"] or match["picture"]))
        return match["before"] + address(link)

    return LINK.sub(replaced, text)
