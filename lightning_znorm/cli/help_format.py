"""All flags of a command, as text for a terminal: plain words in place of mark-up, and classes that one may name."""

import argparse
import copy
import importlib
import re
from collections.abc import Iterable
from typing import Any

from jsonargparse import DefaultHelpFormatter
from typing_extensions import override

from lightning_znorm.cli.help import FLAGS

TITLES = {
    "model": "model: what is trained",
    "data": "data: what it is trained and tested on",
    "trainer": "trainer: how it is trained, by Lightning's Trainer",
    "fit": "checkpoint: where the training begins",
    "validate": "checkpoint: what is evaluated",
    "test": "checkpoint: what is evaluated",
    "predict": "checkpoint: what predicts",
}
"""Titles of the groups of a command's flags, by the names that jsonargparse gives them."""

# In place of texts of Lightning that are about its Python API, or leave open what this program does.
_TEXTS = {
    **{flag.name.removeprefix("--"): flag.text for flag in FLAGS if flag.name in ("--config", "--seed_everything")},
    "print_config": "Print the settings that result from files and flags, and exit. Flags: skip_default, skip_unset.",
    "ckpt_path": "A checkpoint, or its address. `last` is the newest last.ckpt of the same logs, with which `fit` "
    "goes on.",
    "weights_only": "Whether the checkpoint is loaded without running code that it names. By default, one at an "
    "address is; a file that names code is refused before it is loaded.",
    "help": "Show what most runs need, and exit.",
    "model": "The class of the model. Its arguments follow as --model.init_args.NAME VALUE.",
    "data": "The class of the data module. Its arguments follow as --data.init_args.NAME VALUE.",
    "trainer": "A YAML file with settings of the Trainer.",
}
_ORDER = ("usage", "options", "model", "data", "checkpoint", "trainer")
_ROLE = re.compile(r":(?:py:)?[a-z]+:`(?:[^`<]*?\s*<)?(~?)([^`>]+)>?`")
_LINK = re.compile(r"`([^`<]+?)\s*<([^`>]+)>`_+")
_REFERENCE = re.compile(r"`([^`]+)`__?(?!\w)")
_SUBCLASSES = ", known subclasses: "
_PACKAGE = "lightning_znorm."
# Bases that do nothing by themselves, and classes that no setting can make.
_NOT_NAMED = {
    "lightning.Callback",
    "lightning.LightningDataModule",
    "lightning.LightningModule",
    "lightning.pytorch.callbacks.BaseFinetuning",
    "lightning.pytorch.callbacks.BasePredictionWriter",
    "lightning.pytorch.callbacks.Checkpoint",
    "lightning.pytorch.callbacks.LambdaCallback",
    "lightning.pytorch.callbacks.ProgressBar",
    "lightning.pytorch.cli.SaveConfigCallback",
    "lightning.pytorch.loggers.logger.DummyLogger",
}
# More classes than this are no choice, but all that happen to be imported: every torch.nn.Module, for example.
_MOST = 50


class HelpFormatter(DefaultHelpFormatter):
    """Formats help as jsonargparse does, in plain words, and names only classes that are meant to be named."""

    @override
    def add_argument(self, action: argparse.Action) -> None:
        """Add a flag, with a text that reads well in a terminal."""
        shown: Any = copy.copy(action)  # the parser keeps its own
        if shown.help is not argparse.SUPPRESS:
            shown.help = _TEXTS.get(shown.dest, shown.help)
            if shown.help is not None:
                shown.help = plain(shown.help)
            if hasattr(shown, "extra_help"):
                subclasses = shown.extra_help
                shown.extra_help = lambda: named_classes(subclasses())
        super().add_argument(shown)

    @override
    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        """Add the flags of a group. The limits of the Trainer, which this package declares, are not the first."""
        super().add_arguments(sorted(actions, key=lambda action: action.dest.startswith("trainer.limit_")))

    @override
    def start_section(self, heading: str | None) -> None:
        """Begin a group of flags."""
        super().start_section(None if heading is None else plain(heading))

    @override
    def add_text(self, text: str | None) -> None:
        """Add a paragraph."""
        super().add_text(None if text is None else plain(text))


def plain(text: str) -> str:
    """Return a docstring's text without its mark-up.

    Args:
        text: A text in reStructuredText.

    Example:
        >>> plain("``None`` or a :class:`~datetime.timedelta`")
        '`None` or a timedelta'
    """
    text = _ROLE.sub(lambda role: role[2].rpartition(".")[2] if role[1] else role[2], text)
    text = _LINK.sub(r"\1 (\2)", text).replace("``", "`")
    return _REFERENCE.sub(r"\1", text)


def named_classes(text: str) -> str:
    """Return the part of a flag's help that lists classes, with those alone that a setting may name.

    Args:
        text: What jsonargparse adds to the help, such as ``", known subclasses: torch.optim.Adam"``.
    """
    before, found, listed = text.partition(_SUBCLASSES)
    names = [name for name in listed.split(", ") if found and _is_public(name)]
    return f"{before}{_SUBCLASSES}{', '.join(names)}" if 0 < len(names) <= _MOST else before


def in_order(text: str) -> str:
    """Return the help of a command with its groups in the order in which one needs them.

    Args:
        text: The help. An empty line and a title in the first column begin a group.
    """
    groups = re.split(r"\n\n(?=\S)", text.rstrip("\n"))
    return "\n\n".join([groups[0], *sorted(groups[1:], key=_place)]) + "\n"


def _place(group: str) -> int:
    word = re.split(r"\W", group, maxsplit=1)[0]
    return _ORDER.index(word) if word in _ORDER else 0  # a paragraph on the whole command


def _is_public(class_path: str) -> bool:
    if class_path.startswith(_PACKAGE):
        module, _, name = class_path.rpartition(".")
        return name in _all(module)
    return class_path not in _NOT_NAMED


def _all(module: str) -> Iterable[str]:
    names: Iterable[str] = getattr(importlib.import_module(module), "__all__", ())
    return names
