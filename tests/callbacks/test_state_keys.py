"""The keys by which checkpoints hold callbacks' states, and profilers name files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.profilers import AdvancedProfiler
from torch import nn
from torch.utils.data import DataLoader

from lightning_znorm import (
    GradientCentralizationCallback,
    GradientMonitor,
    GradientTransform,
    LastCheckpoint,
    SINGCallback,
    ZNormCallback,
)
from lightning_znorm.gradients import AffineMethod
from tests.callbacks.training import Training, batches

NAMES = [f"net.{number}.{kind}" for number in range(40) for kind in ("weight", "bias")]

LONG: dict[str, Callable[[list[str]], Any]] = {
    "znorm": lambda names: ZNormCallback(include=names),
    "excluded": lambda names: ZNormCallback(exclude=names),
    "centralization": lambda names: GradientCentralizationCallback(include=names),
    "sing": lambda names: SINGCallback(include=names),
    "transform": lambda names: GradientTransform(torch.sign, names),
    "monitor": lambda names: GradientMonitor(prefix="/".join(names)),
}


def deep() -> Training:
    torch.manual_seed(0)
    return Training(nn.Sequential(*(nn.Linear(6, 6) for _ in range(40))))


@pytest.mark.parametrize("kind", LONG)
def test_long_options_give_short_keys_that_differ(kind: str) -> None:
    lists = [NAMES, [*NAMES[:-1], "net.39.bia?"], ["é" * 200, *NAMES], ["\udcff" * 200, *NAMES]]
    keys = [LONG[kind](names).state_key for names in lists]
    assert len(set(keys)) == len(lists)
    for names, key in zip(lists, keys, strict=True):
        assert len(key.encode("utf-8", "backslashreplace")) <= 160
        assert key == LONG[kind](names).state_key
        assert key.startswith(type(LONG[kind](names)).__qualname__)


def test_long_folder_gives_a_short_key_that_differs() -> None:
    keys = {LastCheckpoint(Path("/".join(NAMES), end)).state_key for end in ("a", "b")}
    assert len(keys) == 2
    assert all(len(key) <= 160 for key in keys)


def test_keys_are_the_same_in_every_program_and_release() -> None:
    expected = {
        ZNormCallback(include=NAMES): (
            "ZNormCallback{'method': 'ZScore(eps=1e-10)', 'include': ['net.0.weight', 'net.0.bias', 'net.1.weight', "
            "'net.1.bias', 'net.2.weight', 'net.2.bia-d5fd1ee1adaab32e"
        ),
        ZNormCallback(): "ZNormCallback{'method': 'ZScore(eps=1e-10)', 'include': ['*'], 'exclude': [], 'min_ndim': 0}",
        GradientTransform(torch.sign, exclude="*.fc.*", min_ndim=2): (
            "GradientTransform{'method': '_VariableFunctionsClass.sign', 'include': ['*'], 'exclude': ['*.fc.*'], "
            "'min_ndim': 2}"
        ),
        GradientMonitor(): "GradientMonitor{'prefix': 'grad'}",
    }
    assert {callback: callback.state_key for callback in expected} == expected


def test_where_an_object_is_in_memory_is_no_part_of_it() -> None:
    class Scheduled(AffineMethod):
        def __init__(self, factor: Callable[[], float]) -> None:
            self.factor = factor

        def affine(self, stats):
            return None, torch.full_like(stats.std, self.factor())

    keep = [GradientTransform(Scheduled(lambda: 2.0)) for _ in range(2)]
    assert keep[0].state_key == keep[1].state_key
    assert "Scheduled" in keep[0].state_key


@pytest.mark.parametrize("kind", LONG)
def test_profiler_names_files_by_them(trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)  # where the profiler puts its temporary folders
    callback = ZNormCallback(exclude=NAMES[1:]) if kind == "excluded" else LONG[kind](NAMES)
    profiler = AdvancedProfiler(dirpath=tmp_path, filename="profile", dump_stats=True)
    made = trainer(callback, profiler=profiler, log_every_n_steps=1)
    made.fit(deep(), DataLoader(batches(1), batch_size=None))
    assert [path for path in tmp_path.glob("*.prof") if type(callback).__name__ in path.name]


def test_resumed_run_finds_the_state_of_a_long_key(fit, trainer, tmp_path: Path, warned) -> None:
    first = ZNormCallback(include=NAMES), GradientMonitor(prefix="/".join(NAMES))
    made = fit(deep(), batches(2), *first, log_every_n_steps=1)
    assert len(list((tmp_path / "gradients").glob("*.png"))) == 4
    made.save_checkpoint(tmp_path / "one.ckpt")
    monitor = GradientMonitor(prefix="/".join(NAMES))
    second = trainer(ZNormCallback(include=NAMES), monitor, max_epochs=2, log_every_n_steps=1)
    second.fit(deep(), DataLoader(batches(2), batch_size=None), ckpt_path=tmp_path / "one.ckpt")
    assert monitor._history.steps == [0, 1, 2, 3]
    assert warned() == []
