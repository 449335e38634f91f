"""Every file under configs/ runs: a new one is tested as soon as it is there."""

from pathlib import Path

import pytest
import torch
import yaml

from lightning_znorm.cli import main
from lightning_znorm.cli.config_files import read_config

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted((CONFIGS / "methods").glob("*.yaml"))
EXPERIMENTS = sorted(set(CONFIGS.rglob("*.yaml")) - set(METHODS))
CIFAR10 = [path for path in EXPERIMENTS if path.parent.name == "cifar10"]
DIGITS = CONFIGS / "digits/resnet20.yaml"
CPU = ["--trainer.accelerator", "cpu"]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def resolved(capsys: pytest.CaptureFixture[str], *args: object) -> dict:
    """What `--print_config` says that a run would use."""
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", *map(str, args), "--print_config"])
    assert exit_info.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def class_paths(config: dict) -> list[str]:
    return [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]


@pytest.fixture
def data_flags(request, fake_cifar10, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return {
        "digits": [],
        "cifar10": ["--data.init_args.root", str(fake_cifar10), "--data.init_args.batch_size", "2"],
    }


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=name)
def test_experiment(experiment, data_flags, capsys):
    flags = data_flags[experiment.parent.name]
    main(["fit", "--config", str(experiment), *flags, "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"])
    assert "val/accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_method(method, data_flags, capsys):
    main(["fit", "--config", str(DIGITS), "--config", str(method), "--trainer.fast_dev_run", "true", *CPU])
    assert "val/accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("path", [*EXPERIMENTS, *METHODS], ids=name)
def test_starts_with_what_it_is(path):
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=name)
def test_experiment_names_no_method(experiment):
    file = read_config(str(experiment))
    assert file.is_experiment
    assert not file.is_method
    assert "trainer.callbacks" not in file.settings
    assert sorted(file.callbacks) == ["ModelCheckpoint", "RichProgressBar"]
    assert not any("clip" in key or "weight_decay" in key for key in file.settings)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=name)
def test_what_every_experiment_keeps(experiment, capsys):
    config = resolved(capsys, "--config", experiment)
    assert config["seed_everything"] == 0
    assert config["trainer"]["logger"]["class_path"].endswith(".CSVLogger")
    assert config["trainer"]["logger"]["init_args"]["name"] == f"{experiment.parent.name}-{experiment.stem}"
    checkpoint = config["trainer"]["callbacks"][0]["init_args"]
    assert (checkpoint["monitor"], checkpoint["mode"], checkpoint["save_last"]) == ("val/accuracy", "max", True)
    assert (checkpoint["filename"], checkpoint["auto_insert_metric_name"]) == ("best", False)


def test_all_models_of_the_paper():
    names = "densenet121 densenet169 mobilenetv2 resnet101 resnet152 resnet56 vgg16 xception"
    assert [path.stem for path in CIFAR10] == names.split()


@pytest.mark.parametrize("experiment", CIFAR10, ids=name)
def test_settings_of_the_paper(experiment, capsys):
    config = resolved(capsys, "--config", experiment)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert model["optimizer"]["class_path"] == "torch.optim.Adam"
    assert model["optimizer"]["init_args"]["lr"] == 1e-3
    assert model["optimizer"]["init_args"]["weight_decay"] == 0
    assert model["lr_scheduler"] is None
    assert (model["num_classes"], model["model_kwargs"]) == (10, None)
    assert (data["batch_size"], data["augment"]) == (256, False)
    assert config["trainer"]["max_epochs"] == 100


class TestWhatMethodsChange:
    """Each method against the experiment by itself: what changes, and that nothing else does."""

    @pytest.fixture
    def change(self, capsys):
        plain = resolved(capsys, "--config", DIGITS)

        def change(method: str) -> tuple[dict, dict]:
            return plain, resolved(capsys, "--config", DIGITS, "--config", CONFIGS / f"methods/{method}.yaml")

        return change

    def test_baseline(self, change):
        plain, laid_over = change("baseline")
        assert laid_over == plain

    @pytest.mark.parametrize(
        ("method", "added"), [("znorm", "ZNormCallback"), ("gc", "GradientCentralizationCallback")]
    )
    def test_callbacks(self, change, method, added):
        plain, laid_over = change(method)
        assert class_paths(laid_over) == [*class_paths(plain), added]
        laid_over["trainer"]["callbacks"].pop()
        assert laid_over == plain

    def test_znorm_has_the_eps_of_the_paper(self, change):
        assert change("znorm")[1]["trainer"]["callbacks"][-1]["init_args"]["eps"] == 1e-10

    def test_clip(self, change):
        plain, laid_over = change("clip")
        assert laid_over["trainer"] == {
            **plain["trainer"],
            "gradient_clip_val": 0.1,
            "gradient_clip_algorithm": "norm",
        }
        assert laid_over["model"] == plain["model"]

    @pytest.mark.parametrize("weight_decay", ["1e-3", "1e-4"])
    def test_weight_decay(self, change, weight_decay):
        plain, laid_over = change(f"wd-{weight_decay}")
        optimizer = laid_over["model"]["init_args"].pop("optimizer")
        before = plain["model"]["init_args"].pop("optimizer")
        assert laid_over == plain
        assert optimizer["class_path"] == "torch.optim.AdamW"
        assert optimizer["init_args"]["weight_decay"] == float(weight_decay)
        for kept in ("lr", "betas", "eps"):
            assert optimizer["init_args"][kept] == before["init_args"][kept]

    def test_weight_decay_over_sgd(self, capsys):
        sgd = ["--model.init_args.optimizer", "torch.optim.SGD"]
        settings = {"lr": "0.05", "momentum": "0.9", "weight_decay": "0.2"}
        experiment = resolved(
            capsys,
            *("--config", DIGITS, *sgd),
            *(flag for key, value in settings.items() for flag in (f"{sgd[0]}.init_args.{key}", value)),
        )
        path = Path("sgd.yaml").absolute()
        path.write_text(yaml.safe_dump({key: experiment[key] for key in ("model", "data")}))
        config = resolved(capsys, "--config", path, "--config", CONFIGS / "methods/wd-1e-3.yaml")
        optimizer = config["model"]["init_args"]["optimizer"]
        assert optimizer["class_path"] == "torch.optim.AdamW"
        assert optimizer["init_args"]["lr"] == 0.05
        assert optimizer["init_args"]["weight_decay"] == 1e-3
        assert "momentum" not in optimizer["init_args"]
        assert torch.optim.AdamW([torch.zeros(1)], **optimizer["init_args"]).defaults["lr"] == 0.05

    @pytest.fixture(autouse=True)
    def _elsewhere(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)


def test_learns_digits(tmp_path, monkeypatch, capsys):
    """The newcomer's run, cut to a third."""
    monkeypatch.chdir(tmp_path)
    methods = CONFIGS / "methods"
    main(["fit", "--config", str(DIGITS), "--config", str(methods / "znorm.yaml"), "--trainer.max_epochs", "10", *CPU])
    best = max(float(word) for word in capsys.readouterr().out.partition("best ")[2].split()[:1])
    assert best >= 0.95
