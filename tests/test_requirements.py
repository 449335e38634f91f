"""Which package a feature misses, in one sentence: `lightning_znorm.requirements`, and names that are imported late."""

import ast
import importlib.abc
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_znorm
from lightning_znorm.compare import StudyError
from lightning_znorm.errors import ZNormError, ZNormImportError, ZNormValueError
from lightning_znorm.requirements import how_to_install, missing, needed_by, require

PACKAGE = Path(lightning_znorm.__file__).parent
LAZY = ["callbacks", "data", "metrics", "models", "tasks"]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes packages missing."""

    def hide(*packages: str) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            monkeypatch.delitem(sys.modules, name)
        finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]

        class Others(importlib.abc.MetaPathFinder):
            def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
                if name.partition(".")[0] in packages:
                    return None
                found = (finder.find_spec(name, path, target) for finder in finders)
                return next((spec for spec in found if spec is not None), None)

            def find_distributions(self, *context: Any) -> Any:  # as before: Lightning keeps in mind what it finds
                finds = (getattr(finder, "find_distributions", lambda *_: ()) for finder in finders)
                return (found for find in finds for found in find(*context))

        monkeypatch.setattr(sys, "meta_path", [Others()])

    return hide


def test_what_is_missing(without: Any) -> None:
    assert missing("torch", "timm", "json") == []
    without("timm", "json")
    assert missing("torch", "timm", "json") == ["timm", "json"]


def test_nothing_is_imported() -> None:
    assert "this" not in sys.modules
    require("Zen", "this")
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("packages", "sentence"),
    [
        (["timm"], "A feature needs timm: pip install lightning-znorm"),
        (["PIL", "sklearn"], "A feature needs pillow and scikit-learn: pip install lightning-znorm"),
        (["h5py", "rich", "scipy"], "A feature needs h5py, rich and scipy: pip install lightning-znorm"),
        (["nibabel", "timm"], "A feature needs nibabel and timm: pip install 'lightning-znorm[volumes]'"),
        (["nibabel", "ray"], "A feature needs nibabel and ray: pip install 'lightning-znorm[ray,volumes]'"),
    ],
)
def test_sentence(without: Any, packages: list[str], sentence: str) -> None:
    without(*packages)
    with pytest.raises(ZNormImportError) as info:
        require("A feature", "torch", *packages)
    assert str(info.value) == sentence
    assert isinstance(info.value, ImportError)
    assert isinstance(info.value, ZNormError)
    assert isinstance(info.value.__cause__, ModuleNotFoundError)
    assert info.value.__cause__.name == packages[0]


def test_of_an_import(without: Any) -> None:
    without("timm")
    with (
        pytest.raises(ZNormImportError, match=r"^A task needs timm: pip install lightning-znorm$") as info,
        needed_by("A task"),
    ):
        import timm.models  # noqa: F401
    assert isinstance(info.value.__cause__, ModuleNotFoundError)


def test_of_what_a_package_needs_itself(without: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_other.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    # No command: `pip install lightning-znorm` would not install it.
    sentence = "A task needs no_such_package, which cannot be imported: install it"
    with pytest.raises(ZNormImportError, match=f"^{sentence}$"), needed_by("A task"):
        importlib.import_module("needs_other")
    (tmp_path / "needs_other.py").write_text("from another import nothing")
    (tmp_path / "another.py").touch()
    importlib.invalidate_caches()
    sentence = r"A task cannot use the installed another \(cannot import name 'nothing'.*\): install another version"
    with pytest.raises(ZNormImportError, match=f"^{sentence}$"), needed_by("A task"):
        importlib.import_module("needs_other")


def test_of_another_version() -> None:
    sentence = r"^A task cannot use the installed torch \((cannot import name 'nothing'|No module named 'torch.none')"
    with pytest.raises(ZNormImportError, match=sentence), needed_by("A task"):
        from torch import nothing  # noqa: F401
    with pytest.raises(ZNormImportError, match=sentence), needed_by("A task"):
        import torch.none  # noqa: F401


def test_a_bug_of_ours_stays_one() -> None:
    with pytest.raises(ImportError, match=r"cannot import name 'nothing'") as info, needed_by("A task"):
        from lightning_znorm.errors import nothing  # noqa: F401
    assert not isinstance(info.value, ZNormError)


def test_no_command_by_default() -> None:
    assert how_to_install() == "pip install lightning-znorm"


class TestFeatures:
    def test_network_of_timm(self, without: Any) -> None:
        without("timm")
        from lightning_znorm.tasks import ClassificationTask

        with pytest.raises(ZNormImportError, match=r"^ClassificationTask needs timm: pip install lightning-znorm$"):
            ClassificationTask("vgg11", 10)
        ClassificationTask("resnet20", 10)

    def test_nested_transform(self, without: Any) -> None:
        without("torchvision")
        from lightning_znorm.data.transforms import built

        inner = {"class_path": "torchvision.transforms.v2.ColorJitter"}
        outer = {"class_path": "monai.transforms.Compose", "init_args": {"transforms": [inner]}}
        with pytest.raises(ZNormImportError, match=r"^train_transform: torchvision.*Jitter needs torchvision: pip"):
            built("train_transform", outer)
        with pytest.raises(ZNormValueError, match=r"somebody\.Else cannot be imported"):
            built("train_transform", {"class_path": "somebody.Else"})

    def test_ray(self, without: Any) -> None:
        without("ray")
        from lightning_znorm.compare.engines import ray_engine

        sentence = r"^--ray needs ray: pip install 'lightning-znorm\[ray\]'$"
        with pytest.raises(StudyError, match=sentence), ray_engine("auto", 1, 0, monitored=True):
            pass

    def test_class_of_a_config_file(self, without: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        without("monai")
        from lightning_znorm.cli import main

        settings = {"class_path": "monai.inferers.SimpleInferer"}
        (tmp_path / "inferer.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"inferer": settings}}}))
        files = ["configs/lgg/unetpp.yaml", str(tmp_path / "inferer.yaml")]
        with pytest.raises(SystemExit):
            main(["fit", *(word for file in files for word in ("--config", file)), "--print_config"])
        said = capsys.readouterr().err
        assert "is monai.inferers.SimpleInferer, which needs monai: pip install lightning-znorm" in said


class TestLateNames:
    @pytest.mark.parametrize("room", ["lightning_znorm", *(f"lightning_znorm.{room}" for room in LAZY)])
    def test_checkers_and_python_see_the_same(self, room: str) -> None:
        """The names for type checkers, those of ``__all__`` and those that are imported late, by their modules."""
        module = importlib.import_module(room)
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        (both,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        checked = {
            name.name: str(node.module) for node in both.body if isinstance(node, ast.ImportFrom) for name in node.names
        }
        (assignment,) = (node for node in both.orelse if isinstance(node, ast.Assign))
        assert isinstance(assignment.value, ast.Call)
        late = {
            name: f"{room}.{submodule}"
            for submodule, names in ast.literal_eval(assignment.value.args[1]).items()
            for name in names
        }
        assert checked == late
        assert set(late) == set(module.__all__)
        assert set(late) <= set(dir(module))
        for name, where in late.items():
            assert getattr(module, name) is getattr(importlib.import_module(where), name)
            assert name in vars(module)  # Python does not ask `__getattr__` for it again

    def test_unknown_name(self) -> None:
        with pytest.raises(AttributeError, match=r"module 'lightning_znorm.tasks' has no attribute 'Nothing'"):
            lightning_znorm.tasks.Nothing  # noqa: B018
        with pytest.raises(ImportError, match=r"cannot import name 'Nothing' from 'lightning_znorm.tasks'"):
            from lightning_znorm.tasks import Nothing  # noqa: F401

    def test_a_name_whose_module_misses_a_package(self, without: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        import lightning_znorm.metrics as room

        for name in ("HausdorffDistance",):
            monkeypatch.delitem(vars(room), name, raising=False)
        for module in ("hausdorff", "distances"):
            monkeypatch.delitem(sys.modules, f"lightning_znorm.metrics.{module}", raising=False)
        without("numpy")
        with pytest.raises(ZNormImportError, match=r"^HausdorffDistance needs numpy: pip install lightning-znorm$"):
            room.HausdorffDistance  # noqa: B018
        with pytest.raises(ZNormImportError, match=r"^HausdorffDistance needs numpy: "):
            hasattr(room, "HausdorffDistance")  # so that the reason is not lost
        assert "HausdorffDistance" in dir(room)

    def test_pickles(self) -> None:
        callback = pickle.loads(pickle.dumps(lightning_znorm.ZNormCallback(eps=1e-6)))
        assert callback.applied_method.eps == 1e-6
        assert type(callback) is lightning_znorm.callbacks.ZNormCallback

    def test_one_callback_loads_no_other(self) -> None:
        from tests.processes import run_python

        program = (
            "import sys, lightning_znorm; lightning_znorm.ZNormCallback();"
            "print(*(name for name in sys.modules if name.startswith('lightning_znorm.')))"
        )
        loaded = run_python("-W", "ignore", "-c", program, timeout=100).stdout.split()
        assert "lightning_znorm.callbacks.methods" in loaded
        rooms = {name.split(".")[1] for name in loaded}
        assert rooms.isdisjoint({"batches", "cli", "compare", "data", "metrics", "models", "tasks"})
        others = {"mask_overlay", "masks", "scores", "last_checkpoint", "monitor_plots"}
        assert others.isdisjoint(name.rpartition(".")[2] for name in loaded)


def test_the_command_line_finds_all_classes_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_znorm.cli import main

    given = []
    for name in lightning_znorm.__all__:
        given += ["--trainer.callbacks+", name]
        if name == "GradientTransform":
            given += ["--trainer.callbacks.method", "lightning_znorm.gradients.ZScore"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["fit", "--config", "configs/digits/resnet20.yaml", *given, "--print_config"])
    printed = capsys.readouterr().out
    for name in lightning_znorm.__all__:
        assert re.search(rf"class_path: lightning_znorm\.{name}\n", printed), name


def test_metrics_and_networks_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_znorm.cli import main

    model = ["--model", "SegmentationTask", "--model.metrics.size", "MaskCount", "--model.model", "torch.nn.Identity"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["fit", *model, "--data", "LGGDataModule", "--print_config"])
    assert "class_path: lightning_znorm.metrics.MaskCount\n" in capsys.readouterr().out
