"""Normalizes gradients that are DTensors in four processes. Called by test_dtensor.py."""

import logging
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial as partial_of
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_znorm.functional import attach, centralize_grads_, transform_grads_, zscore_grads_
from lightning_znorm.gradients import Centralization, UnsupportedGradientError, ZScore
from tests.fsdp import FSDP2_RUNS_ON_CPU

PROCESSES = 4
LR = 0.1

line: DeviceMesh
square: DeviceMesh


def gradient(shape: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """The same on all ranks."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3).to(dtype)


def parameter(grad: Tensor | None, like: Tensor | None = None) -> nn.Parameter:
    """A parameter with this gradient."""
    tensor = grad if like is None else like
    assert tensor is not None
    result = nn.Parameter(torch.zeros_like(tensor))
    result.grad = grad
    return result


def distributed(grad: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> nn.Parameter:
    return parameter(distribute_tensor(grad, mesh, placements))


def strided(grad: Tensor, dim: int) -> nn.Parameter:
    """Shard as FSDP2 around tensor parallelism does: tensor parallelism comes first."""
    first, second = square.get_coordinate()
    local = grad.chunk(2, dim)[second].chunk(2, dim)[first]
    placements = [_StridedShard(dim, split_factor=2), Shard(dim)]
    return parameter(
        DTensor.from_local(local.clone(), square, placements, run_check=False, shape=grad.shape, stride=grad.stride())
    )


def partial(grad: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> nn.Parameter:
    """A ``Partial`` gradient: every rank holds a summand of it, or it is the mean of what they hold."""
    local = distribute_tensor(
        grad, mesh, [Replicate() if placement.is_partial() else placement for placement in placements]
    ).to_local()
    local = local.clone()
    for mesh_dim, placement in enumerate(placements):
        if placement.is_partial():
            rank, size = mesh.get_local_rank(mesh_dim), mesh.size(mesh_dim)
            weights = [1.0 + rank for rank in range(size)]
            local *= weights[rank] / sum(weights) * (size if placement.reduce_op == "avg" else 1)
    return parameter(
        DTensor.from_local(local, mesh, placements, run_check=False, shape=grad.shape, stride=grad.stride())
    )


def in_memory_as(param: nn.Parameter, change: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """Return the gradient with a local part that has other strides."""
    grad = param.grad
    assert isinstance(grad, DTensor)
    local = change(grad.to_local())
    assert torch.equal(local, grad.to_local())
    param.grad = DTensor.from_local(
        local, grad.device_mesh, grad.placements, run_check=False, shape=grad.shape, stride=grad.stride()
    )
    return param


# Each makes a parameter of a gradient of this shape.
Case = tuple[tuple[int, ...], torch.dtype, Callable[[Tensor], nn.Parameter]]
f64 = torch.float64


def on_line(*placements: Placement) -> Callable[[Tensor], nn.Parameter]:
    return lambda grad: distributed(grad, line, placements)


def on_square(*placements: Placement) -> Callable[[Tensor], nn.Parameter]:
    return lambda grad: distributed(grad, square, placements)


def channels_last(local: Tensor) -> Tensor:
    return local.contiguous(memory_format=torch.channels_last)


CASES: dict[str, Case] = {
    "uneven": ((7, 3), f64, on_line(Shard(0))),
    "empty": ((2, 3), f64, on_line(Shard(0))),
    "even": ((8, 5), f64, on_line(Shard(0))),
    "columns": ((3, 7), f64, on_line(Shard(1))),
    "empty_columns": ((3, 2), f64, on_line(Shard(1))),
    "last": ((2, 3, 5), f64, on_line(Shard(-1))),
    "vector": ((7,), f64, on_line(Shard(0))),
    "one_element": ((1,), f64, on_line(Shard(0))),
    "rows_of_one": ((6, 1), f64, on_line(Shard(0))),
    "no_element": ((0, 3), f64, on_line(Shard(0))),
    "replicated": ((4, 3), f64, on_line(Replicate())),
    "sum": ((4, 3), f64, lambda grad: partial(grad, line, [Partial()])),
    "mean": ((4, 3), f64, lambda grad: partial(grad, line, [Partial("avg")])),
    "float32": ((7, 30), torch.float32, on_line(Shard(0))),
    "bfloat16": ((7, 30), torch.bfloat16, on_line(Shard(0))),
    "float16": ((7, 30), torch.float16, on_line(Shard(1))),
    "hybrid": ((7, 3), f64, on_square(Replicate(), Shard(0))),
    "rows_and_columns": ((7, 3), f64, on_square(Shard(0), Shard(1))),
    "columns_and_rows": ((3, 7), f64, on_square(Shard(1), Shard(0))),
    "rows_twice": ((7, 3), f64, on_square(Shard(0), Shard(0))),
    "columns_twice": ((3, 7), f64, on_square(Shard(1), Shard(1))),
    "strided_rows": ((7, 3), f64, lambda grad: strided(grad, 0)),
    "strided_columns": ((3, 8), f64, lambda grad: strided(grad, 1)),
    "sum_and_shard": ((7, 3), f64, lambda grad: partial(grad, square, [Partial(), Shard(0)])),
    "sum_and_mean": ((7, 3), f64, lambda grad: partial(grad, square, [Partial(), Partial("avg")])),
    "channels_last": ((5, 3, 2, 2), f64, lambda grad: in_memory_as(on_line(Shard(0))(grad), channels_last)),
    "channels_last_cut": ((5, 6, 2, 2), f64, lambda grad: in_memory_as(on_line(Shard(1))(grad), channels_last)),
    "channels_last_sum": (
        (5, 3, 2, 2),
        f64,
        lambda grad: in_memory_as(partial(grad, line, [Partial()]), channels_last),
    ),
    "strided_memory": (
        (7, 4),
        f64,
        lambda grad: in_memory_as(on_line(Shard(0))(grad), lambda local: local.repeat(1, 2)[:, :4]),
    ),
}


def expanded(make: Callable[[Tensor], nn.Parameter]) -> Callable[[Tensor], nn.Parameter]:
    """All columns are the same, and share memory."""
    return lambda grad: in_memory_as(
        make(grad[:, :1].expand_as(grad).contiguous()), lambda local: local[:, :1].expand_as(local)
    )


EXPANDED = {
    "expanded": on_line(Shard(0)),
    "expanded_whole": on_line(Replicate()),
    "expanded_sum": lambda grad: partial(grad, line, [Partial()]),
}


def full(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    if not isinstance(tensor.placements[0], _StridedShard):
        return tensor.full_tensor()
    # torch 2.6 refuses to put uneven ones together.
    parts: list[Any] = [None] * PROCESSES
    dist.all_gather_object(parts, tensor.to_local().detach())
    in_order = [parts[2 * first + second] for second in range(2) for first in range(2)]
    return torch.cat(in_order, tensor.placements[0].dim)


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


METHODS: dict[str, Callable[[list[Tensor]], None]] = {
    "zscore": zscore_grads_,
    "adaptive": partial_of(zscore_grads_, centering="adaptive"),
    "centralized": centralize_grads_,
}


def collectives_of(method: str, params: list[nn.Parameter]) -> dict[str, Any]:
    """Change the gradients, and return the number of collectives that it took."""
    with patch("torch.distributed.all_reduce", wraps=dist.all_reduce) as all_reduce, CommDebugMode() as traffic:
        METHODS[method](params)
    counts = {str(kind): count for kind, count in traffic.get_comm_counts().items() if count}
    return {"all_reduce": all_reduce.call_count, "traffic": counts}


def case_record(cases: dict[str, Case], method: str) -> dict[str, Any]:
    """Return what a method makes of the gradients of some cases in one call."""
    whole = {name: gradient(shape, dtype, seed) for seed, (name, (shape, dtype, _)) in enumerate(cases.items())}
    params = {name: make(whole[name].clone()) for name, (_, _, make) in cases.items()}
    pointers = {name: local_part(param.grad).data_ptr() for name, param in params.items()}
    collectives = collectives_of(method, list(params.values()))
    return {
        "before": whole,
        "after": {name: full(param.grad) for name, param in params.items()},
        "in_place": {name: local_part(param.grad).data_ptr() == pointers[name] for name, param in params.items()},
        **collectives,
    }


def one_by_one(method: str) -> dict[str, Any]:
    records = {name: case_record({name: case}, method) for name, case in CASES.items()}
    return {
        name: {
            "before": r["before"][name],
            "after": r["after"][name],
            "in_place": r["in_place"][name],
            "traffic": r["traffic"],
        }
        for name, r in records.items()
    }


def together(method: str) -> dict[str, Any]:
    plain: dict[str, Case] = {"plain": ((4, 6), f64, parameter), "plain_float32": ((9,), torch.float32, parameter)}
    return case_record({"plain_first": ((5, 5), f64, parameter)} | CASES | plain, method)


def shared_memory(method: str) -> dict[str, Any]:
    cases = {name: ((7, 3), f64, expanded(make)) for name, make in EXPANDED.items()}
    record = case_record(cases, method)
    record["before"] = {name: grad[:, :1].expand_as(grad) for name, grad in record["before"].items()}
    return record


def the_same_twice(method: str) -> dict[str, Any]:
    """Two parameters with one gradient, of which some ranks hold nothing. Small ones are copied before the change."""
    whole = gradient((2, 20_000))
    makes = {"shard": on_line(Shard(0)), "sum": lambda grad: partial(grad, line, [Partial()])}
    after = {}
    for name, make in makes.items():
        first = make(whole.clone())
        second = nn.Parameter(torch.zeros_like(first))
        second.grad = first.grad
        METHODS[method]([first, second])
        after |= {f"{name}_first": full(first.grad), f"{name}_second": full(second.grad)}
    return {"before": dict.fromkeys(after, whole), "after": after}


def in_flight(method: str) -> dict[str, Any]:
    """Gradients that are results of collectives that may still be running."""
    whole = gradient((6, 5))
    sums = [funcol.all_reduce(whole / PROCESSES, "sum", line) for _ in range(2)]
    assert all(isinstance(one, funcol.AsyncCollectiveTensor) for one in sums)
    params = [
        parameter(DTensor.from_local(sums[0], line, [Replicate()], run_check=False)),
        parameter(None, torch.zeros_like(whole)),
    ]
    params[1].grad = sums[1]
    METHODS[method](params)
    names = ["dtensor", "plain"]
    return {
        "before": dict.fromkeys(names, whole),
        "after": {name: full(param.grad).clone() for name, param in zip(names, params, strict=True)},
    }


def missing(method: str) -> dict[str, Any]:
    """Gradients of None, between others and alone."""
    whole = gradient((7, 3))
    present, absent = on_line(Shard(0))(whole), on_square(Shard(1), Shard(0))(whole)
    absent.grad = None
    frozen = on_line(Shard(0))(whole)
    frozen.grad = None
    frozen.requires_grad_(False)
    METHODS[method]([absent, present, frozen])
    METHODS[method]([absent])
    return {
        "before": {"present": whole},
        "after": {"present": full(present.grad)},
        "none": absent.grad is None and frozen.grad is None,
    }


def frozen_later(method: str) -> dict[str, Any]:
    """A gradient of a parameter that has been frozen since: the optimizer will use it."""
    whole = gradient((7, 3))
    params = {"sharded": on_line(Shard(0))(whole), "plain": parameter(whole.clone())}
    for param in params.values():
        param.requires_grad_(False)
    METHODS[method](list(params.values()))
    return {
        "before": dict.fromkeys(params, whole),
        "after": {name: full(param.grad) for name, param in params.items()},
    }


def submesh(method: str) -> dict[str, Any]:
    """DTensors of the first two ranks only, of which the other two hold nothing."""
    mesh = DeviceMesh("cpu", [0, 1])
    whole = gradient((7, 3))
    rank = dist.get_rank()
    params = {}
    for name, placement in {"shard": Shard(0), "sum": Partial()}.items():
        local = (whole.chunk(2)[rank] if name == "shard" else whole / 2) if rank < 2 else torch.empty(0, dtype=f64)
        params[name] = parameter(
            DTensor.from_local(
                local.clone(), mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride()
            )
        )
    params["everywhere"] = on_line(Shard(0))(whole)
    METHODS[method](list(params.values()))
    here = params if rank < 2 else {"everywhere": params["everywhere"]}
    return {
        "before": dict.fromkeys(here, whole),
        "after": {name: full(param.grad) for name, param in here.items()},
    }


def refused() -> dict[str, str]:
    """Messages, and whether the gradients before the refused one are as they were."""
    messages = {}
    whole = gradient((8, 3))

    def check(name: str, call: Callable[[list[nn.Parameter]], object], bad: nn.Parameter) -> None:
        params = [on_line(Shard(0))(whole), partial(whole, line, [Partial()]), bad]
        try:
            call(params)
        except UnsupportedGradientError as error:
            messages[name] = str(error)
        for param in params[:2]:
            torch.testing.assert_close(full(param.grad), whole)

    largest = DTensor.from_local(whole.clone(), line, [Partial("max")], run_check=False)
    check("largest", zscore_grads_, parameter(largest))
    check("function", lambda params: transform_grads_(params, torch.sign), on_line(Shard(0))(whole))
    return messages


def counted(method: str, count: int, sharded: bool) -> dict[str, Any]:
    """Collectives of a call for many parameters."""
    make = on_line(Shard(0)) if sharded else parameter
    return collectives_of(method, [make(gradient((5, 3 + index % 4), seed=index)) for index in range(count)])


class Network(nn.Module):
    """Odd sizes, a convolution, a normalization, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 3, 3, bias=False)
        self.first = nn.Linear(48, 7)
        self.second = nn.Linear(7, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 2)
        self.unused = nn.Linear(3, 5)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(self.conv(images).flatten(1)).tanh()
        return self.last(self.norm(self.second(hidden).sin()))


