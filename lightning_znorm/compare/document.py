"""A report's content, apart from how it is written down."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


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
