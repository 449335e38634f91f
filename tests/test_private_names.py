"""Private names of other packages: each is listed here with its reason, and a release without it fails by name.

A name that starts with an underscore may go in any release of torch, Lightning or another package. So the package uses
few of them. `NAMES` lists each one with the place where its owner defines it, and why there is no public way.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import lightning_znorm

PACKAGE = Path(lightning_znorm.__file__).parent
PRIVATE = re.compile(r"_[A-Za-z]\w*")

FLAT_PARAM = "torch.distributed.fsdp._flat_param"
NO_FSDP1 = "FSDP 1 does not tell in public how it shards the gradients of its flat parameters"
FOREACH = "torch has no public way to update many tensors in one launch"
HOOKS = "torch has no public way to ask which hooks an optimizer runs"

# By name: where it is defined (a module, or a class in it), and why it is used.
NAMES: dict[str, tuple[str, str]] = {
    # Lightning
    "_SubprocessScriptLauncher": (
        "lightning.pytorch.strategies.launchers",
        "only this launcher runs the command again in each process, and no public attribute says so",
    ),
    "_batches_that_stepped": (
        "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop",
        "loggers count steps by it, and it has no public name",
    ),
    "_data_source": (
        "lightning.pytorch.loops.fit_loop:_FitLoop",
        "before `setup` has ended, no public name leads to the loader of the training batches",
    ),
    "_generate_state_key": ("lightning.pytorch:Callback", "callbacks make the key of their state by it"),
    "_is_in_bad_fork": ("torch.cuda", "torch has no public way to ask whether CUDA can start in a copy of a process"),
    "_logger_connector": ("lightning.pytorch:Trainer", "only it tells whether a value may be logged now"),
    "_parse_ckpt_path": (
        "lightning.pytorch.cli:LightningCLI",
        "there is no public hook between parsing and the settings that Lightning takes from a checkpoint",
    ),
    "_set_hparams": (
        "lightning.pytorch.core.mixins:HyperparametersMixin",
        "`save_hyperparameters` reads its caller's frame, so it cannot be overridden",
    ),
    "_skip_backward": (
        "lightning.pytorch.loops.fit_loop:_FitLoop",
        "StochasticWeightAveraging takes steps without gradients by it",
    ),
    "_trainer": (
        "lightning.pytorch:LightningModule",
        "the public `trainer` raises without a Trainer, and gives a stand-in under Fabric",
    ),
    # Python
    "_exit": ("os", "it is documented, and ends a fork without what Python does at the end of a process"),
    # argparse and jsonargparse
    "_option_string_actions": ("argparse:ArgumentParser", "a parser does not list its flags in public"),
    "_subcommands_action": ("jsonargparse:ArgumentParser", "a parser does not list its subcommands in public"),
    # matplotlib
    "_repr_png_": ("matplotlib.colors:Colormap", "a notebook asks an object for its picture by this name"),
    # torchmetrics
    "_plot": ("torchmetrics:Metric", "every metric of torchmetrics implements `plot` by it"),
    "_computed": ("torchmetrics:Metric", "a converted metric must keep the precision of its cached value"),
    "_defaults": ("torchmetrics:Metric", "a converted metric must keep the precision of its reset values"),
    # torch
    "_apply": ("torch.nn:Module", "all conversions of a module call it, and there is no public hook"),
    "_version": ("torch:Tensor", "it counts the in-place changes of a tensor, without reading its values"),
    "_cdata": ("torch:UntypedStorage", "it identifies a storage on every device, also one without an address"),
    "_debug_has_internal_overlap": ("torch", "it tells whether elements of a tensor share memory"),
    "_device_types": ("torch.distributed:ProcessGroup", "a group does not tell in public which devices it can reach"),
    "_foreach_add_": ("torch", FOREACH),
    "_foreach_copy_": ("torch", FOREACH),
    "_foreach_mul_": ("torch", FOREACH),
    "_foreach_norm": ("torch", FOREACH),
    "_functional_collectives": ("torch.distributed", "DTensors are all-reduced by these collectives alone"),
    "_optimizer_step_pre_hooks": ("torch.optim:Optimizer", HOOKS),
    "_optimizer_step_post_hooks": ("torch.optim:Optimizer", HOOKS),
    "_overlap_with_ddp": (
        "torch.distributed.optim:ZeroRedundancyOptimizer",
        "an optimizer that steps in the backward pass must be refused",
    ),
    "_step_supports_amp_scaling": ("torch.optim:Adam", "GradScaler asks by it whether an optimizer unscales itself"),
    "_get_scale_async": ("torch.amp:GradScaler", "the public `get_scale` waits for the device"),
    "_per_optimizer_states": ("torch.amp:GradScaler", "a GradScaler does not tell in public what it has unscaled"),
    "_orig_mod": ("torch._dynamo.eval_frame:OptimizedModule", "torch.compile puts it into names of parameters"),
    "_checkpoint_wrapped_module": (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "activation checkpointing puts it into names of parameters",
    ),
    "_fsdp_wrapped_module": ("torch.distributed.fsdp._common_utils", "FSDP puts it into names of parameters"),
    "_flat_param": ("torch.distributed.fsdp", NO_FSDP1),
    "_common_utils": ("torch.distributed.fsdp", NO_FSDP1),
    "_is_fsdp_flattened": ("torch.distributed.fsdp._common_utils", NO_FSDP1),
    "_set_fsdp_flattened": (FLAT_PARAM, NO_FSDP1),
    "_handle": ("torch.distributed.fsdp._common_utils:_FSDPState", NO_FSDP1),
    "_fully_sharded_module": (f"{FLAT_PARAM}:FlatParamHandle", NO_FSDP1),
    "_contiguities": (f"{FLAT_PARAM}:FlatParameter", NO_FSDP1),
    "_fqns": (f"{FLAT_PARAM}:FlatParameter", NO_FSDP1),
    "_param_extensions": (f"{FLAT_PARAM}:FlatParameter", NO_FSDP1),
    "_params": (f"{FLAT_PARAM}:FlatParameter", NO_FSDP1),
    "_shapes": (f"{FLAT_PARAM}:FlatParameter", NO_FSDP1),
    "_shard_param_infos": (f"{FLAT_PARAM}:FlatParameter", NO_FSDP1),
    "_shared_param_infos": (f"{FLAT_PARAM}:FlatParameter", NO_FSDP1),
    "_strides": (f"{FLAT_PARAM}:FlatParameter", NO_FSDP1),
    "_MEM_FORMAT_ENCODING": (
        "torch.distributed.checkpoint.metadata",
        "the index of a sharded checkpoint names it, and must be read without running code",
    ),
    "_StorageInfo": (
        "torch.distributed.checkpoint.filesystem",
        "the index of a sharded checkpoint names it, and must be read without running code",
    ),
    "_get_layout": (
        "torch.serialization",
        "the index of a sharded checkpoint names it, and must be read without running code",
    ),
    # DeepSpeed
    "_zero_padding": (
        "deepspeed.runtime.zero.stage_1_and_2",
        "DeepSpeed marks by it what it adds to the gradients of a rank",
    ),
}


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def is_override(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(ast.unparse(each) == "override" for each in node.decorator_list)


def definitions(tree: ast.AST) -> Iterator[str]:
    """Names that a file defines itself: functions, classes, variables, fields and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not is_override(node):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def uses(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Private names that a file uses: attributes, also by `getattr` and `hasattr`; imports; and overridden methods."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("lightning_znorm"):
            names = [*str(node.module).split("."), *(each.name for each in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for each in node.names for part in each.name.split(".")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "attrgetter"):
            names = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        elif is_override(node):
            names = [node.name]  # type: ignore[attr-defined]
        yield from ((name, node.lineno) for name in names if PRIVATE.fullmatch(name))  # type: ignore[attr-defined]


def strings(tree: ast.AST) -> set[str]:
    """Parts of all texts that look like a name, or like a path of names."""
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {part for text in texts if re.fullmatch(r"[\w.]+", text) for part in text.split(".")}


def test_each_private_name_is_listed() -> None:
    own = {name for tree in trees().values() for name in definitions(tree)}
    missing = [
        f"{path.relative_to(PACKAGE)}:{line} uses {name}"
        for path, tree in trees().items()
        for name, line in uses(tree)
        if name not in own and name not in NAMES
    ]
    assert missing == [], "list these private names of other packages in NAMES, with the reason, or find a public way"


def test_each_listed_name_is_used() -> None:
    found = {name for tree in trees().values() for name, _ in uses(tree)}
    found |= {part for tree in trees().values() for part in strings(tree)}
    assert [name for name in NAMES if name not in found] == [], "nothing uses these names any more: take them out"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_still_there(name: str) -> None:
    where, why = NAMES[name]
    module, _, inner = where.partition(":")
    if module.startswith("deepspeed"):
        pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install deepspeed")
    try:
        owner: Any = importlib.import_module(module)
        owner = getattr(owner, inner) if inner else owner
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{where}, in which {name} is used because {why}, is gone: {error}")
    assert hasattr(owner, name) or is_in_source(owner, name), f"{where} has no {name}, which is used because {why}"


def is_in_source(owner: Any, name: str) -> bool:
    """Whether a class sets an attribute in its code, or in that of a base; or a module names it in a text."""
    owners = owner.__mro__[:-1] if isinstance(owner, type) else [owner]
    found = False
    for each in owners:
        try:
            source = inspect.getsource(each)
        except (OSError, TypeError):  # written in C
            continue
        found |= re.search(rf"\b{name}\b", source) is not None
    return found


# The rooms of the package: in none of them does a file use a private name of another file.
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists())


@pytest.mark.parametrize("room", ROOMS)
def test_no_private_name_of_another_file(room: str) -> None:
    for path, tree in trees().items():
        if path.relative_to(PACKAGE).parts[0] != room:
            continue
        imported = [
            each.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lightning_znorm")
            for each in node.names
            if PRIVATE.fullmatch(each.name)
        ]
        assert imported == []
        defined = set(definitions(tree))
        others = {name for other, tree in trees().items() if other != path for name in definitions(tree)}
        foreign = [(name, line) for name, line in uses(tree) if name not in defined and name not in NAMES]
        assert [f"{path}:{line} uses {name}" for name, line in foreign if name in others] == []
