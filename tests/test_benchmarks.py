"""Every benchmark runs, and prints a table whose figures agree with each other."""

import argparse
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torchmetrics.segmentation

from benchmarks import kernels, training_step
from lightning_znorm.errors import ZNormRuntimeError
from lightning_znorm.gradients.kernels import dispatch, triton_check
from lightning_znorm.models import resnet56
from tests.processes import run_python

ROOT = Path(__file__).parents[1]

# tests/test_readme.py also finds the benchmarks that the README names.
pytestmark = pytest.mark.full


def output_of(*arguments: str) -> str:
    process = run_python("-m", *arguments, timeout=120, cwd=ROOT)
    assert process.returncode == 0, process.stdout
    return process.stdout


def rows(output: str) -> list[list[str]]:
    lines = re.findall(r"^\| (.*) \|$", output, flags=re.MULTILINE)[2:]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


def test_data() -> None:
    output = output_of("benchmarks.data", "--images", "600", "--rounds", "1")
    table = rows(output)
    assert [name for name, _ in table] == [
        "lightning_znorm, uint8",
        "lightning_znorm, normalized",
        "torchvision, normalized, 0 workers",
        "torchvision, normalized, 2 workers",
    ]
    _, ours, *theirs = (int(figure) for _, figure in table)
    (ratio,) = re.findall(r"normalized: ([\d.]+) times torchvision's faster row", output)
    assert float(ratio) == pytest.approx(ours / max(theirs), rel=0.02, abs=0.06)


def test_kernels() -> None:
    table = rows(output_of("benchmarks.kernels", "--models", "ResNet-56", "--rounds", "3", "--threads", "1"))
    assert [row[1] for row in table[:6]] == [
        "clip_grad_norm_",
        "zscore_grads_",
        "zscore_grads_, adaptive",
        "centralize_grads_",
        "obvious loop",
        "timm adaptive_clip_grad",
    ]
    clip = float(table[0][2])
    for model, _, milliseconds, ratio in table:
        assert model == "ResNet-56"
        assert float(ratio) == pytest.approx(float(milliseconds) / clip, rel=0.05, abs=0.02)


def test_training_step() -> None:
    arguments = ("--device", "cpu", "--modes", "eager", "--batch-size", "2", "--steps", "2", "--rounds", "2")
    output = output_of("benchmarks.training_step", *arguments)
    table = rows(output)
    settings = [
        [precision, memory_format, "eager"]
        for precision in ("bf16-mixed", "32-true")
        for memory_format in ("contiguous", "channels_last")
    ]
    assert [row[:3] for row in table] == settings
    verdicts = re.findall(r"^target: at most 1 % of a step: (.*)$", output, flags=re.MULTILINE)
    for row, verdict in zip(table, verdicts, strict=True):
        without, with_znorm, added = (float(cell) for cell in row[3:6])
        assert added == pytest.approx(100 * (with_znorm / without - 1), abs=0.02)
        low, high = (float(cell) for cell in row[6].split(" to "))
        assert low <= high
        assert 0 < float(row[7]) < without
        missed = re.fullmatch(rf"{', '.join(row[:3])}, PyTorch's kernel: missed by (.*) points", verdict)
        assert (float(missed[1]) == pytest.approx(added - 1, abs=0.02)) if missed else "met" in verdict


def test_order_of_turns() -> None:
    turns: list[object] = []

    class Recorded:
        def train(self, steps: int, znorm: bool) -> None:
            turns.append(znorm)

        def normalize(self, times: int) -> None:
            turns.append("alone")

    times = training_step.measured(Recorded(), rounds=3, steps=2)
    # After one round that is not timed. The calls alone are as many as the turns of a kind, after two.
    assert turns == 4 * [False, True, True, False] + 8 * ["alone"]
    assert {kind: len(values) for kind, values in times.items()} == {"without": 6, "with": 6, "alone": 6}


def test_compilation_ahead_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    training_step.compile_side_by_side([("32-true", "contiguous"), ("no precision", "channels_last")], 2, "no device")
    lines = re.findall(r"^(.*): compiling ahead failed with exit status 2", capfd.readouterr().err, re.MULTILINE)
    assert lines == ["32-true, contiguous", "no precision, channels_last"]


