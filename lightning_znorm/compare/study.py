"""What is to be run: methods x seeds, a folder for each run, and what remains of a run."""

import math
import re
import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from lightning_znorm.compare.looks import FirstLook
from lightning_znorm.errors import ZNormValueError


class StudyError(ZNormValueError):
    """A study cannot be run as it was asked for. The message names what is wrong and the way out."""


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Args:
        method: Name of the method.
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

    Raises:
        StudyError: If two methods have the same name, a seed is named twice, an option belongs to the study, or a name
            is not text.
    """

    configs: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path
    metric: str | None = None
    mode: str | None = None
    args: tuple[str, ...] = field(default=())
    timeout: float | None = None

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

    @cached_property
    def files(self) -> dict[str, str]:
        """The file of each method, by its name."""
        return {PurePath(file).stem: file for file in self.methods}

    @cached_property
    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that the runs that end first can be compared first."""
        return [
            Run(method, seed, self.output / "runs" / f"{method}-{seed}", self.timeout)
            for seed in self.seeds
            for method in self.files
        ]

    def fit_args(self, method: str) -> list[str]:
        """Return the arguments of ``fit`` with which a user would train a method by hand, without the seed."""
        files = [*self.configs, self.files[method]]
        return ["fit", *(arg for file in files for arg in ("--config", file)), *self.args]


@dataclass(frozen=True)
class Plan:
    """A study that was validated and is ready to run.

    Args:
        study: The study.
        settings: Resolved settings of each method.
        monitor: Metric that chooses the best checkpoint, and its mode; ``None`` if the last checkpoint is tested.
        metric: Metric by which methods are compared.
        mode: Whether ``"max"`` or ``"min"`` of it is better.
        logged: Names of all metrics that the experiment logs.
        notes: A sentence about each file of the study that was damaged and set aside.
        first_look: What was first looked at, if the results were looked at before.
    """

    study: Study
    settings: dict[str, dict[str, Any]]
    monitor: tuple[str, str] | None
    metric: str
    mode: str
    logged: list[str]
    notes: tuple[str, ...] = ()
    first_look: FirstLook | None = None

    @property
    def exploratory(self) -> str:
        """Why a report is exploratory, as the end of a sentence; empty if it is not."""
        if self.first_look is None:
            return ""
        return self.first_look.why_exploratory(self.metric, self.study.seeds, list(self.study.files))

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


_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

_REFUSED_OPTIONS = {
    "--seed_everything": "name --seeds instead",
    "--ckpt_path": "runs begin with fresh weights, and resume from their own last checkpoint",
    "--print_config": "the resolved settings of each run are in its run.yaml",
    "--trainer.fast_dev_run": "it keeps no logs (--dry-run tries the study out)",
    "--help": "`compare --help` and `fit --help` list the options",
}
