"""Pages of the site that are files outside docs/, and links to such files.

A page that is nothing but an include of a file outside docs/ (docs/changelog.md) is that file's page: links in the file
are relative to the file, as they are on the repository's pages, and links to the file lead to the page. Markdown that
pages link to must have such a page. Sphinx copies every other file to the site, where a link downloads it.
"""

import os
import re
from pathlib import Path
from typing import Any

from markdown_links import Link, rewritten
from sphinx.util import logging

logger = logging.getLogger(__name__)
INCLUDE = re.compile(r"```\{include\} (\S+)\n```\s*")


def find_shown_files(app: Any) -> None:
    """Keep the files outside docs/ that a page includes, and those pages."""
    app.shown_files = {
        Path(os.path.normpath(page.parent / match[1])): page
        for page in Path(app.srcdir).rglob("*.md")
        if (match := INCLUDE.fullmatch(page.read_text(encoding="utf-8")))
    }


def read(app: Any, docname: str, source: list[str]) -> None:
    """Replace an include by the file, and let links lead to pages of the site, before a page is parsed."""
    page = Path(app.env.doc2path(docname))
    origin = page
    if match := INCLUDE.fullmatch(source[0]):
        origin = Path(os.path.normpath(page.parent / match[1]))
        app.env.note_dependency(str(origin), docname=docname)
        source[0] = origin.read_text(encoding="utf-8")

    def address(link: Link) -> str:
        target = app.shown_files.get(link.target, link.target)
        if not target.exists():
            return link.written  # a mistake, of which the parser warns
        is_outside = not target.is_relative_to(app.srcdir)
        if target.is_dir() or (is_outside and target.suffix == ".md"):
            logger.warning(
                "a link leads to %s, which has no page: name it, or include it in one", link.written, location=docname
            )
        return os.path.relpath(target, page.parent) + link.fragment

    source[0] = rewritten(source[0], origin, address)


def setup(app: Any) -> dict[str, bool]:
    """Register what happens to links."""
    app.connect("builder-inited", find_shown_files)
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
