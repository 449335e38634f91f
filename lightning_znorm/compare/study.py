"""What is to be run: methods x seeds, a folder for each run, and what remains of a run."""

import hashlib
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from lightning_znorm.compare.looks import FirstLook
from lightning_znorm.errors import ZNormValueError


class StudyError(ZNormValueError):
    """A study cannot be run as it was asked for. The message names what is wrong and the way out."""


Point: TypeAlias = tuple[tuple[str, str], ...]
"""A value for each setting that a study sweeps, as pairs of key and value."""


@dataclass(frozen=True)
class Arm:
    """What is run with every seed: a method, at one point of the sweep if there is one.

    Args:
        method: Name of the method.
        file: Its file.
        point: The values of the swept settings; empty without a sweep.
        name: Name of the arm, with which the names of its runs' folders begin, such as ``znorm-lr=0.1``; without a
            sweep, that of the method.
    """

    method: str
    file: str
    point: Point
    name: str

    @property
    def args(self) -> list[str]:
        """Options of ``fit`` that set the swept settings."""
        return [f"--{key}={value}" for key, value in self.point]  # a value may begin with a dash


@dataclass(frozen=True)
class Run:
    """One method with one seed, at one point of the sweep if there is one.

    Args:
        method: Name of the method; in a sweep, that of the arm.
        seed: Seed of weights, data order and everything else.
        folder: Folder of all files of the run.
        timeout: Seconds that its ``fit`` may take, and its ``test``; ``None`` for any time.
    """

    method: str
    seed: int
    folder: Path
    timeout: float | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Method and seed, such as ``znorm-0``."""
        return f"{self.method}-{self.seed}"

    @property
    def config(self) -> Path:
        """File with all settings of the run."""
        return self.folder / "run.yaml"

    @property
    def logs(self) -> Path:
        """Folder with a folder ``version_0``, ``version_1``, ... for each attempt."""
        return self.folder / "logs"

    @property
    def log(self) -> Path:
        """File with what the run's processes printed."""
        return self.folder / "log.txt"

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        """The checkpoint with the best validation metric, if the study monitors one."""
        return self.folder / "checkpoints" / "best.ckpt"

    def checkpoint_to_test(self, monitored: bool) -> Path:
        """Return the best checkpoint if a metric chooses it, else the last one."""
        return self.best if monitored else self.last

    @property
    def fit_file(self) -> Path:
        """File that exists once training has ended."""
        return self.folder / "fit.json"

    @property
    def test_file(self) -> Path:
        """File that exists once the test has ended."""
        return self.folder / "test.json"

    @property
    def progress_file(self) -> Path:
        """File that says how far training has come."""
        return self.folder / "progress.json"

    @property
    def is_done(self) -> bool:
        """Whether the run is trained and tested."""
        return self.fit_file.is_file() and self.test_file.is_file()


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        run: The run.
        error: Why it failed, with the end of its log; empty if it did not fail.
        seconds: How long it took.
        notes: A sentence about each damaged file that was set aside.
    """

    run: Run
    error: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """The same experiment under several methods and seeds.

    Args:
        configs: Files of the experiment, in order.
        methods: Method files; the others are compared with the first.
        seeds: Seeds, each for every method.
        output: Folder of the study.
        metric: Metric that decides; by default the test metric that belongs to the one that chooses checkpoints.
        mode: Whether more (``"max"``) or less (``"min"``) of it is better.
        args: Further options of ``fit``.
        timeout: Seconds that one ``fit`` or ``test`` may take; ``None`` for any time.
        sweep: Settings with the values to try, each with every method and seed; several make a grid.
        chosen: In a sweep of which only the chosen runs are looked at, the point of each method.

    Raises:
        StudyError: If two methods have the same name, a seed is named twice, an option belongs to the study, a name
            is not text, or a setting or value of the sweep is missing, named twice or set by another option, too.
    """

    configs: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path
    metric: str | None = None
    mode: str | None = None
    args: tuple[str, ...] = field(default=())
    timeout: float | None = None
    sweep: tuple[tuple[str, tuple[str, ...]], ...] = ()
    chosen: Mapping[str, Point] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not self.methods or not self.seeds:
            raise StudyError("A study needs at least one method file and one seed.")
        for name in (*self.configs, *self.methods, str(self.output)):
            _check_text(name, "Cc", "Cs")
        for arg in self.args:
            _check_text(arg, "Cs")
        names: dict[str, str] = {}
        for file in self.methods:
            name = PurePath(file).stem
            if name in names:
                raise StudyError(
                    f"Two methods are named {name}, {names[name]} and {file}. A method has the name of its file: "
                    "rename one of them."
                )
            names[name] = file
        for i, seed in enumerate(self.seeds):
            if not 0 <= seed < 2**32:
                raise StudyError(f"A seed is a number from 0 to 2^32 - 1, got {seed}.")
            if seed in self.seeds[:i]:
                raise StudyError(f"Seed {seed} is named twice: name it once.")
        if self.mode not in (None, "min", "max"):
            raise StudyError(f"mode is min or max, got {self.mode}.")
        for arg in self.args:
            option = arg.partition("=")[0]
            if option in _REFUSED_OPTIONS:
                raise StudyError(f"{option} cannot be an option of a study: {_REFUSED_OPTIONS[option]}.")
        self._check_sweep()

    def _check_sweep(self) -> None:
        options = {arg.partition("=")[0] for arg in self.args}
        for i, (key, values) in enumerate(self.sweep):
            _check_text(key, "Cc", "Cs")
            for value in values:
                _check_text(value, "Cc", "Cs")
            if not re.fullmatch(r"[^\W\d][\w.]*", key):
                raise StudyError(
                    f"--sweep {key}: name a setting first, as an option of `fit` without its dashes, and then the "
                    "values: --sweep model.init_args.optimizer.init_args.lr 0.001 0.01 0.1."
                )
            if not values:
                raise StudyError(f"--sweep {key}: name the values to try behind it.")
            if key in (other for other, _ in self.sweep[:i]):
                raise StudyError(f"--sweep {key} is given twice: name all its values behind one of them.")
            if f"--{key}" in options:
                raise StudyError(f"--{key} is both swept and set: leave out one of the two.")
            if f"--{key}" in _REFUSED_OPTIONS:
                raise StudyError(f"{key} cannot be swept: {_REFUSED_OPTIONS[f'--{key}']}.")
            if twice := [value for j, value in enumerate(values) if value in values[:j]]:
                raise StudyError(f"--sweep {key}: {twice[0]} is named twice: name it once.")
        methods = [PurePath(file).stem for file in self.methods]
        # Not every disk tells a from A.
        folders = [self._name_arm(method, point).casefold() for method in methods for point in self.points]
        if len({*folders}) < len(folders):
            raise StudyError("The folders of two methods would have the same name: rename a method file.")

    @property
    def swept(self) -> list[str]:
        """The swept settings."""
        return [key for key, _ in self.sweep]

    @cached_property
    def points(self) -> list[Point]:
        """All points of the sweep; without a sweep, a single empty one."""
        return [
            tuple(zip(self.swept, values, strict=True)) for values in itertools.product(*(v for _, v in self.sweep))
        ]

    @cached_property
    def arms(self) -> dict[str, Arm]:
        """What is run with every seed, by name. If points are chosen, each method at its own, by the method's name."""
        files = {PurePath(file).stem: file for file in self.methods}
        if self.chosen is not None:
            return {method: Arm(method, files[method], point, method) for method, point in self.chosen.items()}
        arms = [
            Arm(method, file, point, self._name_arm(method, point))
            for method, file in files.items()
            for point in self.points
        ]
        return {arm.name: arm for arm in arms}

    @cached_property
    def files(self) -> dict[str, str]:
        """The method file of each arm, by the arm's name; without a sweep, the file of each method."""
        return {name: arm.file for name, arm in self.arms.items()}

    @cached_property
    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that the runs that end first can be compared first."""
        folder = self.output / "runs"
        return [
            Run(name, seed, folder / f"{self._name_arm(arm.method, arm.point)}-{seed}", self.timeout)
            for seed in self.seeds
            for name, arm in self.arms.items()
        ]

    def fit_args(self, name: str) -> list[str]:
        """Return the arguments of ``fit`` with which a user would train an arm by hand, without the seed."""
        arm = self.arms[name]
        files = [*self.configs, arm.file]
        return ["fit", *(arg for file in files for arg in ("--config", file)), *self.args, *arm.args]

    def at(self, chosen: Mapping[str, Point]) -> "Study":
        """Return the part of a sweep in which each method runs at one point.

        Args:
            chosen: The point of each method.
        """
        return replace(self, chosen=dict(chosen))

    def label(self, point: Point) -> str:
        """Write a point with short keys, such as ``lr=0.1``; an empty one as an empty text."""
        return ", ".join(f"{short_key(key, self.swept)}={value}" for key, value in point)

    def _name_arm(self, method: str, point: Point) -> str:
        values = [f"{short_key(key, self.swept)}={value}" for key, value in point]
        return "-".join([method, *map(_file_name, values)])


@dataclass(frozen=True)
class Plan:
    """A study that was validated and is ready to run.

    Args:
        study: The study.
        settings: Resolved settings of each arm: of each method, and in a sweep, of each method at each point.
        monitor: Metric that chooses the best checkpoint, and its mode; ``None`` if the last checkpoint is tested.
        metric: Metric by which methods are compared.
        mode: Whether ``"max"`` or ``"min"`` of it is better.
        logged: Names of all metrics that the experiment logs.
        notes: A sentence about each file of the study that was damaged and set aside.
        first_look: What was first looked at, if the results were looked at before.
        unsettled: Why there is no verdict yet, as the end of a sentence; empty if there may be one.
    """

    study: Study
    settings: dict[str, dict[str, Any]]
    monitor: tuple[str, str] | None
    metric: str
    mode: str
    logged: list[str]
    notes: tuple[str, ...] = ()
    first_look: FirstLook | None = None
    unsettled: str = ""

    @property
    def exploratory(self) -> str:
        """Why a report is exploratory, as the end of a sentence; empty if it is not."""
        if self.first_look is None:
            return ""
        return self.first_look.why_exploratory(self.metric, self.study.seeds, list(self.study.files), self.study.sweep)

    @property
    def monitored(self) -> bool:
        """Whether each run has a best checkpoint, which is tested; else its last one is tested."""
        return self.monitor is not None


def parse_timeout(value: float | str | None) -> float | None:
    """Convert a time to seconds.

    Args:
        value: A number of seconds, or a number with a unit such as ``"2h"``; ``None`` for no limit.

    Raises:
        StudyError: If the value is not such a time.

    Example:
        >>> [parse_timeout(value) for value in (90, "90", "1.5m", "2h", "1d")]
        [90.0, 90.0, 90.0, 7200.0, 86400.0]
    """
    if value is None:
        return None
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([smhd]?)\s*", value, re.ASCII) if isinstance(value, str) else None
    if found:
        value = float(found[1]) * _UNITS[found[2]]
    if isinstance(value, str | bool) or not 0 < value < math.inf:
        raise StudyError(f"--timeout is a time such as 90 (seconds), 90s, 30m, 2h or 1d, and more than 0: {value}.")
    return float(value)


def short_key(key: str, keys: Collection[str]) -> str:
    """Return the shortest end of a setting's name that no other setting among several has.

    Example:
        >>> [short_key(key, ["model.lr", "model.head.lr", "data.size"]) for key in ("model.head.lr", "data.size")]
        ['head.lr', 'size']
    """
    parts = key.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
    others = [other for other in keys if other != key]
    return next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), key)


def parse_sweep(sweep: Mapping[str, Sequence[Any]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Write the values of a sweep as options of ``fit``.

    Raises:
        StudyError: If the values of a setting are not a list, or cannot be written.

    Example:
        >>> parse_sweep({"lr": [0.1, 1], "data.name": ["a", True, None]})
        (('lr', ('0.1', '1')), ('data.name', ('a', 'true', 'null')))
    """
    found = []
    for key, values in sweep.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise StudyError(f"sweep: the values of {key} are a list, such as [0.01, 0.1], got {values!r}.")
        try:
            found.append((key, tuple(value if isinstance(value, str) else json.dumps(value) for value in values)))
        except TypeError as error:
            raise StudyError(f"sweep: a value of {key} cannot be written in YAML ({error}).") from error
    return tuple(found)


def _file_name(text: str) -> str:
    """Return a text as a part of a file name; one that had to be changed ends with a hash of what it was."""
    name = re.sub(r"[^\w.+=-]+", "_", text)[:_LONGEST_VALUE]
    return name if name == text else f"{name}~{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _check_text(name: str, *refused: str) -> None:
    """Refuse a name that settings files and reports, which are text, cannot hold.

    Args:
        name: The name.
        refused: Unicode categories of characters that it must not have.
    """
    if any(unicodedata.category(character) in refused for character in name):
        raise StudyError(
            f"{name!a} holds bytes that are not UTF-8, or control characters. The settings and the report of a study "
            "are text: rename the file or folder."
        )


_LONGEST_VALUE = 40
"""Characters of a swept setting and its value in the name of a folder."""
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

_REFUSED_OPTIONS = {
    "--seed_everything": "name --seeds instead",
    "--ckpt_path": "runs begin with fresh weights, and resume from their own last checkpoint",
    "--print_config": "the resolved settings of each run are in its run.yaml",
    "--trainer.fast_dev_run": "it keeps no logs (--dry-run tries the study out)",
    "--help": "`compare --help` and `fit --help` list the options",
}
