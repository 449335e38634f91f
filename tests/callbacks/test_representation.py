"""How callbacks are shown, and what the help of their options says."""

import inspect
import pickle
import re
from typing import Any

import docstring_parser
import pytest
import torch

import lightning_znorm.callbacks
from lightning_znorm import (
    GradientCentralizationCallback,
    GradientMonitor,
    GradientTransform,
    LastCheckpoint,
    MaskOverlay,
    MaskWriter,
    ScoreWriter,
    SINGCallback,
    ZNormCallback,
)
from lightning_znorm.gradients import ZScore

SHOWN: dict[str, Any] = {
    "ZNormCallback()": ZNormCallback(),
    "ZNormCallback(min_ndim=2)": ZNormCallback(min_ndim=2),
    "ZNormCallback(eps=1e-08, include='net.*', exclude=['a.*', 'b.*'], centering='adaptive')": ZNormCallback(
        1e-8, ("net.*",), ("a.*", "b.*"), centering="adaptive"
    ),
    "GradientCentralizationCallback(error_if_nonfinite=True)": GradientCentralizationCallback(error_if_nonfinite=True),
    "SINGCallback(eps=0.1)": SINGCallback(0.1),
    "SINGCallback()": SINGCallback(1e-8),
    "GradientTransform(method=ZScore(eps=1e-10), exclude='*.bias')": GradientTransform(ZScore(), exclude="*.bias"),
    "GradientMonitor()": GradientMonitor(),
    "GradientMonitor(per_parameter=True, prefix='g', min_ndim=2)": GradientMonitor(True, prefix="g", min_ndim=2),
    "LastCheckpoint()": LastCheckpoint(),
    "LastCheckpoint(dirpath='runs', enable_version_counter=False)": LastCheckpoint("runs", False),
    "MaskOverlay()": MaskOverlay(),
    "MaskOverlay(cases=[1, 3], every_n_epochs=2)": MaskOverlay(cases=[3, 1], every_n_epochs=2),
    "MaskWriter(dirpath='masks', format='tif')": MaskWriter("masks", "tif"),
    "ScoreWriter()": ScoreWriter(),
}


@pytest.mark.parametrize("text", SHOWN)
def test_options_that_are_not_the_default_ones(text: str) -> None:
    assert repr(SHOWN[text]) == text
    assert repr(pickle.loads(pickle.dumps(SHOWN[text]))) == text


def test_function_as_a_method() -> None:
    assert repr(GradientTransform(torch.sign)).startswith("GradientTransform(method=<built-in method sign")


def test_long_options_are_short() -> None:
    assert len(repr(ZNormCallback(include=[f"layer.{number}.*" for number in range(100)]))) < 200


def test_subclasses_with_constructors_of_their_own() -> None:
    class Weights(ZNormCallback):
        def __init__(self, scale: float, *rest: Any, **more: Any) -> None:
            super().__init__(min_ndim=2)
            self.scale = scale

    class Unready(GradientMonitor):
        def __init__(self) -> None:
            self.text = repr(self)
            super().__init__(prefix="own")

    assert repr(Weights(3.0, 1, a=2)) == "Weights(min_ndim=2)"
    assert Unready().text == "Unready()"
    assert repr(Unready()) == "Unready(prefix='own')"


def test_folder_that_was_found_is_not_shown(fit) -> None:
    from tests.callbacks.training import Training, batches

    callback = LastCheckpoint()
    fit(Training(), batches(1), callback, enable_checkpointing=True)
    assert callback.dirpath is not None
    assert repr(callback) == "LastCheckpoint()"


@pytest.mark.parametrize("name", lightning_znorm.callbacks.__all__)
def test_help_of_each_option_says_what_it_does(name: str) -> None:
    """The command line shows these texts as they are."""
    callback = getattr(lightning_znorm.callbacks, name)
    texts = {each.arg_name: each.description for each in docstring_parser.parse(callback.__doc__).params}
    assert texts.keys() == inspect.signature(callback).parameters.keys()
    for option, text in texts.items():
        assert not re.search(r":\w+:`|^See |^As ", text), f"{option}: {text}"
        assert text.strip().endswith("."), option
        assert len(text.split()) > 4, option
