"""How numbers and texts are shown: in a terminal, in HTML and in Markdown.

Texts are shown as what they are, whatever characters a user's names and logs have: none of them is markup.
"""

import math
import re
import sys
from collections.abc import Iterable
from datetime import timedelta
from html import escape
from pathlib import Path
from statistics import median
from typing import TypeAlias

_HUGE = 1e12
_LONGEST = timedelta.max.total_seconds() - 1
_DIRECTION_MARKS = (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SURROGATES = range(0xD800, 0xE000)  # no file can hold them
_INVISIBLE = {
    **{number: chr(0x2400 + number) for number in range(32) if chr(number) not in "\t\n"},  # pictures of them
    127: "\u2421",
    **{number: f"\\x{number:02x}" for number in range(128, 160)},
    **{number: f"\\u{number:04x}" for number in (*_DIRECTION_MARKS, *_SURROGATES)},
}

# Markup anywhere in Markdown, in the text of an image, and at the beginning of a line. An underscore within a word
# (`val_loss`) and brackets without an address (`callbacks[1]`) are not markup, and stay readable.
_MARKUP = re.compile(r"[\\`*<&#|~$]|\](?=[(\[:])|_(?![^\W_])|(?<![^\W_])_")
_MARKUP_IN_SENTENCE = re.compile(rf"\]$|{_MARKUP.pattern}")  # what follows may be a colon or a parenthesis
_MARKUP_IN_BRACKETS = re.compile(rf"[\[\]]|{_MARKUP.pattern}")
_MARKUP_AT_BEGIN = re.compile(r"\d+(?=[.)]([ \t]|$))|(?=[>\[]|[-+]([ \t-]|$))")


class Code(str):
    """A text that the report sets as code."""


Inline: TypeAlias = str | tuple[str, ...]
"""A text on one line, or its parts, some of which may be `Code`."""


def joined(separator: str, texts: Iterable[Inline]) -> Inline:
    """Join texts, as `str.join` does, and keep the parts that are code."""
    parts: list[str] = []
    for text in texts:
        parts += [*([separator] if parts else []), *_parts(text)]
    return tuple(parts)


def plain(text: Inline) -> str:
    """Return a text on one line, without code."""
    return "".join(_on_one_line(part) for part in _parts(text))


def html(text: Inline) -> str:
    """Write a text as HTML.

    Example:
        >>> html(("a < b in ", Code("x & y")))
        'a &lt; b in <code>x &amp; y</code>'
    """
    parts = ((escape(_on_one_line(part)), isinstance(part, Code)) for part in _parts(text))
    return "".join(f"<code>{part}</code>" if is_code and part else part for part, is_code in parts)


def html_preformatted(text: str) -> str:
    """Write a text of several lines as HTML, for a ``pre`` element."""
    return escape(visible(text))


def markdown(text: Inline, in_cell: bool = False) -> str:
    r"""Write a text as Markdown.

    Args:
        text: The text.
        in_cell: Whether it is a whole cell of a table, where a bar needs a backslash even in code; else it is a part of
            a sentence.

    Example:
        >>> markdown(("2 * 3 in ", Code("val_loss")))
        '2 \\* 3 in `val_loss`'
    """
    markup = _MARKUP if in_cell else _MARKUP_IN_SENTENCE
    written = []
    for part in _parts(text):
        line = _on_one_line(part)
        if not isinstance(part, Code):
            written.append(markup.sub(r"\\\g<0>", line))
        elif line:
            fence = "`" * (1 + _longest_fence(line))
            # Markdown removes a blank at both ends. A backtick at an end would lengthen the fence.
            pad = " " if "`" in (line[0], line[-1]) or line[0] == line[-1] == " " else ""
            span = f"{fence}{pad}{line}{pad}{fence}"
            written.append(span.replace("|", "\\|") if in_cell else span)
    return "".join(written)


def markdown_in_brackets(text: Inline) -> str:
    """Write a text as Markdown, for the brackets of an image."""
    return _MARKUP_IN_BRACKETS.sub(r"\\\g<0>", plain(text))


def markdown_line(line: str) -> str:
    """Escape the beginning of a line of Markdown, so that it is not a list, a quote or the like."""
    line = line.strip(" \t")
    begin = _MARKUP_AT_BEGIN.match(line)
    return f"{begin[0]}\\{line[begin.end() :]}" if begin else line


def markdown_preformatted(text: str) -> str:
    """Write a text of several lines as a code block of Markdown."""
    fence = "`" * max(3, 1 + _longest_fence(text))
    return f"{fence}\n{visible(text)}\n{fence}"


def relative_path(path: str | Path) -> str:
    """Return a path relative to the working directory, if it is in it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def visible(text: str) -> str:
    r"""Replace characters that a reader cannot see or a file cannot hold: control characters and surrogates.

    Line breaks and tabs stay.

    Example:
        >>> visible("\x1b[31mred\r\n\udcff")
        '␛[31mred\n\\udcff'
    """
    return re.sub("\r\n?", "\n", text).translate(_INVISIBLE)


def decimals(differences: Iterable[float | None], values: Iterable[float]) -> int:
    """Return how many decimals show the median difference to two digits, and values to no more than six digits.

    Example:
        >>> decimals([0.0123, None, 0.05], [0.9])
        3
    """
    small, large = _median_size(differences), _median_size(values)
    wanted = 4 if small is None else 1 - math.floor(math.log10(small))
    most = 6 if large is None else 5 - math.floor(math.log10(large))
    return max(2, min(wanted, most))


def fixed(value: float, digits: int) -> str:
    """Format a value with a number of decimals; a huge one, as a run that diverges logs it, by its power of ten.

    Example:
        >>> fixed(0.25, 3), fixed(1e30, 3)
        ('0.250', '1e+30')
    """
    return f"{value:.{digits}f}" if abs(value) < _HUGE else f"{value:.4g}"


def signed(value: float, digits: int) -> str:
    """Format a difference with its sign.

    Example:
        >>> signed(-0.012, 2)
        '-0.01'
    """
    sign = "+" if value >= 0 and math.isfinite(value) else ""
    return sign + fixed(value, digits)


def interval_text(interval: tuple[float, float], digits: int) -> str:
    """Format an interval.

    Example:
        >>> interval_text((-0.5, 1.25), 2)
        '-0.50 to +1.25'
    """
    return " to ".join(signed(end, digits) for end in interval)


def p_text(p: float) -> str:
    """Format a p-value, with more digits where three would hide on which side of 0.05 it is.

    Example:
        >>> p_text(0.0123), p_text(0.04996), p_text(1e-9)
        ('p = 0.012', 'p = 0.04996', 'p < 0.001')
    """
    if p < 1e-3:
        return "p < 0.001"
    return f"p = {p:.{5 if abs(p - 0.05) < 1e-3 else 3}f}"


def clock(seconds: float) -> str:
    """Format a time span.

    Example:
        >>> clock(90)
        '0:01:30'
    """
    return str(timedelta(seconds=round(min(seconds, _LONGEST))))


def _median_size(numbers: Iterable[float | None]) -> float | None:
    """Return the median of the absolute values, without zeros and values that are not finite."""
    sizes = [abs(number) for number in numbers if number is not None and math.isfinite(number) and number]
    return min(median(sizes), sys.float_info.max) if sizes else None


def _parts(text: Inline) -> tuple[str, ...]:
    return text if isinstance(text, tuple) else (text,)


def _on_one_line(text: str) -> str:
    return visible(text).replace("\n", " ")


def _longest_fence(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
