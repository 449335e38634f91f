"""Compiles the Triton programs for an H100 or H200, which takes no GPU.

It prints the loads and stores of those that rewrite gradients, and how many programs the comparison with PyTorch's
kernel would launch, all of which compile. Run by test_triton.py.
"""

import collections
import inspect
import json
import re
from collections.abc import Callable
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compiled

from lightning_znorm.gradients.kernels import triton, triton_check, triton_programs

TABLES = {"addresses", "segments", "items"}
TARGET = GPUTarget("cuda", 90, 32)
# Triton 3.2 has another name for it.
CONSTANTS = "constexprs" if "constexprs" in inspect.signature(ASTSource).parameters else "constants"


def memory_instructions(name: str, dtype: torch.dtype, by_row: bool) -> dict[str, int]:
    """Count the loads and stores of a pass that rewrites tensors by ZScore, or rows by Centralization."""
    program = getattr(triton_programs, name)
    plan = triton._launch_plan((torch.Size((2, 9)) if by_row else 9,), dtype, torch.device("cpu"))
    constants = dict(plan.constants)
    options = {option: constants.pop(option) for option in triton._OPTIONS}
    constants |= {"FINISH": True, "NEEDS_STD": not by_row, "EPS": 1e-10, "LONG": plan.long, "MAX_CHUNKS": 512}
    statistics = "*fp64" if dtype == torch.float64 else "*fp32"
    types = dict.fromkeys(program.arg_names, "constexpr")
    types |= dict.fromkeys(types.keys() & TABLES, "*i64") | {"partials": statistics}
    values = {parameter: constants.get(parameter) for parameter, type_ in types.items() if type_ == "constexpr"}
    source = ASTSource(program, {parameter: types[parameter] for parameter in program.arg_names}, **{CONSTANTS: values})
    ptx = compiled(source, target=TARGET, options=options).asm["ptx"]
    return collections.Counter(re.findall(r"\b(?:ld|st)\.(?:global|local)[.\w]*", ptx))


class Compiled:
    """In place of a program: compiles it for what it would be launched with, and launches nothing."""

    seen: ClassVar[set[str]] = set()

    def __init__(self, program: Any) -> None:
        self._program = program

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return self._compile

    def _compile(self, *arguments: Any, **options: Any) -> None:
        values = dict(zip(self._program.arg_names, arguments, strict=False))
        values |= {name: options.pop(name) for name in self._program.arg_names if name in options}
        types = {
            name: f"*{'i64' if value.dtype == torch.int64 else f'fp{8 * value.dtype.itemsize}'}"
            if isinstance(value, torch.Tensor)
            else "constexpr"
            for name, value in values.items()
        }
        constants = {name: values[name] for name, type_ in types.items() if type_ == "constexpr"}
        if (key := f"{self._program.fn.__name__} {types} {constants}") not in self.seen:
            self.seen.add(key)
            compiled(ASTSource(self._program, types, **{CONSTANTS: constants}), target=TARGET, options=options)


def programs_of_comparison(dtypes: list[torch.dtype]) -> int:
    """Compile the programs that a comparison launches, and return how many there are."""
    with patch.object(triton_check, "_compare"):
        for name in ("first_pass", "merge", "second_pass"):
            setattr(triton_programs, name, Compiled(getattr(triton_programs, name)))
        for dtype in dtypes:
            for by_row in (False, True):
                triton_check.check_kind(torch.device("cpu"), dtype, by_row)
    return len(Compiled.seen)


if __name__ == "__main__":
    found = {
        f"{name} {dtype} {'rows' if by_row else 'tensors'}": memory_instructions(name, dtype, by_row)
        for name in ("first_pass", "second_pass")
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
        for by_row in (False, True)
        if not by_row or dtype == torch.float32
    }
    print(json.dumps({"loads and stores": found, "comparison": programs_of_comparison([torch.float32])}))
