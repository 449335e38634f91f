"""The first look at the results of a study: later looks at other seeds, metrics or methods are exploratory.

Who adds seeds until a test tells a difference errs too often: with a look after each of 3 to 10 seeds, in 17 % of
studies without any effect in place of 5 % (`tests/compare/test_power_simulation.py`). So the record of a study keeps
what was first looked at, and other looks give numbers without a verdict.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lightning_znorm.compare.files import DamagedError

Swept: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]
KEY = "first_look"
"""Key in `study.json`: ``None`` before the first look. Records of older versions do not have it."""
_REPORTS = ("report.md", "report.html", "results.csv")


@dataclass(frozen=True)
class FirstLook:
    """What was first looked at. Whatever is ``None`` or empty is not known, because an older version did not record it.

    Args:
        metric: The metric that decided.
        seeds: The seeds of the study; ``None`` also if the record was lost.
        methods: The methods, the first one first, and those that were added later.
        sweep: The swept settings with their values, among which the methods' were chosen.
    """

    metric: str | None
    seeds: tuple[int, ...] | None
    methods: tuple[str, ...] = ()
    sweep: Swept = ()

    def why_exploratory(self, metric: str, seeds: Sequence[int], methods: Sequence[str], sweep: Swept = ()) -> str:
        """Return why another look is exploratory, as the end of a sentence; empty if it is not.

        Args:
            metric: The metric that decides now.
            seeds: The seeds of the study now.
            methods: The methods now.
            sweep: The swept settings with their values now.

        Example:
            >>> FirstLook("test/accuracy", (0, 1)).why_exploratory("test/accuracy", [0, 1, 2], [])
            'seeds were added after a first look at seeds 0, 1'
        """
        if self.seeds is None:
            return "the record of the study was lost, so its first look is not known"
        if set(seeds) != set(self.seeds):
            earlier = f"a first look at seeds {', '.join(map(str, self.seeds))}"
            what = "added" if set(seeds) > set(self.seeds) else "changed"
            return f"seeds were {what} after {earlier}"
        if self.metric not in (None, metric):
            return f"the first look was at another metric, {self.metric}"
        if self.methods and methods[0] != self.methods[0]:
            return f"methods were compared with {self.methods[0]} at the first look"
        if dropped := [method for method in self.methods if method not in methods]:
            return f"methods were left out after the first look: {', '.join(dropped)}"
        tried = {key: set(values) for key, values in self.sweep}
        for key, values in sweep:
            if left_out := sorted(tried.get(key, set()) - set(values)):
                return f"values of {key} were left out after the first look: {', '.join(left_out)}"
            if added := sorted(set(values) - tried.get(key, set(values))):
                return f"values of {key} were added after the first look: {', '.join(added)}"
        return ""

    def as_json(self) -> dict[str, Any]:
        """Return what `study.json` holds of it."""
        seeds = None if self.seeds is None else list(self.seeds)
        content: dict[str, Any] = {"metric": self.metric, "seeds": seeds, "methods": list(self.methods)}
        if self.sweep:
            content["sweep"] = {key: list(values) for key, values in self.sweep}
        return content


def look_of(path: Path, record: dict[str, Any]) -> FirstLook | None:
    """Return the first look that a record holds, if it holds one.

    Args:
        path: File of the record.
        record: Its content.

    Raises:
        DamagedError: If it holds something else in its place.
    """
    content = record.get(KEY)
    if content is None:
        return None
    metric, seeds, methods, sweep = (content.get(key) for key in ("metric", "seeds", "methods", "sweep"))
    sweep = {} if sweep is None else sweep
    if not (
        isinstance(metric, str | None)
        and (seeds is None or (isinstance(seeds, list) and all(type(seed) is int for seed in seeds)))
        and (isinstance(methods, list) and all(isinstance(name, str) for name in methods))
        and (isinstance(sweep, dict) and all(isinstance(values, list) for values in sweep.values()))
    ):
        raise DamagedError(path, f"its {KEY} is not a metric, seeds and methods")
    swept = tuple((key, tuple(map(str, values))) for key, values in sweep.items())
    return FirstLook(metric, None if seeds is None else tuple(seeds), tuple(methods), swept)


def assumed_look(output: Path, is_lost: bool) -> FirstLook | None:
    """Return what was looked at in a study whose record does not say so.

    Without a report, there was no look. An older version looked at all runs that were there.

    Args:
        output: Folder of the study.
        is_lost: Whether the record was lost; otherwise it is of an older version.
    """
    if not any((output / name).exists() for name in _REPORTS):
        return None
    if is_lost:
        return FirstLook(None, None)
    done = [path.parent.name for path in output.glob("runs/*/test.json") if path.with_name("fit.json").is_file()]
    seeds = [name.rpartition("-")[2] for name in done]
    paired = sorted({int(seed) for seed in seeds if seeds.count(seed) > 1 and seed.isdecimal()})
    return FirstLook(None, tuple(paired)) if len(paired) > 1 else None
