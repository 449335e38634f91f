"""Warn of optimizer steps on which a gradient callback has no effect: past Lightning's hook, or without gradients."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_znorm.callbacks.steps import unwrapped
from lightning_znorm.functional import attached_optimizers
from lightning_znorm.gradients.adapters import GradientAdapter
from lightning_znorm.gradients.optimizers import is_nested_step
from lightning_znorm.gradients.slots import GradientSlot, ParameterFilter, ParameterSlot, clean_name

FIRST_STEPS = 10
"""A warning comes after this many steps without an effect, or at the end of an epoch with fewer."""

_OUT_OF_REACH = (
    "An optimizer that steps inside the backward pass, or computes its gradients in `step`, leaves none for "
    "Lightning's hook: use an optimizer that takes them from `parameter.grad`, or call `lightning_znorm.functional` "
    "where the optimizer has them."
)
_MAX_NAMED = 3  # optimizers that a message names


@dataclass(eq=False)
class _StepCounts:
    """What is known about the steps of one optimizer.

    Attributes:
        name: The name of the optimizer in messages.
        is_hooked: Whether Lightning's hook has been called since the last step.
        is_hooked_in_epoch: Whether Lightning's hook has been called in this epoch.
        is_ever_hooked: Whether Lightning's hook has been called in this training.
        missed: Number of steps with gradients, but without a call of Lightning's hook.
        searched: Number of steps before which the callback looked for gradients.
        next_check: Value of ``searched`` at which to check these numbers again.
        backwards: Number of backward passes before the last step that counts in ``searched``.
        had_gradients: Whether there were gradients before the step that is running.
        is_settled: Whether gradients have been found, or a warning has said that there are none.
        is_reported: Whether a warning has said that steps are missed.
    """

    name: str
    is_hooked: bool = False
    is_hooked_in_epoch: bool = False
    is_ever_hooked: bool = False
    missed: int = 0
    searched: int = 0
    next_check: int = FIRST_STEPS
    backwards: int = 0
    had_gradients: bool = False
    is_settled: bool = False
    is_reported: bool = False


class MissedSteps:
    """Count the steps of a training's optimizers, and warn once of each optimizer on which a callback has no effect.

    Steps are counted until every optimizer and every ``include`` pattern has met a gradient, which is normally the
    first step. After that, only steps that bypass Lightning are looked for: by hooks that are registered with the
    optimizers; and, for parameters for which Lightning's hook is not called, by torch's count of how often a tensor has
    been written.

    Args:
        callback: The name of the callback, for messages.
        action: What the callback does with gradients, such as "transformed".
        advice: What to do about steps that bypass Lightning.
        parameter_filter: Chooses the parameters that take part.
        adapter: Knows where the strategy keeps gradients.
        is_handled_elsewhere: Returns whether something else processes the gradients of an optimizer as the callback
            would.
        is_finetuned: Whether parameters that do not train now will train later.
    """

    def __init__(
        self,
        callback: str,
        action: str,
        advice: str,
        parameter_filter: ParameterFilter,
        adapter: GradientAdapter,
        is_handled_elsewhere: Callable[[Optimizer], bool],
        is_finetuned: bool,
    ) -> None:
        self.backwards = 0
        self._callback = callback
        self._action = action
        self._advice = advice
        self._filter = parameter_filter
        self._adapter = adapter
        self._is_handled_elsewhere = is_handled_elsewhere
        self._is_finetuned = is_finetuned
        self._steps: dict[Any, _StepCounts] = {}
        self._handles: list[RemovableHandle] = []
        self._unmet = list(parameter_filter.include)
        # Of this epoch, by the parameter's id: parameters for which Lightning's hook has not been called; those of them
        # that have had a gradient; and those that have been written in a batch.
        self._unstepped: dict[int, ParameterSlot] = {}
        self._had_gradient: set[int] = set()
        self._written: set[int] = set()
        self._versions: dict[int, int] = {}
        self._looks_for_written = True  # until a warning has said why there are no gradients

    def start(self, optimizers: Iterable[Any]) -> None:
        """Watch the optimizers of a training, and warn if they step nothing."""
        self.watch(optimizers)
        if not any(True for optimizer in self._steps for _ in self._adapter.slots_of(optimizer)):
            self._unmet = []
            if not self._is_finetuned:
                self._warn(
                    "`configure_optimizers` gives Lightning no optimizer with parameters, so no gradient will be "
                    f"{self._action}. {self._advice}"
                )

    def watch(self, optimizers: Iterable[Any]) -> None:
        """Begin to watch new optimizers."""
        for number, optimizer in enumerate(map(unwrapped, optimizers)):
            if optimizer in self._steps:
                continue
            name = f"optimizer {number} ({type(optimizer).__name__})"
            steps = self._steps[optimizer] = _StepCounts(name)
            # An optimizer that wraps another one may not have called torch's __init__, or not be one of torch's.
            if hasattr(optimizer, "_optimizer_step_post_hooks"):
                enter, leave = map(
                    torch.compiler.disable, (self._enter, self._leave)
                )  # `is_nested_step` reads the call stack
                self._handles += [
                    optimizer.register_step_pre_hook(partial(enter, optimizer, steps)),
                    optimizer.register_step_post_hook(partial(leave, optimizer, steps)),
                ]

    def close(self) -> None:
        """Remove the hooks from the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def start_epoch(self, optimizers: Iterable[Any]) -> None:
        """Begin an epoch. Optimizers may have been replaced before it."""
        self.watch(optimizers)
        for steps in self._steps.values():
            steps.is_hooked_in_epoch = False
        self._had_gradient, self._written = set(), set()
        self._unstepped = {}
        if self._looks_for_written:
            registered = (slot for slot in self._adapter.slots() if self._filter.matches(slot))
            for slot in (*registered, *self._slots_of(*self._steps)):
                if isinstance(slot, ParameterSlot) and _counts_writes(slot):
                    self._unstepped[id(slot.parameter)] = slot

    def start_batch(self) -> None:
        """Begin a batch. Earlier writes do not count, because they may not be an optimizer's."""
        self._versions = {number: slot.parameter._version for number, slot in self._unstepped.items()}

    def end_batch(self) -> None:
        """Find out which parameters have been written in a batch."""
        self.look_for_gradients()
        for number, slot in self._unstepped.items():
            if self._versions.get(number, slot.parameter._version) != slot.parameter._version:
                self._written.add(number)

    def look_for_gradients(self) -> None:
        """Note which parameters have gradients, before something uses these."""
        for number, slot in self._unstepped.items():
            if slot.parameter.grad is not None:
                self._had_gradient.add(number)

    def end_epoch(self) -> None:
        """Warn of what has had no effect so far."""
        self._check(least=1)
        # An optimizer inside one of these, or beside them, is not watched.
        missed = self._had_gradient & self._written
        known = [optimizer for optimizer, steps in self._steps.items() if steps.is_ever_hooked or steps.missed]
        attached = (*self._steps, *attached_optimizers())
        served = [optimizer for optimizer in attached if self._is_handled_elsewhere(optimizer)]
        for optimizer in (*known, *served):
            missed -= {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        slots = [slot for number, slot in self._unstepped.items() if number in missed]
        if slots and self._looks_for_written:
            self._looks_for_written = False
            self._warn(
                f"{_count(len(slots), 'parameter')} ({_listed([slot.names[0] for slot in slots], 1)}) changed in "
                "this epoch without a step that Lightning knows of. This is fine if they are clamped, averaged or "
                "copied from others. If an optimizer changed them, it did so with gradients that were not "
                f"{self._action}. {self._advice}"
            )

    def hook(self, optimizer: Any) -> None:
        """Note that Lightning has called its hook for an optimizer."""
        steps = self._steps.get(optimizer)
        if steps is None or not steps.is_hooked_in_epoch:  # None for an optimizer that was added within the epoch
            for slot in self._adapter.slots_of(optimizer):
                if isinstance(slot, ParameterSlot):
                    self._unstepped.pop(id(slot.parameter), None)
        if steps is not None:
            steps.is_hooked = steps.is_hooked_in_epoch = steps.is_ever_hooked = True
        self.look_for_gradients()

    def search(self, optimizer: Any, found: Iterable[GradientSlot], may_miss_backwards: bool) -> None:
        """Note which gradients were found before a step.

        Args:
            optimizer: The optimizer that is about to step.
            found: The slots that have a gradient. They are not read once every optimizer and pattern has had one.
            may_miss_backwards: Whether there may be backward passes that Lightning does not know of.
        """
        steps = self._steps.get(optimizer)
        if steps is None or (steps.is_settled and not self._unmet):
            return
        found = list(found)
        if not found:
            # A step without a backward pass since the last step says nothing: `training_step` may have returned None.
            is_known = self.backwards > 0 or not may_miss_backwards
            if steps.backwards == self.backwards and (is_known or not self._has_gradients()):
                return
        else:
            steps.is_settled = True
            # Parameters that the module does not register may be copies, with gradients of the step before.
            found_names = [slot.names for slot in found if slot not in self._adapter.unnamed]
            self._unmet = [
                pattern
                for pattern in self._unmet
                if not any(self._filter.includes(names, pattern) for names in found_names)
            ]
        steps.backwards = self.backwards
        steps.searched += 1
        if steps.searched == steps.next_check:
            steps.next_check *= 2
            self._check(FIRST_STEPS)

    def _enter(self, optimizer: Any, steps: _StepCounts, *_: Any) -> None:
        if not is_nested_step(optimizer):
            steps.had_gradients = self._is_missed(steps) and self._has_chosen_gradients(optimizer)

    def _leave(self, optimizer: Any, steps: _StepCounts, *_: Any) -> None:
        if is_nested_step(optimizer):
            return
        # A closure computes gradients in the step.
        if self._is_missed(steps) and (steps.had_gradients or self._has_chosen_gradients(optimizer)):
            steps.missed += 1
            if steps.missed == FIRST_STEPS:
                self._check(FIRST_STEPS)
        steps.is_hooked = False

    def _is_missed(self, steps: _StepCounts) -> bool:
        """Return whether the running step bypasses Lightning, and no warning has said so yet."""
        return not steps.is_hooked and not steps.is_reported

    def _check(self, least: int) -> None:
        """Warn of what has had no effect in at least a number of steps."""
        if any(steps.missed >= least and not steps.is_reported for steps in self._steps.values()):
            self._report_missed()
        for optimizer, steps in self._steps.items():
            if steps.searched >= least and not steps.is_settled:
                self._check_optimizer(optimizer, steps)
        if not self._unmet or all(steps.searched < least for steps in self._steps.values()):
            return
        # An optimizer that has not stepped often enough yet may still find gradients of a pattern's parameters.
        young = [optimizer for optimizer, steps in self._steps.items() if steps.searched < least]
        waiting = _names(self._slots_of(*young))
        for pattern in list(self._unmet):
            self._check_pattern(pattern, waiting)

    def _report_missed(self) -> None:
        names = []
        times = 0
        for optimizer, steps in self._steps.items():
            if steps.missed and not steps.is_reported:
                steps.is_reported = True
                if self._slots_of(optimizer) and not self._is_handled_elsewhere(optimizer):
                    names.append(steps.name)
                    times = max(times, steps.missed)
        if names:
            often = f" {times} times" if times > 1 else ""
            self._warn(
                f"{_listed(names, _MAX_NAMED)} stepped past Lightning{often}, with gradients that were not "
                f"{self._action}. {self._advice}"
            )

    def _check_optimizer(self, optimizer: Any, steps: _StepCounts) -> None:
        chosen = self._slots_of(optimizer)
        reason = self._reason(chosen)
        if reason is not None:
            self._unmet, self._looks_for_written = [], False
            self._warn(
                f"in the first {_count(steps.searched, 'step')} of {steps.name}, none of its "
                f"{_count(len(chosen), 'chosen parameter')} ({_listed([slot.names[0] for slot in chosen], 1)}) had a "
                f"gradient before the step that could be {self._action}. {reason}"
            )
        steps.is_settled = reason is not None or not chosen

    def _check_pattern(self, pattern: str, waiting: set[str]) -> None:
        chosen = [
            slot
            for slot in self._adapter.slots()
            if self._filter.matches(slot) and self._filter.includes(slot.names, pattern)
        ]
        reason = self._reason(chosen)
        if chosen and (reason is None or waiting & _names(chosen)):
            return
        self._unmet.remove(pattern)
        if reason is not None:
            self._looks_for_written = False
            searched = max(steps.searched for steps in self._steps.values())
            self._warn(
                f"in the first {_count(searched, 'step')}, none of the {_count(len(chosen), 'parameter')} that are "
                f"chosen by the pattern {pattern!r} ({_listed([slot.names[0] for slot in chosen], 1)}) had a "
                f"gradient before the step that could be {self._action}. {reason}"
            )

    def _reason(self, chosen: Sequence[GradientSlot]) -> str | None:
        """Explain why parameters have no gradients; return ``None`` if they may train later and need no warning."""
        named = self._adapter.module.named_parameters(remove_duplicate=False)
        frozen_names = {clean_name(name) for name, parameter in named if not parameter.requires_grad}
        stepped = _names(slot for optimizer in self._steps for slot in self._adapter.slots_of(optimizer))
        are_frozen = [not frozen_names.isdisjoint(slot.names) for slot in chosen]
        are_left_out = [stepped.isdisjoint(slot.names) for slot in chosen]
        if not all(frozen or left_out for frozen, left_out in zip(are_frozen, are_left_out, strict=True)):
            return f"{_OUT_OF_REACH} If the optimizer is an ordinary one, the loss does not depend on these parameters."
        if not chosen or self._is_finetuned:
            return None
        frozen_text, left_out_text = "frozen (requires_grad=False)", "in no optimizer"
        if all(are_frozen):
            what = frozen_text
        elif all(are_left_out):
            what = left_out_text
        else:
            what = f"{frozen_text} or {left_out_text}"
        if all(are_left_out) and self._adapter.unnamed:
            return f"They are {what}. Others, which the LightningModule does not register, are stepped. {_OUT_OF_REACH}"
        return f"They are {what}: choose parameters that train. Ignore this if these train later."

    def _has_gradients(self) -> bool:
        """Return whether any parameter of the model has a gradient."""
        return any(parameter.grad is not None for parameter in self._adapter.module.parameters())

    def _has_chosen_gradients(self, optimizer: Any) -> bool:
        """Return whether an optimizer has gradients of chosen parameters. Sharded gradients count as present."""
        slots = self._slots_of(optimizer)
        return any(not isinstance(slot, ParameterSlot) or slot.parameter.grad is not None for slot in slots)

    def _slots_of(self, *optimizers: Any) -> list[GradientSlot]:
        """Return the slots of those of the optimizers' parameters that take part."""
        slots = (slot for optimizer in optimizers for slot in self._adapter.slots_of(optimizer))
        return [slot for slot in slots if self._filter.matches(slot)]

    def _warn(self, message: str) -> None:
        rank_zero_warn(f"{self._callback}: {message}")


def _counts_writes(slot: ParameterSlot) -> bool:
    """Return whether a parameter trains, and torch counts how often it has been written."""
    return slot.ndim is not None and slot.parameter.requires_grad and not slot.parameter.is_inference()


def _names(slots: Iterable[GradientSlot]) -> set[str]:
    return {name for slot in slots for name in slot.names}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _listed(names: Sequence[str], limit: int) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
