"""What the report advises if all methods ran with one learning rate."""

from pathlib import Path

import pytest

from lightning_znorm.compare.advice import advise
from lightning_znorm.compare.study import Plan, Study

KEY = "model.init_args.optimizer.init_args.lr"


def settings(callback: str | None, keys: int = 1) -> dict:
    callbacks = [{"class_path": callback, "init_args": {}}] if callback else None
    models = {f"model{i or ''}": {"init_args": {"optimizer": {"init_args": {"lr": 0.2}}}} for i in range(keys)}
    return {**models, "trainer": {"callbacks": callbacks}}


def plan(first: str | None = None, keys: int = 1, **changes) -> Plan:
    methods = {
        "baseline": first,
        "gc": "lightning_znorm.GradientCentralizationCallback",
        "znorm": "lightning_znorm.ZNormCallback",
        "sing": "lightning_znorm.SINGCallback",
    }
    study = Study(("e.yaml",), tuple(f"{name}.yaml" for name in methods), (0,), Path("out"), **changes)
    found = {name: settings(callback, keys) for name, callback in methods.items()}
    return Plan(study, found, None, "test/a", "max", [])


SAME = {name: ["SGD(lr=0.2, momentum=0.9)"] for name in ("baseline", "gc", "znorm", "sing")}


def test_methods_with_unit_gradients_under_sgd():
    (advice,) = advise(plan(), SAME)
    assert "usual learning rates of znorm and sing are about a thousand times lower" in advice
    assert advice.endswith(f"Try --sweep {KEY} 0.0002 0.002 0.02 0.2")


@pytest.mark.parametrize(
    ("study", "optimizers"),
    [
        (plan(), {name: ["Adam(lr=0.2)"] for name in SAME}),
        (plan(), {**SAME, "znorm": ["SGD(lr=0.001)"], "sing": ["SGD(lr=0.001)"]}),
        (plan(), {}),
        (plan(sweep=((KEY, ("1", "2")),)), SAME),
        (plan("lightning_znorm.ZNormCallback"), SAME),
    ],
    ids=["Adam", "rates of their own", "not recorded", "swept", "the first method is one"],
)
def test_no_advice(study, optimizers):
    assert advise(study, optimizers) == []


def test_with_several_learning_rates_no_setting_is_named():
    assert advise(plan(keys=2), SAME)[0].endswith("Try several with --sweep.")