def loss_of(output: Tensor) -> Tensor:
    return (output.square() * torch.tensor([1.0, -0.5], dtype=output.dtype)).mean()


def images(rank: int, step: int) -> Tensor:
    return gradient((4, 1, 6, 6), seed=100 + 10 * step + rank)


class Blocks(nn.Module):
    """Two layers between normalizations, for tensor and sequence parallelism."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)
        self.last = nn.Linear(6, 2, bias=False)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.down(self.up(self.norm(tokens)).tanh()))


def tokens(rank: int, step: int) -> Tensor:
    return gradient((3, 8, 6), seed=200 + 10 * step + rank)


def fsdp(mesh: DeviceMesh) -> nn.Module:
    model = Network()
    for layer in (model.conv, model.first, model.second):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(mesh: DeviceMesh) -> nn.Module:
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(),  # and "last" is a plain layer
    }
    return parallelize_module(Blocks(), mesh, plan)


def fsdp_and_tensor_parallel() -> nn.Module:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "last": ColwiseParallel(output_layouts=Replicate())}
    model = parallelize_module(Blocks(), square["inner"], plan)
    for layer in (model.up, model.down, model.last):
        fully_shard(layer, mesh=square["outer"])
    return fully_shard(model, mesh=square["outer"])


# How a model is made, its input on each rank, and which ranks' inputs its gradients are the mean over.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Tensor], Callable[[int], int], int]] = {
    "fsdp": (lambda: fsdp(line), images, lambda rank: rank, PROCESSES),
    "hybrid": (lambda: fsdp(square), images, lambda rank: rank, PROCESSES),
    "tensor_parallel": (lambda: tensor_parallel(line), tokens, lambda rank: 0, 1),
    "fsdp_and_tensor_parallel": (fsdp_and_tensor_parallel, tokens, lambda rank: rank // 2, 2),
}
if not FSDP2_RUNS_ON_CPU:
    MODELS = {"tensor_parallel": MODELS["tensor_parallel"]}
STEPS = 2


def trained(name: str, way: str) -> dict[str, Any]:
    """The weights of a model after each step, with a method called or attached."""
    make, inputs, shard_of, _ = MODELS[name]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, foreach=False)
    methods = {"zscore": ZScore(), "adaptive": ZScore(centering="adaptive"), "centralized": Centralization()}
    call, _, method = way.partition(" ")
    if call == "attached":
        attach(optimizer, methods[method])
    record: dict[str, Any] = {"weights": [], "placements": set()}
    for step in range(STEPS + 1):
        record["weights"].append({key: full(param.detach()).clone() for key, param in model.named_parameters()})
        if step < STEPS:
            optimizer.zero_grad()
            output = model(inputs(shard_of(dist.get_rank()), step))
            loss_of(full(output)).backward()
            grads = [param.grad for param in model.parameters()]
            record["placements"] |= {str(grad.placements) for grad in grads if isinstance(grad, DTensor)}
            if call == "called":
                METHODS[method](list(model.parameters()))
            optimizer.step()
    return record


def scaled(overflow: bool) -> dict[str, Any]:
    """FSDP2 under a GradScaler. In the second step, one rank's gradients are infinite."""
    model = fsdp(line).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, foreach=False)
    attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    record: dict[str, Any] = {"weights": [], "scales": []}
    for step in range(STEPS + 1):
        record["weights"].append({key: full(param.detach()).clone() for key, param in model.named_parameters()})
        record["scales"].append(scaler.get_scale())
        if step < STEPS:
            optimizer.zero_grad()
            loss = loss_of(model(images(dist.get_rank(), step).float()))
            scaler.scale(loss * (1e38 if overflow and step == 1 and dist.get_rank() == 2 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
    return record


def scenarios() -> dict[str, dict[str, Callable[[], Any]]]:
    """Return all scenarios, by the group of those that run one after the other in the same processes."""
    groups: dict[str, dict[str, Callable[[], Any]]] = {
        f.__name__: {f"{f.__name__} {method}": partial_of(f, method) for method in METHODS}
        for f in (one_by_one, together)
    }
    small = (shared_memory, the_same_twice, in_flight, missing, frozen_later, submesh)
    groups["small"] = {f"{f.__name__} {method}": partial_of(f, method) for f, method in product(small, METHODS)}
    groups["small"]["refused"] = refused
    groups["counted"] = {
        f"counted {method} {count} {'sharded' if sharded else 'whole'}": partial_of(counted, method, count, sharded)
        for method, count, sharded in product(METHODS, (44, 440), (True, False))
    }
    for name in MODELS:
        ways = ("called zscore", "attached zscore", "attached centralized")
        groups[name] = {f"{name} {way}": partial_of(trained, name, way) for way in ways}
    if FSDP2_RUNS_ON_CPU:
        groups["scaled"] = {"scaled": partial_of(scaled, False), "overflow": partial_of(scaled, True)}
    return groups


def run(group: str, names: Sequence[str]) -> dict[str, Any]:
    """Return what becomes of one of four processes' gradients in some scenarios of a group."""
    global line, square
    warnings.filterwarnings("ignore", message="DTensor random operators may not|FSDP2-wrapped module")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # of how full_tensor() does it
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    line = init_device_mesh("cpu", (PROCESSES,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    records = {}
    for name in names:
        print(f"scenario {name}", flush=True)
        records[name] = scenarios()[group][name]()
    dist.barrier()  # gloo aborts a process whose partner has left in mid-talk
    return records
