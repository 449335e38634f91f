"""The warning of parameters in whose gradients the mean dominates, which methods that centre would subtract."""

from collections.abc import Iterable, Mapping

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_znorm.arguments import listed
from lightning_znorm.callbacks.base import GradientCallback
from lightning_znorm.callbacks.monitor_history import GradientHistory
from lightning_znorm.gradients import SING, Centralization, GradientMethod, ZScore
from lightning_znorm.gradients.slots import GradientSlot

DOMINATING_SHARE = 0.9
"""Share of the mean in a squared gradient above which the callback names the parameter."""
_ENOUGH_ELEMENTS = 16  # of a parameter, whose share may else be a matter of luck


def name_dominating_means(
    label: str, history: GradientHistory, slot_of: Mapping[int, GradientSlot], callbacks: Iterable[object]
) -> None:
    """Name the parameters in whose gradients the mean dominates: in a warning if a callback subtracts it.

    Args:
        label: The name of the monitor.
        history: What was measured.
        slot_of: The slots of the model's parameters, by their rows in the history.
        callbacks: The Trainer's callbacks.
    """
    shares = history.trusted_shares(_ENOUGH_ELEMENTS)
    order = shares.nan_to_num(0.0).argsort(descending=True).tolist()
    rows = [row for row in order if shares[row] > DOMINATING_SHARE]
    if not rows:
        return
    centring = [callback for callback in callbacks if isinstance(callback, GradientCallback)]

    def is_centred(row: int) -> bool:
        slot = slot_of.get(row)
        return slot is not None and any(
            _subtracts_mean(callback.applied_method, slot) and callback.parameter_filter.matches(slot)
            for callback in centring
        )

    centred = [row for row in rows if is_centred(row)]
    found = [f"{history.names[row]} ({shares[row]:.2f})" for row in centred or rows]
    fact = f"{label}: the mean holds more than {DOMINATING_SHARE} of the squared gradient of {listed(found)}."
    if centred:
        rank_zero_warn(
            f"{fact} It is subtracted there, and little of the direction remains: use ZNormCallback("
            'centering="adaptive"), or leave these parameters out (exclude)'
        )
    else:
        rank_zero_info(f"{fact} No callback is known to subtract it; ZNorm with full centring would.")


def _subtracts_mean(method: GradientMethod | None, slot: GradientSlot) -> bool:
    """Return whether a method subtracts the mean of a whole gradient. Those that centre rows do if there is one row."""
    if isinstance(method, (Centralization, SING)):
        return slot.shape is not None and len(slot.shape) > 1 and slot.shape[0] == 1
    return isinstance(method, ZScore) and method.centering == "full"
