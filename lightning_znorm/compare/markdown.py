"""A report as Markdown."""

from collections.abc import Iterable

from lightning_znorm.compare.document import Block, Code, Figure, Grid, Heading, Points, Text


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
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Points(points):
            return "\n".join(f"- {point}" for point in points)
        case Code(text):
            return f"```\n{text}\n```"
        case Figure(name, caption, _):
            return f"![{caption.replace('`', '')}](figures/{name}.png)\n\n{caption}"
        case Grid(header, rows, numbers):
            rule = ["--:" if i in numbers else "---" for i in range(len(header))]
            return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (header, rule, *rows))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