def test_launches() -> None:
    table = rows(output_of("benchmarks.launches", "--models", "ResNet-56"))
    numels = [parameter.numel() for parameter in resnet56().parameters()]
    calls = [call for _, dtype, _, _, call, *_ in table if dtype == "float32"]
    assert calls[:2] == ["clip_grad_norm_", "ZNorm"]
    assert [(row[1], row[4]) for row in table] == [(dtype, call) for dtype in ("float32", "bfloat16") for call in calls]
    for model, dtype, tensors, large, call, *figures in table:
        assert [model, int(tensors), int(large)] == ["ResNet-56", len(numels), sum(numel > 2**14 for numel in numels)]
        launches, each_large, others, waits = map(int, figures[:4])
        assert 0 <= launches - others <= int(large) * each_large
        assert waits == 0
        mebibytes, of_largest = map(float, figures[4:])
        # In float32, whatever the type of the gradients.
        assert of_largest == pytest.approx(
            mebibytes * 2**20 / (4 * max(numels)), abs=0.005 * 2**18 / max(numels) + 0.005
        )
        if (dtype, call) == ("float32", "ZNorm"):
            assert each_large <= 2
            assert others <= 40


@pytest.mark.parametrize("module", ["kernels", "training_step", "machine"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_there_is_no_gpu(module: str) -> None:
    arguments = ["--device", "cuda"] if module != "machine" else []
    process = run_python("-m", f"benchmarks.{module}", *arguments, timeout=60, cwd=ROOT)
    assert process.returncode == 1
    assert "there is no cuda device" in process.stdout.lower()
    assert "Traceback" not in process.stdout


class TestGpuScript:
    """``benchmarks/gpu.sh``, as far as a machine without a GPU can tell."""

    PARTS = ("tests", "kernels", "step", "strategies")

    @staticmethod
    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "benchmarks/gpu.sh"), *arguments]
        env = {"PYTHON": sys.executable, **env}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **env})

    @staticmethod
    def python(tmp_path: Path, program: str) -> str:
        """Make a program that is called in place of Python."""
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{program}\n")
        path.chmod(0o755)
        return str(path)

    def commands(self, **env: str) -> dict[str, list[tuple[int, list[str]]]]:
        """Return the limits and the commands of each part."""
        process = self.run("--list", **env)
        assert process.returncode == 0, process.stderr
        parts: dict[str, list[tuple[int, list[str]]]] = {}
        for part, limit, *command in map(shlex.split, process.stdout.splitlines()):
            parts.setdefault(part, []).append((int(limit), command))
        return parts

    @pytest.mark.parametrize("arguments", [["gpu"], ["tests", "step"], ["--list", "gpu"], [""], ["--lists"]])
    def test_wrong_part(self, arguments: list[str]) -> None:
        process = self.run(*arguments)
        assert process.returncode == 2
        assert process.stdout == ""
        assert process.stderr.startswith("usage: ")
        assert self.run("--help").stdout == process.stderr

    @pytest.mark.parametrize("installed", [True, False], ids=["everything", "only what it needs"])
    def test_four_minutes(self, tmp_path: Path, installed: bool) -> None:
        parts = self.commands(PYTHON=self.python(tmp_path, f"exit {int(not installed)}"))
        assert tuple(parts) == self.PARTS
        for part, commands in parts.items():
            assert commands[0][1][1:] == ["-m", "benchmarks.machine"]
            assert len(commands) > 1
            assert sum(limit for limit, _ in commands) <= 235, part

    def test_one_part(self, tmp_path: Path) -> None:
        everything = self.python(tmp_path, "exit 0")
        lists = {part: self.run("--list", part, PYTHON=everything).stdout for part in (*self.PARTS, "all")}
        assert lists.pop("all") == "".join(lists.values())

    def test_tests_are_all_there(self, tmp_path: Path) -> None:
        parts = self.commands(PYTHON=self.python(tmp_path, "exit 0"))
        named = {word for part in parts.values() for _, command in part for word in command if word.endswith(".py")}
        marked = {
            path for path in (ROOT / "tests").rglob("*.py") if re.search(r"^\S*@?.*mark\.gpu$", path.read_text(), re.M)
        }
        assert {ROOT / word for word in named} == marked

    def test_commands(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Programs know their options, and pytest finds tests."""
        parse = argparse.ArgumentParser.parse_args

        def stop(parser: argparse.ArgumentParser) -> None:
            parse(parser)
            raise StopIteration

        commands = {tuple(command) for part in self.commands().values() for _, command in part}
        for command in commands:
            assert command[:2] == (sys.executable, "-m")
            if command[2] == "pytest":
                found = run_python(*command[1:], "--collect-only", timeout=60, cwd=ROOT)
                assert found.returncode == 0, found.stdout
                continue
            with monkeypatch.context() as patch:
                patch.setattr(argparse.ArgumentParser, "parse_args", stop)
                patch.setattr(sys, "argv", list(command[2:]))
                with pytest.raises(StopIteration):
                    runpy.run_path(str(ROOT / f"{command[2].replace('.', '/')}.py"), run_name="__main__")
        for module in {command[2] for command in commands} - {"pytest"}:
            assert "usage:" in output_of(module, "--help")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_without_a_gpu(self, tmp_path: Path) -> None:
        process = self.run(OUT=str(tmp_path / "out"))
        assert process.returncode == 1
        texts = [(tmp_path / f"out/{part}.txt").read_text() for part in self.PARTS]
        assert process.stdout == "".join(texts)
        for part, text in zip(self.PARTS, texts, strict=True):
            assert text.startswith(f"== {part}\n")
            assert f"torch {version('torch')}" in text
            assert "There is no CUDA device" in text
            assert f"Nothing of the part {part} was run." in text

    def test_without_python(self, tmp_path: Path) -> None:
        process = self.run("all", PYTHON=str(tmp_path / "none"), OUT=str(tmp_path))
        assert process.returncode == 1
        assert process.stdout.count("FAILED: exit status 127\n") == len(self.PARTS)
        assert process.stdout.count("Nothing of the part ") == len(self.PARTS)

    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
    def test_interrupted(self, tmp_path: Path, name: str) -> None:
        """Ctrl-C signals the script and not what it runs in a process group of its own."""
        program = """
            case "$*" in *machine) exit ;; *-c*) exit 1 ;; esac
            trap 'echo ended; exit 3' INT
            echo $$ >"$OUT/pid"
            while :; do sleep 0.1; done"""
        env = {**os.environ, "PYTHON": self.python(tmp_path, program), "OUT": str(tmp_path)}
        # The first word undoes what a test run in the background hands down.
        command = ["env", "--default-signal=INT", "bash", str(ROOT / "benchmarks/gpu.sh"), "kernels"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True) as process:
            try:
                deadline = time.monotonic() + 60
                while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
                    time.sleep(0.05)
                os.kill(process.pid, signal.Signals[name])
                output, _ = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == 130
        assert output.endswith("\nended\n")
        assert output.count("benchmarks.kernels") == 1
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)

    def test_too_long(self, tmp_path: Path) -> None:
        """What ignores the interruption is killed, with all that it has started."""
        script = tmp_path / "benchmarks/gpu.sh"
        script.parent.mkdir()
        text = (ROOT / "benchmarks/gpu.sh").read_text()
        text, number = re.subn(r"run \d+ (?=.*benchmarks\.kernels)", "run 1 ", text.replace("grace=5", "grace=1"))
        assert number == 2
        script.write_text(text)
        program = """case "$*" in *cuda*) trap '' INT; sleep 60 & sleep 60 ;; *-c*) exit 1 ;; esac"""
        env = {**os.environ, "PYTHON": self.python(tmp_path, program), "OUT": str(tmp_path)}
        start = time.monotonic()
        process = subprocess.run(
            ["bash", str(script), "kernels"], capture_output=True, text=True, timeout=60, check=False, env=env
        )
        assert time.monotonic() - start < 40
        assert process.returncode == 1
        assert process.stdout.count("FAILED: stopped after 1 s") == 2

    def test_a_failure_does_not_stop_the_others(self, tmp_path: Path) -> None:
        program = """case "$*" in *bfloat16) echo second ;; *cuda*) echo first; exit 3 ;; *-c*) exit 1 ;; esac"""
        python = self.python(tmp_path, program)
        process = self.run("kernels", PYTHON=python, OUT=str(tmp_path))
        assert process.returncode == 1
        assert process.stdout == (tmp_path / "kernels.txt").read_text()
        assert re.findall("^(?:first|second|FAILED.*|Left out.*)$", process.stdout, flags=re.MULTILINE) == [
            "Left out: the rows of pytorch_optimizer, which is not installed.",
            "first",
            "FAILED: exit status 3",
            "second",
        ]
        process = self.run("kernels", PYTHON=self.python(tmp_path, "exit 0"), OUT=str(tmp_path))
        assert process.returncode == 0, process.stdout


def test_lightning_step() -> None:
    arguments = ("--batch-size", "2", "--steps", "4", "--rounds", "1", "--threads", "1", "--profile")
    output = output_of("benchmarks.lightning_step", *arguments)
    table = [row for row in rows(output) if len(row) == 7]
    calls = {row[0]: float(row[1]) for row in rows(output) if len(row) == 3 and row[1][-1].isdigit()}
    assert calls["[Callback]ZNormCallback.on_before_optimizer_step"] > 0
    assert max(calls, key=lambda name: calls[name]) == "run_training_batch"
    assert [row[2] for row in table] == [
        "loop by hand",
        "Trainer without our parts",
        "Trainer with our task and data",
        "and with ZNormCallback",
    ]
    plain = table[1]
    for row in table:
        for milliseconds, ratio in ((3, 4), (5, 6)):
            expected = pytest.approx(float(row[milliseconds]) / float(plain[milliseconds]), rel=0.01)
            assert float(row[ratio].split()[0]) == expected


def test_fit() -> None:
    arguments = ("--batch-size", "2", "--steps", "4", "--rounds", "1", "--precisions", "32-true", "--modes", "eager")
    output = output_of("benchmarks.fit", *arguments)
    assert "bf16-mixed is left out" in output
    table = rows(output)
    assert [row[2:4] for row in table] == [
        [f"32-true, {memory_format}, eager", step]
        for memory_format in ("contiguous", "channels_last")
        for step in ("loop by hand", "fit", "fit with ZNormCallback")
    ]
    for number, (_, batch, _, _, milliseconds, ratio, _, images) in enumerate(table):
        by_hand = float(table[number - number % 3][4])
        assert float(ratio.split()[0]) == pytest.approx(float(milliseconds) / by_hand, rel=0.01)
        assert float(images) == pytest.approx(1e3 * int(batch) / float(milliseconds), rel=0.01)


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    check_gpu_table(output_of("benchmarks.kernels", "--device", "cuda", "--models", "ResNet-56", "--rounds", "3"))


def check_gpu_table(output: str, without_triton: str = "refused: ") -> dict[str, list[str]]:
    """Check figures of ResNet-56 alone, and return the rows by their functions.

    Args:
        output: What the benchmark has printed.
        without_triton: How the row of Triton's kernel may begin if it was not measured.
    """
    table = {row[2]: row[3:] for row in rows(output)}
    assert next(iter(table)) == "clip_grad_norm_"
    assert "zscore_grads_, in a graph" in table
    clipping = table["clip_grad_norm_"]
    for function, (milliseconds, ratio, share, memory) in table.items():
        if milliseconds.startswith(without_triton):
            assert function.startswith("zscore_grads_, Triton")
            assert [ratio, share, memory] == ["-"] * 3
            continue
        is_graph = function.endswith(", in a graph")
        reference = table["clip_grad_norm_, in a graph"] if is_graph else clipping
        time = float(milliseconds)
        assert float(ratio) == pytest.approx(time / float(reference[0]), rel=0.05, abs=0.02)
        moved = float(share.removesuffix(" %")) / float(clipping[2].removesuffix(" %"))
        assert moved == pytest.approx(float(clipping[0]) / time, rel=0.1)
        assert memory == "-" if is_graph else float(memory) >= 0
    verdicts = re.findall(r"^target: (.*?): (zscore_grads_.*?): (.*)$", output, flags=re.MULTILINE)
    assert [function for _, function, _ in verdicts] == [
        function
        for name in ("zscore_grads_", "zscore_grads_, Triton")
        for function in (name, name, f"{name}, in a graph", f"{name}, in a graph")
    ]
    for target, function, verdict in verdicts:
        if "bandwidth" in target or table.get(function, [without_triton])[0].startswith(without_triton):
            assert verdict == "not measured"
        else:
            assert ("missed by" if float(table[function][1]) > 1 else "met (") in verdict
    return table


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU do what a GPU would."""
    pytest.importorskip("timm")
    with_gradients = kernels.with_gradients
    monkeypatch.setattr(kernels, "with_gradients", lambda model, _, dtype: with_gradients(model, "cpu", dtype))
    monkeypatch.setattr(kernels, "copied_bytes_per_second", lambda: 1e10)
    monkeypatch.setattr(kernels, "extra_memory", lambda _: 2**20)
    monkeypatch.setattr(kernels, "in_a_graph", lambda function: SimpleNamespace(replay=function))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a CPU")


