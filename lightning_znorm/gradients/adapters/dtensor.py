"""Gradients that are DTensors: those of FSDP2, of tensor parallelism, and of both."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from lightning_znorm.gradients.errors import UnsupportedGradientError, missing, untested_torch
from lightning_znorm.gradients.shards import BoxShard, Shard
from lightning_znorm.gradients.shared_memory import has_internal_overlap


def check_dtensors() -> None:
    """Makes sure that DTensors of this release of torch tell what is asked of them.

    Raises:
        UnsupportedGradientError: If not.
    """
    needs: Sequence[tuple[object, Sequence[str]]] = [
        (DTensor, ("device_mesh", "from_local", "placements", "to_local")),
        (DeviceMesh, ("get_coordinate", "get_group", "size")),
        (Placement, ("is_partial", "is_replicate")),
        (ShardPlacement(0), ("dim",)),
        (Partial(), ("reduce_op",)),
    ]
    for owner, names in needs:
        if what := missing(owner, names):
            raise untested_torch(what)


def is_async(tensor: Tensor) -> bool:
    """Whether a tensor is the result of a collective that may still be running, and is waited for when it is read."""
    return isinstance(tensor, AsyncCollectiveTensor)


def is_dtensor(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, DTensor)


def find_dtensor(parameter: Tensor, name: str) -> Tensor | Shard | None:
    """The gradient of a parameter of which one or the other is a DTensor: see :meth:`GradientSlot.find`.

    Raises:
        UnsupportedGradientError: If it stands for something that the processes have yet to work out together, other
            than a sum or a mean (see :func:`replicate_partial_grads_`).
    """
    grad = parameter.grad
    tensor = parameter if grad is None else grad
    assert is_dtensor(tensor)
    mesh = tensor.device_mesh
    if mesh.get_coordinate() is None or (grad is None and not parameter.requires_grad):
        return None
    cuts = {}
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_replicate() or mesh.size(mesh_dim) == 1:
            continue
        # By its attribute, because torch's releases disagree on which class a strided shard derives from.
        dim = getattr(placement, "dim", None)
        if dim is None:
            raise UnsupportedGradientError(
                f"the gradient of {name} is neither whole nor sharded, but stands for {placement!r} over processes, "
                "and only sums and means are taken here: redistribute it first (`DTensor.redistribute`), or leave this "
                "parameter out"
            )
        cuts[mesh.get_group(mesh_dim)] = dim % tensor.ndim
    local = _memory(tensor)
    if grad is not None and has_internal_overlap(local):
        # An expanded gradient, for one, cannot be written to.
        local = local.clone(memory_format=torch.contiguous_format)
        parameter.grad = _dtensor(local, tensor, tensor.placements)
    if not cuts:
        return None if grad is None else local
    return BoxShard(
        local=None if grad is None else local,
        shape=tensor.shape,
        device=local.device,
        is_complex=local.is_complex(),
        rows=len(local),
        cuts=cuts,
    )


@torch.no_grad()
def replicate_partial_grads_(parameters: Iterable[Tensor]) -> None:
    """Takes the sums over ranks that gradients stand for (``Partial``), those of all parameters of a group together.

    The gradients stay the same, and no optimizer has to do it one by one. Sequence parallelism leaves such gradients.
    Those that stand for anything but sums and means are left for :func:`find_dtensor` to refuse.
    """
    summands: defaultdict[tuple[ProcessGroup, torch.device, torch.dtype, str], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        grad = parameter.grad
        if not is_dtensor(grad) or not any(placement.is_partial() for placement in grad.placements):
            continue
        mesh, placements = grad.device_mesh, list(grad.placements)
        if mesh.get_coordinate() is None or not all(map(_can_be_replicated, placements)):
            continue
        local = _memory(grad)
        if not local.is_contiguous():  # which may mean that elements share memory
            local = local.clone(memory_format=torch.contiguous_format)
        for mesh_dim, placement in enumerate(placements):
            if isinstance(placement, Partial):
                placements[mesh_dim] = Replicate()
                if mesh.size(mesh_dim) > 1:
                    group = mesh.get_group(mesh_dim)
                    summands[group, local.device, local.dtype, placement.reduce_op].append(local)
        parameter.grad = _dtensor(local, grad, placements)
    for (group, _, _, reduce_op), tensors in summands.items():
        together = torch.cat([tensor.view(-1) for tensor in tensors])
        torch.distributed.all_reduce(together, group=group)
        if reduce_op == "avg":  # which gloo does not have
            together /= group.size()
        for tensor, total in zip(tensors, torch.split(together, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


def _can_be_replicated(placement: Placement) -> bool:
    """Whether a placement is none that stands for something, or one that stands for a sum or a mean."""
    return not placement.is_partial() or (type(placement) is Partial and placement.reduce_op in ("sum", "avg"))


def _memory(tensor: DTensor) -> Tensor:
    """The local part, complete, and not a copy."""
    with torch.no_grad():
        local = tensor.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def _dtensor(local: Tensor, like: DTensor, placements: Sequence[Placement]) -> DTensor:
    """A DTensor of the size of another, on its mesh."""
    mesh, shape, stride = like.device_mesh, like.shape, like.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
