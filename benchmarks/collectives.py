"""Time and collectives of ``zscore_grads_`` on sharded gradients: ``python -m benchmarks.collectives``.

The gradients are DTensors that are sharded along their rows, as with FSDP2, over processes on the CPU (gloo). Beside
``zscore_grads_`` run the obvious loop with ``DTensor.mean`` and ``DTensor.std``, and a loop that gathers each gradient,
normalizes it and keeps the local part. All rows work on the same gradients and take turns; the ratio is that of the
first process' medians. Collectives are counted by ``CommDebugMode``, which counts every operation of
``torch.distributed``. ``--plot FILE`` draws both over the number of parameters.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks.timing import alternating_medians
from lightning_znorm.functional import centralize_grads_, zscore_grads_

EPS = 1e-10


def dtensor_by_dtensor_(parameters: list[nn.Parameter]) -> None:
    """Normalize the gradients by the obvious loop."""
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None
        grad.copy_((grad - grad.mean()) / (grad.std(correction=0) + EPS))


def gathered_one_by_one_(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        grad = parameter.grad
        assert isinstance(grad, DTensor)
        full = grad.full_tensor()
        mesh = grad.device_mesh
        local = torch.tensor_split(full, mesh.size())[mesh.get_local_rank()]
        grad.to_local().copy_((local - full.mean()) / (full.std(correction=0) + EPS))


def parameters_of(count: int, mesh: DeviceMesh, rows: int, columns: int) -> list[nn.Parameter]:
    """Return parameters of which half are matrices and half are vectors, like the weights and biases of layers."""
    parameters = []
    for index in range(count):
        local = torch.randn(rows // mesh.size(), columns) if index % 2 == 0 else torch.randn(rows // mesh.size())
        parameters.append(nn.Parameter(DTensor.from_local(torch.zeros_like(local), mesh, [Shard(0)])))
        parameters[-1].grad = DTensor.from_local(local * 1e-3, mesh, [Shard(0)])
    return parameters


def functions_of(parameters: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    return {
        "zscore_grads_": lambda: zscore_grads_(parameters),
        "centralize_grads_": lambda: centralize_grads_(parameters),
        "DTensor by DTensor": lambda: dtensor_by_dtensor_(parameters),
        "gathered one by one": lambda: gathered_one_by_one_(parameters),
    }


def collectives_of(function: Callable[[], object]) -> int:
    with CommDebugMode() as traffic:
        function()
    return traffic.get_total_counts()


def agree_on_the_result(mesh: DeviceMesh) -> None:
    """Check that all rows compute the same result."""
    results: list[list[Tensor]] = []
    for name in ("zscore_grads_", "DTensor by DTensor", "gathered one by one"):
        torch.manual_seed(mesh.get_local_rank())
        parameters = parameters_of(4, mesh, 16, 5)
        functions_of(parameters)[name]()
        results.append([parameter.grad.to_local() for parameter in parameters])  # type: ignore[union-attr]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


def work(rank: int, store: str, args: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.processes)
    mesh = init_device_mesh("cpu", (args.processes,))
    agree_on_the_result(mesh)
    if rank == 0:
        print(
            f"torch {torch.__version__}, CPU, gloo, {args.processes} processes of one thread, float32 matrices of "
            f"{args.rows} x {args.columns} and vectors of {args.rows}, median of {args.rounds} calls\n"
        )
        print(f"| parameters | {'function':19} | collectives | {'ms':>8} | of zscore_grads_ |")
        print(f"| ---------: | {'-' * 19} | ----------: | {'-' * 7}: | ---------------: |")
    times: defaultdict[str, list[float]] = defaultdict(list)
    counts: defaultdict[str, list[int]] = defaultdict(list)
    for count in args.parameters:
        functions = functions_of(parameters_of(count, mesh, args.rows, args.columns))
        collectives = {name: collectives_of(function) for name, function in functions.items()}
        medians = alternating_medians(functions, args.rounds, warmup=1)
        if rank == 0:
            for name, seconds in medians.items():
                ratio = seconds / medians["zscore_grads_"]
                times[name].append(seconds * 1e3)
                counts[name].append(collectives[name])
                row = f"| {count:10} | {name:19} | {collectives[name]:11} | {seconds * 1e3:8.2f} | {ratio:16.2f} |"
                print(row, flush=True)
    if rank == 0 and args.plot:
        plot(args.plot, args.parameters, times, counts)
    dist.barrier()  # gloo aborts a process whose partner ends during a collective
    dist.destroy_process_group()
    # Not by the end of the interpreter, in which a thread of gloo that is still running aborts the process.
    sys.stdout.flush()
    os._exit(0)


def plot(
    file: Path, parameters: list[int], times: Mapping[str, list[float]], collectives: Mapping[str, list[int]]
) -> None:
    """Draw time and collectives over the number of parameters, with logarithmic axes."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, values, label in ((left, times, "milliseconds"), (right, collectives, "collectives")):
        for (name, points), marker, color in zip(values.items(), "os^D", ("C0", "C1", "C2", "C3"), strict=True):
            if any(points):  # a logarithmic axis has no zero
                axes.plot(parameters, points, color, marker=marker, label=name)
        axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel=label)
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and collectives of zscore_grads_ on sharded gradients.")
    parser.add_argument("--parameters", type=int, nargs="+", default=[10, 100, 1000], help="numbers of parameters")
    parser.add_argument("--processes", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--rows", type=int, default=64, help="rows of each parameter (default: 64)")
    parser.add_argument("--columns", type=int, default=64, help="columns of each matrix (default: 64)")
    parser.add_argument("--rounds", type=int, default=11, help="timed calls of each row (default: 11)")
    parser.add_argument("--plot", type=Path, help="file for a drawing, .png or .svg")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (str(Path(folder, "store")), args), nprocs=args.processes)


if __name__ == "__main__":
    main()
