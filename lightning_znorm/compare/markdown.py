"""A report as Markdown."""

import re
from collections.abc import Iterable

from lightning_znorm.compare.document import Block, Code, Figure, Grid, Heading, Points, Text, plain, spans, visible

# What is markup anywhere, in the text of an image, and where a line begins. An underscore within a word (`val_loss`)
# and brackets that no address follows (`callbacks[1]`) are none, and stay readable.
_MARKUP = re.compile(r"[\\`*<&#|~$]|\](?=[(\[:])|_(?![^\W_])|(?<![^\W_])_")
_IN_BRACKETS = re.compile(rf"[\[\]]|{_MARKUP.pattern}")
_BEGINS = re.compile(r"\d+(?=[.)]([ \t]|$))|(?=[>\[]|[-+]([ \t-]|$))")


def to_markdown(blocks: Iterable[Block]) -> str:
    r"""Write a report; figures are files in a folder ``figures`` beside it.

    Example:
        >>> to_markdown([Heading("Speed"), Text("Fast.")])
        '## Speed\n\nFast.\n'
    """
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_line(text)}"
        case Text(text):
            return _line(text)
        case Points(points):
            return "\n".join(f"- {_line(point)}" for point in points)
        case Code(text):
            fence = "`" * max(3, 1 + _longest_run(text))
            return f"{fence}\n{visible(text)}\n{fence}"
        case Figure(name, caption, _):
            return f"![{_escaped(plain(caption), _IN_BRACKETS)}](figures/{name}.png)\n\n{_line(caption)}"
        case Grid(header, rows, numbers):
            rule = ["--:" if i in numbers else "---" for i in range(len(header))]
            lines = [map(_cell, header), rule, *(map(_cell, row) for row in rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(text: str) -> str:
    """Write a line that is no other block than the one it stands in."""
    line = _inline(text).strip(" \t")
    begin = _BEGINS.match(line)
    return f"{begin[0]}\\{line[begin.end() :]}" if begin else line


def _cell(text: str) -> str:
    # Whichever way a table's line is read, a bar behind a backslash is no border, and loses the backslash.
    return "".join(_code(part).replace("|", "\\|") if is_code else _escaped(part) for part, is_code in spans(text))


def _inline(text: str) -> str:
    return "".join(_code(part) if is_code else _escaped(part) for part, is_code in spans(text))


def _escaped(text: str, markup: re.Pattern[str] = _MARKUP) -> str:
    return markup.sub(r"\\\g<0>", text)


def _code(text: str) -> str:
    fence = "`" * (1 + _longest_run(text))
    # A blank at both ends is taken away; a backtick at an end would lengthen the fence.
    pad = " " if "`" in (text[0], text[-1]) or text[0] == text[-1] == " " else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
