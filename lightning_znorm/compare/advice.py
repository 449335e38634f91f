"""What to try where all methods ran with one learning rate, and some of them usually need another."""

import re
from collections.abc import Mapping, Sequence

from lightning_znorm.compare.settings import scales_gradients, values_by_path
from lightning_znorm.compare.study import Plan

_LOWER = 1e-3
"""Usual learning rates of SGD with gradients of unit size, as a share of those without (docs/methods/index.md)."""


def advise(plan: Plan, optimizers: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a sentence on each method that ran with the first method's SGD, and usually needs another learning rate.

    Args:
        plan: The study.
        optimizers: The optimizers of each method, as its runs recorded them.
    """
    first, *others = plan.study.files
    shared = optimizers.get(first)
    if plan.study.sweep or not shared or not all(text.startswith("SGD(") for text in shared):
        return []
    methods = [
        method for method in others if optimizers.get(method) == shared and scales_gradients(plan.settings[method])
    ]
    if not methods or scales_gradients(plan.settings[first]):
        return []
    names = " and ".join([", ".join(methods[:-1]), methods[-1]] if len(methods) > 1 else methods)
    return [
        f"Under SGD, the usual learning rates of {names} are about a thousand times lower than without a method, "
        f"because every gradient has unit size then, and here they ran with {first}'s. {_what_to_try(plan, shared[0])}"
    ]


def _what_to_try(plan: Plan, optimizer: str) -> str:
    found = re.search(r"\blr=([^,;)]+)", optimizer)
    settings = plan.settings[next(iter(plan.study.files))]
    keys = [key for key in values_by_path(settings) if key.rpartition(".")[2] == "lr"]
    if found is None or len(keys) != 1:
        return "Try several with --sweep."
    rate = float(found[1])
    rates = " ".join(f"{rate * share:g}" for share in (_LOWER, _LOWER * 10, _LOWER * 100, 1))
    return f"Try --sweep {keys[0]} {rates}"
