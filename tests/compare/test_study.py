"""What a study refuses, and its command line: without a run."""

from pathlib import Path

import pytest

from lightning_znorm import compare
from lightning_znorm.cli import main
from lightning_znorm.compare.command import command_line
from lightning_znorm.compare.engines import Resources
from lightning_znorm.compare.files import locked
from lightning_znorm.compare.study import Study, StudyError, parse_timeout


def study(**changes) -> Study:
    arguments = {
        "configs": ("exp.yaml",),
        "methods": ("a/one.yaml", "a/two.yaml"),
        "seeds": (0, 1),
        "output": Path("out"),
    }
    return Study(**{**arguments, **changes})


def refusal(*args: str) -> str:
    """The sentence with which a command is refused."""
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", *args])
    assert isinstance(exit_info.value.code, str)
    assert exit_info.value.code.startswith("error: ")
    return exit_info.value.code


def callback(class_path: str, /, **arguments) -> dict:
    return {"class_path": class_path, "init_args": arguments}


class TestStudy:
    def test_runs(self):
        assert [run.name for run in study().runs] == ["one-0", "two-0", "one-1", "two-1"]
        assert study().runs[1].folder == Path("out/runs/two-0")

    def test_by_hand(self):
        args = study(args=("--trainer.max_epochs", "2")).fit_args("two")
        assert args == ["fit", "--config", "exp.yaml", "--config", "a/two.yaml", "--trainer.max_epochs", "2"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"methods": ("a/one.yaml", "b/one.yaml")}, "Two methods are named one, a/one.yaml and b/one.yaml"),
            ({"methods": ()}, "at least one method"),
            ({"seeds": ()}, "one seed"),
            ({"seeds": (1, 1)}, "Seed 1 is named twice"),
            ({"seeds": (-1,)}, "got -1"),
            ({"mode": "most"}, "mode is min or max, got most"),
            ({"args": ("--seed_everything=3",)}, "--seed_everything cannot be .* name --seeds instead"),
            ({"args": ("--ckpt_path", "x")}, "--ckpt_path cannot be"),
            ({"args": ("--trainer.fast_dev_run", "1")}, "--trainer.fast_dev_run cannot be"),
        ],
    )
    def test_refused(self, changes, message):
        with pytest.raises(StudyError, match=message):
            study(**changes)


class TestCommandLine:
    def test_refused_at_once(self, tmp_path):
        command = ["--config", "x", "--methods", "a/one.yaml", "--output", str(tmp_path / "out")]
        assert "Two methods are named one" in refusal(*command, "--methods", "a/one.yaml", "b/one.yaml")
        assert "at least 1: 0" in refusal(*command, "--jobs", "0")
        assert "--gpus is what each run takes of a Ray cluster, 0 or more: -1" in refusal(*command, "--gpus", "-1")
        for time in ("0", "-5", "nan", "inf", "1e3", "soon", "2 hours", "5x", "", "1h30m"):
            assert f"and more than 0: {time}." in refusal(*command, f"--timeout={time}")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("typed", "seconds"),
        [("90", 90), ("90s", 90), ("0.5m", 30), (" 2h ", 7200), ("1d", 86400), (".5", 0.5), (7, 7), (2.5, 2.5)],
    )
    def test_timeout(self, typed, seconds):
        assert parse_timeout(typed) == seconds

    @pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "many"])
    def test_no_timeout(self, value):
        with pytest.raises(StudyError, match="--timeout is a time such as 90"):
            compare.run("exp.yaml", ["a.yaml"], output="out", timeout=value)

    def test_timeout_is_of_each_run(self):
        assert [run.timeout for run in study(timeout=5.0).runs] == [5.0] * 4
        assert study(timeout=5.0).runs == study().runs  # whose runs are the same, with more time

    def test_what_wascommand_line(self, tmp_path, monkeypatch):
        """The report's command starts the same study in the same way."""
        monkeypatch.chdir(tmp_path)
        asked = study(output=tmp_path / "out", metric="test/f1", mode="max", args=("--trainer.max_epochs", "2"))
        common = (
            "python -m lightning_znorm compare --config exp.yaml --methods a/one.yaml a/two.yaml --seeds 0 1 "
            "--output out --metric test/f1 --mode max"
        )
        assert command_line(asked, Resources()) == f"{common} --trainer.max_epochs 2"
        assert command_line(asked, Resources(jobs=2)) == f"{common} --jobs 2 --trainer.max_epochs 2"
        patient = study(output=tmp_path / "out", timeout=5400.0)
        assert command_line(patient, Resources()).endswith("--output out --timeout 5400")
        ray = Resources(ray="auto", cpus=2, gpus=0.5)
        assert command_line(asked, ray) == f"{common} --ray auto --cpus 2 --gpus 0.5 --trainer.max_epochs 2"

    def test_output_in_use(self, tmp_path):
        command = ["--config", "x", "--methods", "a/one.yaml", "--output", str(tmp_path / "out")]
        with locked(tmp_path / "out" / ".lock"):
            assert "is in use by another study (process " in refusal(*command)

    def test_output_of_something_else(self, tmp_path):
        (tmp_path / "letter.txt").touch()
        command = ["--config", "x", "--methods", "a/one.yaml", "--output"]
        assert "is not empty, and holds no study" in refusal(*command, str(tmp_path))
        assert "letter.txt is a file" in refusal(*command, str(tmp_path / "letter.txt"))

    def test_missing_files(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        znorm = "configs/methods/znorm.yaml"
        assert "No config file mine.yaml" in refusal("--config", "mine.yaml", "--methods", znorm, "--output", "out")
        command = ["--config", "configs/digits/resnet20.yaml", "--output", "out"]
        message = refusal(*command, "--methods", "configs/methods/znrom.yaml")
        assert "`fit` refuses the settings of znrom. No config file configs/methods/znrom.yaml" in message
        assert f"did you mean {znorm}" in message

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as exit_info:
            main(["compare", "--help"])
        assert exit_info.value.code == 0
        out = capsys.readouterr().out
        for option in ("methods", "seeds", "output", "metric", "mode", "jobs", "timeout", "dry-run", "ray"):
            assert f"--{option}" in out
