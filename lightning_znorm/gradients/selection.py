"""Which parameters a method applies to, by name and number of dimensions."""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor
from torch.nn.parameter import is_lazy

# What torch.compile, FSDP and activation checkpointing put into the names of the modules that they wrap.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class ParameterFilter:
    """Chooses parameters by shell-style patterns on their names, and by their number of dimensions.

    Names are those of ``named_parameters()`` without what ``torch.compile`` and FSDP insert. ``*`` matches dots too.

    Args:
        include: Pattern or patterns of which a parameter must match one.
        exclude: Pattern or patterns of which it must match none.
        min_ndim: Least number of dimensions: 2 leaves out biases and normalization scales.

    Raises:
        ValueError: If ``min_ndim`` is negative.
    """

    def __init__(
        self, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = (), min_ndim: int = 0
    ) -> None:
        if min_ndim < 0:
            raise ValueError(f"min_ndim must not be negative, got {min_ndim}")
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.min_ndim = min_ndim

    def choose(self, named_parameters: Iterable[tuple[str, Tensor]]) -> dict[Tensor, str | None]:
        """Decides on each parameter.

        Args:
            named_parameters: Names and parameters, a shared one under each of its names, one of which may be included
                and none excluded.

        Returns:
            The clean name of each parameter that is chosen, and ``None`` for each that is not.
        """
        choice: dict[Tensor, str | None] = {}
        for parameter, names in _by_parameter(named_parameters).items():
            # Those of a lazy layer have no shape before its first batch.
            large = parameter.ndim >= self.min_ndim or is_lazy(parameter)
            chosen = large and _any_match(names, self.include)
            choice[parameter] = names[0] if chosen and not _any_match(names, self.exclude) else None
        return choice

    def check(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Raises for a filter that does not fit a model.

        Raises:
            ValueError: If a pattern matches no parameter at all, or no parameter is chosen.
        """
        named_parameters = list(named_parameters)
        names = [clean_name(name) for name, _ in named_parameters]
        for pattern in [*self.include, *self.exclude]:
            if not _any_match(names, [pattern]):
                nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
                raise ValueError(
                    f"the pattern {pattern!r} matches none of the model's {len(names)} parameters; "
                    f"the nearest names are {', '.join(nearest)}"
                )
        if not any(self.choose(named_parameters).values()):
            raise ValueError(
                f"include={self.include}, exclude={self.exclude} and min_ndim={self.min_ndim} together leave none of "
                f"the model's {len(names)} parameters"
            )


def _by_parameter(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[Tensor, list[str]]:
    names: defaultdict[Tensor, list[str]] = defaultdict(list)
    for name, parameter in named_parameters:
        names[parameter].append(clean_name(name))
    return names


def _any_match(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def clean_name(name: str) -> str:
    """A parameter's name as the model's author wrote it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
