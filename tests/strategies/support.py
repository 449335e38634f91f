"""What is supported: each strategy with each precision, or why not."""

from typing import NamedTuple

PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")


class Support(NamedTuple):
    """Whether a strategy is supported with a precision."""

    works: bool
    note: str = ""


YES = Support(True)
REFUSED = Support(False, "refused by Lightning")

# The kinds of scenarios, under the names that the README gives them.
NAMES = {
    "single device": "single device",
    "DDP": "`ddp`",
    "FSDP": "`fsdp`",
    "FSDP2, TP": "`ModelParallelStrategy`",
    "DeepSpeed": "`deepspeed`",
}
SUPPORT: dict[str, dict[str, Support]] = {
    "single device": dict.fromkeys(PRECISIONS, YES),
    "DDP": dict.fromkeys(PRECISIONS, YES),
    "FSDP": dict.fromkeys(PRECISIONS, YES) | {"64-true": REFUSED},
    "FSDP2, TP": dict.fromkeys(PRECISIONS, YES) | {"64-true": REFUSED, "16-mixed": REFUSED},
    "DeepSpeed": {
        "32-true": YES,
        "64-true": REFUSED,
        "bf16-true": YES,
        "16-true": Support(True, "ZeRO 1 to 3"),
        "bf16-mixed": YES,
        "16-mixed": Support(True, "ZeRO 1 to 3"),
    },
}


def readme_table() -> str:
    """The table as the README shows it."""
    rows = [
        ["strategy", *(f"`{precision}`" for precision in PRECISIONS)],
        ["---"] * (1 + len(PRECISIONS)),
        *([NAMES[kind], *(_cell(row[precision]) for precision in PRECISIONS)] for kind, row in SUPPORT.items()),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(support: Support) -> str:
    return (support.note or "yes") if not support.works or not support.note else f"yes, {support.note}"
