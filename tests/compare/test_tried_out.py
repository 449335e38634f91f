"""What a study finds out when it tries methods on one batch, before the first run."""

import sys
from pathlib import Path

import pytest
import yaml
from forked import fork_processes

from lightning_znorm import compare
from lightning_znorm.compare.files import read_json
from lightning_znorm.compare.settings import note_on_order
from lightning_znorm.compare.study import StudyError

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fork_processes(monkeypatch)
    Path("baseline.yaml").write_text("trainer: {}")


def write_experiment(module: str = "StudyModule", monitor: str | None = "val/accuracy", **trainer: object) -> None:
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"monitor": monitor, "mode": "max"}}
    experiment = {
        "model": {"class_path": f"study_module.{module}"},
        "data": {"class_path": "study_module.StudyData"},
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 2, "callbacks+": [checkpoint]},
    }
    if monitor is None:
        del experiment["trainer"]["callbacks+"]
    experiment["trainer"] |= trainer
    Path("exp.yaml").write_text(yaml.safe_dump(experiment))


def study(*methods: str, **options: object) -> compare.Table:
    return compare.run("exp.yaml", methods or ["baseline.yaml"], seeds=[0], output="out", **options)


def check_refused(message: str, *methods: str, **options: object) -> None:
    """Refused before the first run."""
    with pytest.raises(StudyError, match=message):
        study(*methods, **options)
    assert not Path("out/runs").exists()


def test_files_in_another_order_are_said():
    write_experiment()
    Path("methods").mkdir()
    Path("methods/clip.yaml").write_text("trainer: {gradient_clip_val: 1}")
    said = "methods/clip.yaml is applied after exp.yaml, because methods go last."
    assert note_on_order(["methods/clip.yaml", "exp.yaml"]) == [said]
    assert note_on_order(["exp.yaml", "methods/clip.yaml"]) == []


def test_method_that_the_model_adds():
    write_experiment("AddingModule")
    check_refused("ZNormCallback trains under baseline.yaml, which does not name it: .* configure_callbacks")


def test_method_that_the_model_puts_in_the_place_of_another():
    """Lightning replaces callbacks of the same class."""
    write_experiment("AddingModule")
    entry = {"class_path": "ZNormCallback", "init_args": {"min_ndim": 2}}
    Path("znorm.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [entry]}}))
    check_refused("ZNormCallback trains under znorm.yaml, which does not name it: .* configure_callbacks", "znorm.yaml")


def test_method_of_a_function_that_does_not_say_so():
    write_experiment()
    entry = {"class_path": "study_module.unannotated"}
    Path("made.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [entry]}}))
    check_refused("ZNormCallback trains under made.yaml, .* a function, .* annotate .* `-> ZNormCallback`", "made.yaml")


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`")
def test_training_without_a_batch():
    write_experiment(monitor=None)
    flags = ["--data.init_args.batch_size", "100", "--data.init_args.drop_last", "true"]
    check_refused("baseline.yaml: a first try at one batch has not trained, because there is no batch", args=flags)


def test_method_that_is_attached_to_the_optimizer():
    write_experiment("AttachingModule")
    check_refused("attached to SGD trains under baseline.yaml, which sets nothing of the model: .*functional.attach")


@pytest.mark.full
def test_method_file_that_attaches():
    write_experiment("AttachingModule")
    for name in ("plain", "attached"):
        settings = {"model": {"init_args": {"attached": name == "attached"}}}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
    study("plain.yaml", "attached.yaml")
    report = Path("out/report.md").read_text()
    assert "| plain | none | none |" in report
    assert "| attached | a method attached to SGD | none |" in report


@pytest.mark.parametrize(
    "never",
    [{"limit_val_batches": 0}, pytest.param({"check_val_every_n_epoch": 3}, marks=pytest.mark.full)],
    ids=str,
)
class TestExperimentThatDoesNotValidate:
    def test_last_checkpoint_is_tested(self, never):
        write_experiment(monitor=None, **never)
        table = study(metric="test/accuracy", mode="max")
        assert table.failures == ()
        assert Path(read_json(Path("out/runs/baseline-0/test.json"))["checkpoint"]["path"]).name == "last.ckpt"
        assert not [row for row in table.rows if row.metric.startswith("val/")]

    @pytest.mark.full
    def test_one_of_several_methods(self, never):
        """All are tested at the last checkpoint."""
        write_experiment(monitor=None)
        Path("unvalidated.yaml").write_text(yaml.safe_dump({"trainer": never}))
        table = study("baseline.yaml", "unvalidated.yaml", metric="test/accuracy", mode="max")
        assert table.failures == ()
        assert Path(read_json(Path("out/runs/baseline-0/test.json"))["checkpoint"]["path"]).name == "last.ckpt"

    def test_monitored_all_the_same(self, never):
        write_experiment(**never)
        check_refused("no best checkpoint to test: val/accuracy was not logged .*limit_val_batches")

    def test_metric_of_validation(self, never):
        write_experiment(monitor=None, **never)
        check_refused("--metric val/accuracy: nothing logs it", metric="val/accuracy", mode="max")
