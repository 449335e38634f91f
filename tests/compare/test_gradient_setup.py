"""An experiment that holds a gradient method itself; the processes that a study asks are stood in for."""

import sys
from pathlib import Path

import pytest
import yaml

from lightning_znorm.compare.gradient_setup import check_experiment, gradient_callbacks, same_settings
from lightning_znorm.compare.study import Study, StudyError


def callback(class_path: str, /, **arguments) -> dict:
    return {"class_path": class_path, "init_args": arguments}


ZNORM = callback("lightning_znorm.ZNormCallback", eps=1e-10, min_ndim=0)
ZNORM_OF_MATRICES = callback("lightning_znorm.ZNormCallback", min_ndim=2)
CENTRALIZATION = callback("lightning_znorm.callbacks.GradientCentralizationCallback")
NOISE = callback("study_module.NoisyGradients")
STOPPING = callback("lightning.pytorch.callbacks.EarlyStopping", monitor="val/loss")


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        "baseline": {},
        "znorm": {"callbacks+": ["ZNormCallback"]},
        "both": {"callbacks+": [{"class_path": "ZNormCallback"}, {"class_path": "study_module.NoisyGradients"}]},
        "replaces": {"callbacks": {"class_path": "lightning_znorm.ZNormCallback"}},
    }
    for name, trainer in files.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    Path("exp.yaml").write_text("{model: {class_path: M}, trainer: {callbacks+: [ZNormCallback]}}")
    Path("plain.yaml").write_text("{model: {class_path: M}}")

    def make(*methods: str, experiment: str = "exp.yaml") -> Study:
        return Study((experiment,), tuple(f"{name}.yaml" for name in methods), (0,), tmp_path / "out")

    return make


def resolved(*callbacks: dict) -> dict:
    return {"trainer": {"callbacks": list(callbacks) or None}}


@pytest.mark.parametrize(
    ("methods", "settings"),
    [
        (["baseline", "znorm"], [resolved(ZNORM_OF_MATRICES), resolved(ZNORM_OF_MATRICES, ZNORM)]),
        (["znorm"], [resolved(STOPPING, ZNORM_OF_MATRICES, ZNORM)]),
        (["replaces", "baseline"], [resolved(ZNORM), resolved(ZNORM_OF_MATRICES)]),
    ],
)
def test_of_the_experiment(study, methods, settings):
    message = "exp.yaml adds ZNormCallback to every method, so that .* is not what .*: move ZNormCallback into a method"
    with pytest.raises(StudyError, match=message):
        check_experiment(study(*methods), dict(zip(methods, settings, strict=True)))


@pytest.mark.parametrize(("entry", "name"), [(CENTRALIZATION, "GradientCentralizationCallback"), (NOISE, "NoisyGradi")])
def test_of_an_option(study, entry, name):
    with pytest.raises(StudyError, match=f"An option of `fit` adds {name}.* to every method, so that znorm"):
        check_experiment(study("znorm", experiment="plain.yaml"), {"znorm": resolved(ZNORM, entry)})


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("baseline", resolved()),
        ("baseline", resolved(STOPPING)),
        ("znorm", resolved(STOPPING, ZNORM)),
        ("both", resolved(STOPPING, ZNORM, NOISE)),
        ("replaces", resolved(ZNORM)),
    ],
)
def test_of_the_method_file(study, method, settings):
    check_experiment(study(method, experiment="plain.yaml"), {method: settings})


@pytest.mark.parametrize("known", [False, True])
def test_by_a_function(tmp_path, monkeypatch, known):
    """A callback's class path may be that of a function."""
    monkeypatch.chdir(tmp_path)  # from where the processes of the runs import too
    monkeypatch.delitem(sys.modules, "made", raising=False)
    if known:
        monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.path)
    Path("made.py").write_text(
        "from lightning_znorm import ZNormCallback\n"
        "def znorm() -> ZNormCallback: return ZNormCallback()\n"
        "def elsewhere() -> 'Unimported': return ZNormCallback()\n"
        "def unknown(): return ZNormCallback()\n"
    )
    settings = resolved(callback("made.znorm"), callback("made.unknown"), callback("made.elsewhere"))
    assert [entry["class_path"] for entry in gradient_callbacks(settings)] == ["made.znorm"]
    assert sys.path == before


def test_same_settings():
    settings = {"a": resolved(), "b": resolved(ZNORM), "c": resolved(), "d": resolved(ZNORM_OF_MATRICES)}
    assert same_settings(settings) == [["a", "c"]]
