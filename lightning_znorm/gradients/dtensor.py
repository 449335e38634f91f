"""Gradients that are DTensors: those of FSDP2, of tensor parallelism, and of both."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import AsyncCollectiveTensor  # torch has no public name for it
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from lightning_znorm.gradients.exceptions import UnsupportedGradientError, missing_attributes, untested_torch
from lightning_znorm.gradients.shards import BoxShard, Shard
from lightning_znorm.gradients.shared_memory import has_internal_overlap


def check_dtensors() -> None:
    """Check that DTensors of this release of torch have the attributes that are used here.

    Raises:
        UnsupportedGradientError: If they lack one.
    """
    needs: Sequence[tuple[object, Sequence[str]]] = [
        (DTensor, ("device_mesh", "from_local", "placements", "to_local")),
        (DeviceMesh, ("get_coordinate", "get_group", "size")),
        (Placement, ("is_partial", "is_replicate")),
        (ShardPlacement(0), ("dim",)),
        (Partial(), ("reduce_op",)),
    ]
    for owner, names in needs:
        if what := missing_attributes(owner, names):
            raise untested_torch(what)


def is_async(tensor: Tensor) -> bool:
    """Return whether a tensor is the result of a collective that may still be running. Reading it waits for that."""
    return isinstance(tensor, AsyncCollectiveTensor)


def is_dtensor(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    return isinstance(tensor, DTensor)


def read_dtensor(parameter: Tensor, name: str) -> Tensor | Shard | None:
    """Return the gradient of a parameter, where the parameter or the gradient is a DTensor.

    Args:
        parameter: The parameter.
        name: Its name, for messages.

    Returns:
        The unsharded gradient, or this process' shard of it, or ``None`` if no process has a gradient.

    Raises:
        UnsupportedGradientError: If the gradient is ``Partial``. Sums and means are all-reduced before, by
            :func:`replicate_partial_grads_`.
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
        # By its attribute, because the class that a strided shard derives from differs between releases of torch.
        dim = getattr(placement, "dim", None)
        if dim is None:
            raise UnsupportedGradientError(
                f"the gradient of {name} is neither replicated nor sharded, but {placement!r} over processes, and "
                "only sums and means are reduced before a method: redistribute it first (`DTensor.redistribute`), or "
                "leave this parameter out"
            )
        cuts[mesh.get_group(mesh_dim)] = dim % tensor.ndim
    local = _local(tensor)
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
    """All-reduce ``Partial`` gradients, with one collective for each process group, device, dtype and operation.

    Sequence parallelism leaves such gradients. Their values stay the same, and the optimizer does not have to reduce
    them one by one. Gradients that are ``Partial`` by another operation than a sum or a mean stay as they are;
    :func:`read_dtensor` refuses them.
    """
    summands: defaultdict[tuple[ProcessGroup, torch.device, torch.dtype, str], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        grad = parameter.grad
        if not is_dtensor(grad) or not any(placement.is_partial() for placement in grad.placements):
            continue
        mesh, placements = grad.device_mesh, list(grad.placements)
        if mesh.get_coordinate() is None or not all(map(_is_reducible, placements)):
            continue
        local = _local(grad)
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


def _is_reducible(placement: Placement) -> bool:
    """Return whether a placement is not ``Partial``, or is by a sum or a mean."""
    return not placement.is_partial() or (type(placement) is Partial and placement.reduce_op in ("sum", "avg"))


def _local(tensor: DTensor) -> Tensor:
    """Return the local part, complete, and not a copy."""
    with torch.no_grad():
        local = tensor.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def _dtensor(local: Tensor, like: DTensor, placements: Sequence[Placement]) -> DTensor:
    """Return a DTensor of the size of another, on its mesh."""
    mesh, shape, stride = like.device_mesh, like.shape, like.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