@pytest.mark.usefixtures("pretended_gpu")
class TestKernelsOnAPretendedGpu:
    NO_EFFECT = "LIGHTNING_ZNORM_KERNEL had no effect on some gradients"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_table(self, capsys: pytest.CaptureFixture[str], dtype: torch.dtype) -> None:
        kernels.on_cuda(["ResNet-56"], dtype, rounds=3, triton=True)
        table = check_gpu_table(capsys.readouterr().out, f"failed: RuntimeError: {self.NO_EFFECT}")
        assert table["zscore_grads_, Triton"][0].endswith(self.NO_EFFECT)

    def test_all_gradients_are_tritons(self, monkeypatch: pytest.MonkeyPatch) -> None:
        parameters = kernels.with_gradients("ResNet-56", "cpu", torch.float32)
        monkeypatch.setattr(dispatch, "is_on_cpu", lambda _: False)
        for number, message in ((0, ""), (1, self.NO_EFFECT), (len(parameters), self.NO_EFFECT)):
            monkeypatch.setattr(triton_check, "pointer_tables", lambda segments, number=number: ([], segments[:number]))
            error = kernels.error_of(lambda: kernels.check_triton_has_all(parameters))
            assert (error or "").endswith(message)
            assert (error is None) == (number == 0)
        assert "LIGHTNING_ZNORM_KERNEL" not in os.environ

    def test_triton_is_chosen_by_the_variable(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chosen = []

        def zscore_grads_(*_: object, **__: object) -> None:
            chosen.append(os.environ.get("LIGHTNING_ZNORM_KERNEL"))
            if chosen[-1] == "triton":
                raise ZNormRuntimeError("it differs | by 1")

        monkeypatch.setenv("LIGHTNING_ZNORM_KERNEL", "triton")  # for one row alone, whatever the user has set
        monkeypatch.setattr(kernels, "zscore_grads_", zscore_grads_)
        kernels.on_cuda(["ResNet-56"], torch.float32, rounds=1, triton=True)
        assert set(chosen) == {None, "triton"}
        table = {row[2]: row[3:] for row in rows(capsys.readouterr().out)}
        assert table["zscore_grads_, Triton"] == ["refused: it differs / by 1", "-", "-", "-"]
        assert "zscore_grads_, Triton, in a graph" not in table
        assert float(table["zscore_grads_"][0]) >= 0

    def test_device_that_failed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After an error of the device, nothing else can be measured: the others get a process of their own."""

        def fail(*_: object) -> None:
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(kernels, "with_triton", fail)
        monkeypatch.setattr(kernels, "finished", lambda call: call())
        monkeypatch.setattr(torch.cuda, "synchronize", fail)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        started = []
        monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
        options = ["--device", "cuda", "--models", "ResNet-56", "--rounds", "1"]
        for more in ([], ["--no-triton"]):
            monkeypatch.setattr(sys, "argv", ["", *options, *more])
            kernels.main()
        assert started == [[sys.executable, "-m", "benchmarks.kernels", *options, "--no-triton"]]


def test_targets() -> None:
    def row(model: str, millions: int, ratio: float, share: float) -> kernels.Row:
        return kernels.Row(model, millions * 10**6, "ours", 1.0, ratio, share)

    models = ["small", "large", "huge"]
    met = [row("small", 1, 0.5, 0.1), row("large", 60, 1.0, 0.9), row("huge", 1000, 0.9, 0.85)]
    assert kernels.verdicts(met, models, "ours") == [
        "target: at most the time of clip_grad_norm_ on every model: ours: met "
        "(large: 1.00 times clip_grad_norm_, 90.0 % of the bandwidth)",
        "target: at least 85 % of the copy bandwidth above 50 million parameters: ours: met "
        "(huge: 0.90 times clip_grad_norm_, 85.0 % of the bandwidth)",
    ]
    missed = kernels.verdicts([*met[:2], row("huge", 1000, 1.25, 0.7)], models, "ours")
    assert "missed by 25.0 % (huge" in missed[0]
    assert "missed by 15.0 points (huge" in missed[1]
    assert all(line.endswith("and not measured: huge") for line in kernels.verdicts(met[:2], models, "ours"))
    assert all(line.endswith("ours: not measured") for line in kernels.verdicts([], models, "ours"))
    # Where clipping failed.
    nan = float("nan")
    without = kernels.verdicts([row("small", 1, nan, 0.1), met[1], row("huge", 1000, nan, 0.7)], models, "ours")
    assert without[0].endswith("of the bandwidth), and not measured: small, huge")
    assert without[1].endswith("ours: missed by 15.0 points (huge: 70.0 % of the bandwidth)")
    assert kernels.verdicts([row("small", 1, nan, 0.1)], ["small"], "ours")[0].endswith("ours: not measured")


def test_learning_rates() -> None:
    table = rows(
        output_of("benchmarks.learning_rates", "--epochs", "1", "--seeds", "0", "--rates", "1e-3", "--threads", "1")
    )
    assert [row[:2] for row in table] == [["Adam", "1e-03"], ["SGD, momentum 0.9", "1e-03"]]
    assert all(0 <= float(accuracy) <= 1 for row in table for accuracy in row[2:])


@pytest.mark.skipif(
    not hasattr(torchmetrics.segmentation, "HausdorffDistance"),
    reason="needs a newer torchmetrics: this has no Hausdorff distance",
)
def test_metrics() -> None:
    table = rows(output_of("benchmarks.metrics", "--images", "2", "--size", "32", "--rounds", "1", "--threads", "1"))
    values = {(masks, score): float(value) for masks, score, _, value in table}
    assert len(values) == len(table) == 19
    for masks in ("blobs", "noise"):
        ours = values[masks, "Hausdorff, lightning_znorm"]
        assert ours == values[masks, "Hausdorff, SciPy directed_hausdorff"] > 0
        assert values[masks, "HD95, lightning_znorm"] == pytest.approx(values[masks, "HD95, MONAI"], abs=2e-4)
        for others in ("MONAI", "torchmetrics"):
            assert values[masks, "Dice, lightning_znorm"] == pytest.approx(values[masks, f"Dice, {others}"], abs=2e-4)
    assert all(float(milliseconds) > 0 for _, _, milliseconds, _ in table)


@pytest.fixture
def averages() -> None:
    """Skip if gloo cannot average, which DTensor's own mean needs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(1), dist.ReduceOp.AVG)
    except RuntimeError as error:
        pytest.skip(f"needs a newer torch: the loop to compare with does not run ({error})")
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("averages")
def test_collectives(tmp_path: Path) -> None:
    arguments = ("--parameters", "3", "30", "--rounds", "2", "--processes", "2", "--plot", str(tmp_path / "curve.svg"))
    table = rows(output_of("benchmarks.collectives", *arguments))
    drawn = re.findall(r"<!-- (.*) -->", (tmp_path / "curve.svg").read_text())
    assert {"zscore_grads_", "DTensor by DTensor", "collectives", "milliseconds"} <= set(drawn)
    assert [row[:2] for row in table] == [
        [count, name]
        for count in ("3", "30")
        for name in ("zscore_grads_", "centralize_grads_", "DTensor by DTensor", "gathered one by one")
    ]
    # Our collectives do not grow with the number of parameters. Centralization works on rows, and these are whole.
    collectives = {(count, name): int(calls) for count, name, calls, _, _ in table}
    for count in (3, 30):
        assert collectives[str(count), "zscore_grads_"] == 2
        assert collectives[str(count), "centralize_grads_"] == 0
        assert collectives[str(count), "DTensor by DTensor"] >= count
        assert collectives[str(count), "gathered one by one"] == count
    for count in (3, 30):
        own = [row for row in table if row[0] == str(count)]
        for row in own:
            assert float(row[4]) == pytest.approx(float(row[3]) / float(own[0][3]), rel=0.05, abs=0.06)


def test_soak() -> None:
    output = output_of("benchmarks.soak", "--steps", "100", "--tensors", "30")
    table = rows(output)
    assert sorted(row[0] for row in table) == ["0", "1"]
    for _, steps, early, late, change, files in table:
        assert steps == "100"
        assert float(change) == pytest.approx(100 * (float(late) / float(early) - 1), abs=0.03)
        assert float(change) < 1
        assert len(set(files.split(", "))) == 1
    assert "Left behind: 0 files, 0 processes" in output


def test_large_gradient() -> None:
    arguments = ("--elements", "100001", "--dtypes", "bfloat16", "float16", "float32")
    errors = {row[1]: float(row[-1]) for row in rows(output_of("benchmarks.large_gradient", *arguments))}
    # Half a unit in the last place; in float32 also the errors of the subtraction and of the mean.
    assert errors["bfloat16"] <= 2**-8
    assert errors["float16"] <= 2**-11
    assert 0 < errors["float32"] < 1e-5


def test_activations() -> None:
    arguments = ("--networks", "unetpp", "attention_unet", "--threads", "1", "--size")
    small, large = (rows(output_of("benchmarks.activations", *arguments, size)) for size in ("32", "64"))
    assert [row[:2] for row in small] == [
        [network, precision] for network in ("unetpp", "attention_unet") for precision in ("32-true", "bf16-mixed")
    ]
    for (*_, image, once, weights, batch), (*_, of_large, once_of_large, _, _) in zip(small, large, strict=True):
        assert float(of_large) == pytest.approx(4 * float(image), rel=0.02)
        assert once_of_large == once
        assert float(batch) == pytest.approx((128 * float(image) + float(once) + float(weights)) / 1024, abs=0.1)
    full, half = float(small[0][2]), float(small[1][2])
    assert 0.4 * full < half < 0.7 * full


def test_scores() -> None:
    table = rows(output_of("benchmarks.scores", "--images", "2", "--batch-size", "2", "--size", "32", "--rounds", "1"))
    assert [row[:2] for row in table] == [
        [masks, scores] for masks in ("blobs", "noise") for scores in ("Dice alone", "all, and scores.csv")
    ]
    for (*_, alone, one), (*_, everything, ratio) in zip(table[::2], table[1::2], strict=True):
        assert float(one) == 1
        assert float(ratio) == pytest.approx(float(everything) / float(alone), rel=0.05)


def test_startup(tmp_path: Path) -> None:
    help_row, fit_row = rows(output_of("benchmarks.startup", "--rounds", "1", "--rows", "fit-help", "fit"))
    assert float(help_row[-1]) < 100 < float(fit_row[-1])  # MB
    (compared,) = rows(output_of("benchmarks.startup", "--rounds", "1", "--rows", "fit-help", "--against", "."))
    assert len([float(cell) for cell in compared[1:]]) == 6


def test_nonfinite() -> None:
    table = rows(output_of("benchmarks.nonfinite", "--rounds", "1", "--numel", "1024"))
    assert [row[0] for row in table[:2]] == ["zscore_grads_", "zscore_grads_, error_if_nonfinite"]
    assert float(table[0][2]) == 1.0


def test_sgd_steps() -> None:
    table = rows(
        output_of("benchmarks.sgd_steps", "--epochs", "1", "--seeds", "0", "--sizes", "0.1", "3", "--networks", "MLP",
                  "--threads", "1")
    )  # fmt: skip
    expected = [
        [method, momentum, size] for method in ("ZNorm", "SING") for momentum in ("0", "0.9") for size in ("0.1", "3")
    ]
    assert [row[1:4] for row in table] == expected
    for number in range(0, len(table), 2):
        (_, *small), (_, *large) = table[number : number + 2]
        assert float(large[3]) == pytest.approx(30 * float(small[3]), rel=0.1)
        assert 0 <= float(large[4]) < float(small[4]) <= 1
