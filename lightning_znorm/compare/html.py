"""A report as one HTML file that needs nothing beside it."""

import base64
from collections.abc import Iterable
from html import escape

from lightning_znorm.compare.document import Block, Code, Figure, Grid, Heading, Points, Text, plain, spans, visible

_STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 66rem; margin: 2rem auto;
       padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #bbb; padding: 0.25rem 0.7rem; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #111; }
.number { text-align: right; }
td.number { white-space: nowrap; }
td:last-child:not(.number) { min-width: 18rem; }
pre { background: #f3f3f3; padding: 0.7rem; overflow-x: auto; font-size: 0.85em; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; }
figcaption { font-size: 0.9em; }
@media print { pre { white-space: pre-wrap; } h2, h3, figure, tr { break-inside: avoid; } }"""


def to_html(blocks: Iterable[Block], title: str) -> str:
    """Write a report.

    Args:
        blocks: Its content.
        title: Its title, for the browser's tab.
    """
    head = f'<meta charset="utf-8">\n<title>{escape(visible(title))}</title>\n<style>\n{_STYLE}\n</style>'
    body = "\n".join(_block(block) for block in blocks)
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n{viewport}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Points(points):
            return f"<ul>{''.join(f'<li>{_inline(point)}</li>' for point in points)}</ul>"
        case Code(text):
            return f"<pre>\n{escape(visible(text))}</pre>"  # whose first line break is not shown
        case Figure(_, caption, images):
            source = f"data:image/svg+xml;base64,{base64.b64encode(images['svg']).decode()}"
            alt = escape(plain(caption))
            return f'<figure><img src="{source}" alt="{alt}"><figcaption>{_inline(caption)}</figcaption></figure>'
        case Grid(header, rows, numbers):
            lines = [_row("th", header, numbers), *(_row("td", row, numbers) for row in rows)]
            return f"<table>\n<thead>{lines[0]}</thead>\n<tbody>\n" + "\n".join(lines[1:]) + "\n</tbody>\n</table>"


def _row(tag: str, cells: Iterable[str], numbers: frozenset[int]) -> str:
    classes = ((cell, ' class="number"' if i in numbers else "") for i, cell in enumerate(cells))
    return f"<tr>{''.join(f'<{tag}{kind}>{_inline(cell)}</{tag}>' for cell, kind in classes)}</tr>"


def _inline(text: str) -> str:
    return "".join(f"<code>{escape(part)}</code>" if is_code else escape(part) for part, is_code in spans(text))
