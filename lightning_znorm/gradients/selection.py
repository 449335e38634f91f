"""Which parameters a method applies to, by name and number of dimensions."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from lightning_znorm.errors import ZNormValueError
from lightning_znorm.gradients.arguments import checked_count, checked_patterns
from lightning_znorm.gradients.places import Place


class ParameterFilter:
    """Chooses parameters by shell-style patterns on their names, and by their number of dimensions.

    Names are those of ``named_parameters()`` without what ``torch.compile`` and FSDP insert. ``*`` matches dots too.

    Args:
        include: Pattern or patterns of which a parameter must match one.
        exclude: Pattern or patterns of which it must match none.
        min_ndim: Least number of dimensions: 2 leaves out biases and normalization scales.

    Raises:
        TypeError: If a pattern is no string, or ``min_ndim`` no whole number.
        ValueError: If ``min_ndim`` is negative.
    """

    def __init__(
        self, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = (), min_ndim: int = 0
    ) -> None:
        self.include = checked_patterns("include", include)
        self.exclude = checked_patterns("exclude", exclude)
        self.min_ndim = checked_count("min_ndim", min_ndim)

    def matches(self, place: Place) -> bool:
        """Whether a parameter is chosen; a shared one is, if one of its names is included and none excluded."""
        large = place.ndim is None or place.ndim >= self.min_ndim
        return large and _any_match(place.names, self.include) and not _any_match(place.names, self.exclude)

    def includes(self, names: Iterable[str], pattern: str) -> bool:
        """Whether one of the names of a parameter matches an ``include`` pattern."""
        return _any_match(names, [pattern])

    @property
    def needs_names(self) -> bool:
        """Whether the choice depends on the names of parameters: the default patterns choose whatever they are."""
        return "*" not in self.include or bool(self.exclude)

    def check(self, places: Iterable[Place]) -> None:
        """Raises for a filter that does not fit a model.

        Raises:
            ValueError: If a pattern matches no parameter at all, or no parameter is chosen.
        """
        places = list(places)
        names = [name for place in places for name in place.names]
        for pattern in [*self.include, *self.exclude]:
            if not _any_match(names, [pattern]):
                nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
                raise ZNormValueError(
                    f"the pattern {pattern!r} matches none of the model's {len(names)} parameters; "
                    f"the nearest names are {', '.join(nearest)}"
                )
        if not any(self.matches(place) for place in places):
            raise ZNormValueError(
                f"include={self.include}, exclude={self.exclude} and min_ndim={self.min_ndim} together leave none of "
                f"the model's {len(names)} parameters"
            )


def _any_match(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
