"""A report's content, apart from how it is written down.

Texts are plain: whatever stands in them, such as a name that a user has chosen, is shown as what it is. `code` sets a
part of a text as code.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

_CODE, _END = "\ufdd0", "\ufdd1"  # no characters, by Unicode's word: for a program's own use
_SPAN = re.compile(f"{_CODE}([^{_CODE}{_END}]*){_END}")
_DIRECTIONS = (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))  # turn the letters that follow
_SURROGATES = range(0xD800, 0xE000)  # no file can hold them
_INVISIBLE = {
    **{number: chr(0x2400 + number) for number in range(32) if chr(number) not in "\t\n"},  # pictures of them
    127: "\u2421",
    **{number: f"\\x{number:02x}" for number in range(128, 160)},
    **{number: f"\\u{number:04x}" for number in (*_DIRECTIONS, *_SURROGATES, ord(_CODE), ord(_END))},
}


@dataclass(frozen=True)
class Heading:
    """A heading, of level 1 to 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list."""

    points: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Commands or the end of a log."""

    text: str


@dataclass(frozen=True)
class Grid:
    """A table; columns of numbers stand to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """An image, with what it shows; its file beside the report is named ``NAME.png`` and ``NAME.svg``."""

    name: str
    caption: str
    images: dict[str, bytes] = field(repr=False)


Block: TypeAlias = Heading | Text | Points | Code | Grid | Figure


def code(text: str) -> str:
    """Set a part of a heading, paragraph, point, cell or caption as code."""
    return f"{_CODE}{visible(text)}{_END}"


def visible(text: str) -> str:
    r"""Show what cannot be seen, and cannot be written to every file: control characters and surrogates.

    Line breaks and tabs stay.

    Example:
        >>> visible("\x1b[31mred\r\n\udcff")
        '␛[31mred\n\\udcff'
    """
    return re.sub("\r\n?", "\n", text).translate(_INVISIBLE)


def spans(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a text, on one line, and whether each is code."""
    joined = text.replace(f"{_END}{_CODE}", "")  # two spans of code side by side are one
    for i, part in enumerate(_SPAN.split(joined)):
        if part:
            yield visible(part).replace("\n", " "), bool(i % 2)


def plain(text: str) -> str:
    """Return a text on one line without its marks."""
    return "".join(part for part, _ in spans(text))
