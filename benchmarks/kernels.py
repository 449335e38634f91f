"""Time of ``zscore_grads_`` beside ``clip_grad_norm_`` and other ways to write it: ``python -m benchmarks.kernels``.

All rows work on the same gradients in the same process and take turns; the ratio is that of the medians. Every row
changes the same gradients in place. Their values differ from row to row, their shapes and memory do not; on a GPU the
time hardly depends on values.

The floor is the time that the device takes to read all gradients twice and to write them once, at the speed at which it
copies a large tensor. Gradients that stay in a cache may come below it.

With ``--device cuda``, a call ends when the device is done. "Triton" is the kernel that the environment variable
``LIGHTNING_ZNORM_KERNEL`` chooses, and all other rows are without it. "In a graph" is the same in a CUDA graph, which
takes no time on the CPU; its ratio is to clipping in a graph. The share of the bandwidth is that of the floor in the
time; "extra MiB" is the most memory that a call takes beyond what is allocated before. What raises an error has a row
that says so. The last lines say which targets are met.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.timing import alternating_medians
from lightning_znorm.errors import ZNormError
from lightning_znorm.functional import centralize_grads_, zscore_grads_
from lightning_znorm.gradients.kernels import dispatch
from lightning_znorm.gradients.kernels.device import DeviceTable
from lightning_znorm.gradients.shards import Segment
from lightning_znorm.models import resnet56

KERNEL = "LIGHTNING_ZNORM_KERNEL"
CLIPPING, PYTORCH, TRITON = "clip_grad_norm_", "zscore_grads_", "zscore_grads_, Triton"
IN_A_GRAPH = ", in a graph"
# The targets: on every model at most the time of clipping; of large ones, this share of the bandwidth of a copy.
LARGE_NUMEL, LARGE_SHARE = 50_000_000, 0.85


def transformer(width: int = 2048, layers: int = 20, vocabulary: int = 32_000) -> nn.Module:
    """Return a module with the parameters of a decoder, a billion, that computes nothing."""
    shapes = [(vocabulary, width)]
    for _ in range(layers):
        shapes += [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,)]
        shapes += [(width, 4 * width), *[(width,)] * 5]
    return nn.ParameterList(torch.empty(shape).normal_(std=0.02) for shape in shapes)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-56": resnet56,
    "DenseNet-121": lambda: timm.create_model("densenet121", num_classes=10),
    "ResNet-152": lambda: timm.create_model("resnet152", num_classes=10),
    "ViT-B/16": lambda: timm.create_model("vit_base_patch16_224"),
    "transformer, 1 G": transformer,
}
ON_A_CPU = ["ResNet-56", "DenseNet-121", "ResNet-152", "ViT-B/16"]


def tensor_by_tensor_(parameters: list[Tensor], eps: float = 1e-10) -> None:
    """Normalize the gradients by the obvious loop."""
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None
        grad.copy_((grad - grad.mean()) / (grad.std(correction=0) + eps))


def rows(parameters: list[Tensor]) -> dict[str, Callable[[], object]]:
    functions: dict[str, Callable[[], object]] = {
        "clip_grad_norm_": lambda: clip_grad_norm_(parameters, 1.0, foreach=True),
        "zscore_grads_": lambda: zscore_grads_(parameters),
        "zscore_grads_, adaptive": lambda: zscore_grads_(parameters, centering="adaptive"),
        "centralize_grads_": lambda: centralize_grads_(parameters),
        "obvious loop": lambda: tensor_by_tensor_(parameters),
        "timm adaptive_clip_grad": lambda: adaptive_clip_grad(parameters),
    }
    if importlib.util.find_spec("pytorch_optimizer"):
        from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient
        from pytorch_optimizer.optimizer.utils import normalize_gradient

        def normalize() -> None:
            for parameter in parameters:
                normalize_gradient(parameter.grad)

        functions["pytorch_optimizer normalize_gradient"] = normalize
        functions["pytorch_optimizer centralize_gradient"] = lambda: centralize_gradient([p.grad for p in parameters])
    return functions


def with_triton(parameters: list[Tensor]) -> None:
    os.environ[KERNEL] = "triton"  # zscore_grads_ reads it each time
    try:
        zscore_grads_(parameters)
    finally:
        del os.environ[KERNEL]


def check_triton_has_all(parameters: list[Tensor]) -> None:
    """Raise if the variable does not give all gradients to Triton's kernel: its rows would be of another one."""
    os.environ[KERNEL] = "triton"
    try:
        tables, on_cpu = dispatch.tables_of([Segment(p.grad) for p in parameters if p.grad is not None])
    finally:
        del os.environ[KERNEL]
    if on_cpu or any(isinstance(table, DeviceTable) for table in tables):
        raise RuntimeError(f"{KERNEL} had no effect on some gradients")


