"""Time of ``zscore_grads_`` beside ``clip_grad_norm_`` and other ways to write it: ``python -m benchmarks.kernels``.

All rows work on the same gradients in the same process and take turns; the ratio is that of the medians. All rows
normalize in place, so each gets the gradients that the row before it made: of the same size, in the same memory.

The floor is the time that the device takes to read all gradients twice and to write them once, at the speed at which it
copies a large tensor. Gradients that stay in a cache may come below it. With ``--device cuda``, a call ends when the
device is done; "in a graph" does not count the time on the CPU.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import timm
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.timing import alternating_medians
from lightning_znorm.functional import centralize_grads_, zscore_grads_
from lightning_znorm.gradients.kernels import dispatch
from lightning_znorm.models import resnet56


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


def cuda_rows(parameters: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Return the rows for a GPU: with Triton, without it, and in CUDA graphs, which take no time on the CPU."""

    def in_pytorch() -> None:
        with patch.object(dispatch, "DEVICE_TYPES", frozenset()):
            zscore_grads_(parameters)

    dispatch.DEVICE_TYPES = frozenset({"cuda"})
    functions = rows(parameters)
    graphs = {name: in_a_graph(functions[name]) for name in ("clip_grad_norm_", "zscore_grads_", "centralize_grads_")}
    functions["zscore_grads_ without Triton"] = in_pytorch
    return functions | {f"{name}, in a graph": graph.replay for name, graph in graphs.items()}


def in_a_graph(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    models = args.models or (list(MODELS) if args.device == "cuda" else ON_A_CPU)
    dtype: torch.dtype = getattr(torch, args.dtype)
    (on_cuda if args.device == "cuda" else on_cpu)(models, dtype, args.rounds, args.threads)


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


def on_cuda(models: list[str], dtype: torch.dtype, rounds: int, threads: int) -> None:
    bandwidth = copied_bytes_per_second()
    triton = "Triton" if dispatch.runs_triton(torch.device("cuda", torch.cuda.current_device())) else "no Triton"
    print(f"torch {torch.__version__}, {triton}, {torch.cuda.get_device_name()}, {str(dtype)[6:]}, median of {rounds}")
    print(f"calls; a copy moves {bandwidth / 1e12:.2f} TB/s\n")
    header = f"{'of clip_grad_norm_':>18} | {'of the floor':>12} | {'of bandwidth':>12} | {'extra MiB':>9} |"
    print(f"| {'model':16} | {'MiB':>7} | {'function':37} | {'ms':>8} | {header}")
    print(
        f"| {'-' * 16} | {'-' * 6}: | {'-' * 37} | {'-' * 7}: | {'-' * 17}: | {'-' * 11}: | {'-' * 11}: | {'-' * 8}: |"
    )
    for model in models:
        parameters = with_gradients(model, "cuda", dtype)
        size = sum(parameter.nbytes for parameter in parameters)
        floor = 3 * size / bandwidth
        functions = cuda_rows(parameters)
        medians = alternating_medians({name: partial(finished, call) for name, call in functions.items()}, rounds)
        for name, seconds in medians.items():
            graph = ", in a graph" if name.endswith(", in a graph") else ""
            ratio = seconds / medians[f"clip_grad_norm_{graph}"]
            memory = extra_memory(functions[name]) / 2**20
            figures = f"{ratio:18.2f} | {seconds / floor:12.2f} | {floor / seconds:12.2f} | {memory:9.2f}"
            print(f"| {model:16} | {size / 2**20:7.1f} | {name:37} | {seconds * 1e3:8.3f} | {figures} |", flush=True)
        del parameters, functions
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
