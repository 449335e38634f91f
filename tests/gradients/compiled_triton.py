"""Compiles the Triton programs for an H100 or H200, which takes no GPU, and prints their loads and stores.

Run by test_triton.py.
"""

import collections
import inspect
import json
import re

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compiled

from lightning_znorm.gradients.kernels import triton, triton_programs

TABLES = {"addresses", "segments", "items"}
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
    ptx = compiled(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return collections.Counter(re.findall(r"\b(?:ld|st)\.(?:global|local)[.\w]*", ptx))


if __name__ == "__main__":
    found = {
        f"{name} {dtype} {'rows' if by_row else 'tensors'}": memory_instructions(name, dtype, by_row)
        for name in ("first_pass", "second_pass")
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
        for by_row in (False, True)
        if not by_row or dtype == torch.float32
    }
    print(json.dumps(found))