def in_a_graph(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # The outer block leaves the stream of the capture, too, if that fails.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        function()
    return graph


def finished(function: Callable[[], object]) -> None:
    function()
    torch.cuda.synchronize()


def copied_bytes_per_second(numel: int = 2**29) -> float:
    """Return the bytes that a copy of a large tensor on the GPU reads and writes per second: the best of 20."""
    source, target = (torch.zeros(numel, device="cuda") for _ in range(2))
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / min(times)


def copied_bytes_per_second_on_cpu(numel: int = 2**25) -> float:
    """Return the bytes that a copy of a large tensor on the CPU reads and writes per second: the best of 20."""
    source, target = (torch.zeros(numel) for _ in range(2))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def extra_memory(function: Callable[[], object]) -> int:
    """Return how many bytes a call takes at its peak, beyond those allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    finished(function)
    return torch.cuda.max_memory_allocated() - before


def with_gradients(model: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    with torch.device(device):
        parameters: list[Tensor] = list(MODELS[model]().to(dtype).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return parameters


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of zscore_grads_ beside clip_grad_norm_.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="(default: all, on a CPU the first four)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each row (default: 15)")
    parser.add_argument("--no-triton", action="store_true", help="on a GPU, no rows of Triton's kernel")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    models = args.models or (list(MODELS) if args.device == "cuda" else ON_A_CPU)
    dtype: torch.dtype = getattr(torch, args.dtype)
    if args.device == "cpu":
        on_cpu(models, dtype, args.rounds, args.threads)
        return
    if not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device, or this build of torch cannot use it")
    try:
        on_cuda(models, dtype, args.rounds, not args.no_triton)
    except DeviceError:
        if args.no_triton:
            raise
        traceback.print_exc()
        print("\nThe device failed. A new process measures all but Triton's kernel:\n", flush=True)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.kernels", *sys.argv[1:], "--no-triton"])


def on_cpu(models: list[str], dtype: torch.dtype, rounds: int, threads: int) -> None:
    print(f"torch {torch.__version__}, CPU, {threads} threads, {str(dtype)[6:]}, median of {rounds} calls\n")
    print(f"| {'model':16} | {'function':37} | {'ms':>8} | {'of clip_grad_norm_':>18} |")
    print(f"| {'-' * 16} | {'-' * 37} | {'-' * 7}: | {'-' * 17}: |")
    bandwidth = copied_bytes_per_second_on_cpu()
    for model in models:
        parameters = with_gradients(model, "cpu", dtype)
        medians = alternating_medians(rows(parameters), rounds)
        medians["floor"] = 3 * sum(parameter.nbytes for parameter in parameters) / bandwidth
        for name, seconds in medians.items():
            print(f"| {model:16} | {name:37} | {seconds * 1e3:8.2f} | {seconds / medians['clip_grad_norm_']:18.2f} |")


@dataclass
class Row:
    """What was measured of a function and a model.

    Attributes:
        seconds: Of a call, the median.
        ratio: To the time of clipping, of both in a graph or neither; NaN if that was not measured.
        share: Of the bandwidth of a copy.
    """

    model: str
    numel: int
    function: str
    seconds: float
    ratio: float
    share: float


def on_cuda(models: list[str], dtype: torch.dtype, rounds: int, triton: bool) -> None:
    os.environ.pop(KERNEL, None)
    bandwidth = copied_bytes_per_second()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {str(dtype)[6:]}, median of {rounds} calls")
    print(f"a copy moves {bandwidth / 1e12:.2f} TB/s; bytes: gradients read twice and written once\n")
    header = f"{'of clip_grad_norm_':>18} | {'of bandwidth':>12} | {'extra MiB':>9} |"
    print(f"| {'model':16} | {'MiB':>7} | {'function':37} | {'ms':>8} | {header}")
    print(f"| {'-' * 16} | {'-' * 6}: | {'-' * 37} | {'-' * 7}: | {'-' * 17}: | {'-' * 11}: | {'-' * 8}: |")
    table: list[Row] = []
    for model in models:
        parameters = with_gradients(model, "cuda", dtype)
        functions = rows(parameters)
        if triton:
            functions[TRITON] = partial(with_triton, parameters)
        table += measured_on_cuda(model, parameters, functions, rounds, bandwidth)
        del parameters, functions
        torch.cuda.empty_cache()
    print()
    for function in (PYTORCH, TRITON):
        for name in (function, function + IN_A_GRAPH) if triton or function is PYTORCH else ():
            print("\n".join(verdicts(table, models, name)))


def measured_on_cuda(
    model: str, parameters: list[Tensor], functions: dict[str, Callable[[], object]], rounds: int, bandwidth: float
) -> list[Row]:
    """Measure and print the rows of a model."""
    numel, size = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
    start = f"| {model:16} | {size / 2**20:7.1f} |"
    failed = {name: error for name, call in functions.items() if (error := error_of(partial(finished, call)))}
    if TRITON in functions and TRITON not in failed:
        error = error_of(partial(check_triton_has_all, parameters))
        failed |= {TRITON: error} if error else {}
    graphs: dict[str, Callable[[], object]] = {}
    for name in (CLIPPING, PYTORCH, TRITON):
        if name in functions and name not in failed:
            try:
                graphs[name + IN_A_GRAPH] = in_a_graph(functions[name]).replay
            except Exception as error:
                failed[name + IN_A_GRAPH] = described(error)
    calls = {name: call for name, call in (functions | graphs).items() if name not in failed}
    medians = alternating_medians({name: partial(finished, call) for name, call in calls.items()}, rounds)
    table = []
    for name in [*functions, *(name + IN_A_GRAPH for name in (CLIPPING, PYTORCH, TRITON))]:
        if name in failed:
            print(f"{start} {name:37} | {failed[name]} | - | - | - |", flush=True)
        elif name in medians:
            seconds = medians[name]
            reference = medians.get(CLIPPING + IN_A_GRAPH * name.endswith(IN_A_GRAPH), float("nan"))
            row = Row(model, numel, name, seconds, seconds / reference, 3 * size / bandwidth / seconds)
            table.append(row)
            # A graph has its memory from when it was captured.
            memory = f"{extra_memory(calls[name]) / 2**20:9.2f}" if name in functions else f"{'-':>9}"
            ratio = f"{'-':>18}" if math.isnan(row.ratio) else f"{row.ratio:18.2f}"
            figures = f"{ratio} | {100 * row.share:10.1f} % | {memory}"
            print(f"{start} {name:37} | {seconds * 1e3:8.3f} | {figures} |", flush=True)
    return table


class DeviceError(RuntimeError):
    """The device itself failed: the process cannot use it any more."""


def error_of(call: Callable[[], object]) -> str | None:
    """Return what a call raises, in words; ``None`` if nothing."""
    try:
        call()
    except Exception as error:
        return described(error)
    return None


def described(error: Exception) -> str:
    try:
        torch.cuda.synchronize()
    except Exception as fault:
        raise DeviceError(str(fault)) from error
    text = " ".join(str(error).replace("|", "/").split())
    return f"refused: {text}" if isinstance(error, ZNormError) else f"failed: {type(error).__name__}: {text[:200]}"


def verdicts(table: list[Row], models: list[str], function: str) -> list[str]:
    """Return a line for each target that says whether a function meets it, or by how much it misses it."""
    measured = {row.model: row for row in table if row.function == function}
    small = {row.model for row in table if row.numel <= LARGE_NUMEL}
    return [
        f"target: at most the time of clip_grad_norm_ on every model: {function}: "
        + verdict(measured, models, lambda row: 100 * (row.ratio - 1), "{:.1f} %"),
        f"target: at least {100 * LARGE_SHARE:.0f} % of the copy bandwidth above {LARGE_NUMEL // 10**6} million "
        f"parameters: {function}: "
        + verdict(
            measured,
            [model for model in models if model not in small],
            lambda row: 100 * (LARGE_SHARE - row.share),
            "{:.1f} points",
        ),
    ]


def verdict(measured: dict[str, Row], models: list[str], missed_by: Callable[[Row], float], amount: str) -> str:
    # Without the time of clipping there is no ratio to it.
    measured = {model: row for model, row in measured.items() if not math.isnan(missed_by(row))}
    found = [measured[model] for model in models if model in measured]
    if not found:
        return "not measured"
    worst = max(found, key=missed_by)
    text = f"missed by {amount.format(missed_by(worst))}" if missed_by(worst) > 0 else "met"
    ratio = "" if math.isnan(worst.ratio) else f"{worst.ratio:.2f} times clip_grad_norm_, "
    text += f" ({worst.model}: {ratio}{100 * worst.share:.1f} % of the bandwidth)"
    missing = [model for model in models if model not in measured]
    return f"{text}, and not measured: {', '.join(missing)}" if missing else text


if __name__ == "__main__":
    main()
