"""Every file under configs/ runs: a new one is tested as soon as it is there."""

from pathlib import Path

import pytest
import torch
import yaml

from lightning_znorm.cli import main
from lightning_znorm.cli.config_files import read_config
from tests.data.jpegs import write_image_folder
from tests.medical import write_mask_folder, write_volumes

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted((CONFIGS / "methods").glob("*.yaml"))
EXPERIMENTS = sorted(set(CONFIGS.rglob("*.yaml")) - set(METHODS))
CIFAR10 = [path for path in EXPERIMENTS if path.parent.name == "cifar10"]
LGG = [path for path in EXPERIMENTS if path.parent.name == "lgg"]
MASKS = [path for path in EXPERIMENTS if path.parent.name in ("lgg", "own", "volumes")]
PCAM = [path for path in EXPERIMENTS if path.parent.name == "pcam"]
DIGITS = CONFIGS / "digits/resnet20.yaml"
CPU = ["--trainer.accelerator", "cpu"]
# In the default tier, one file for each data set takes a step; in the full tier, all files do.
QUICK = [
    "digits/resnet20",
    "cifar10/resnet56",
    "pcam/resnet56",
    "lgg/attention-unet",
    "imagenet/resnet50",
    "own/two-classes",
    "volumes/dynunet",
]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def trained(path: Path) -> object:
    return pytest.param(path, id=name(path), marks=[] if name(path) in QUICK else pytest.mark.full)


def resolved(capsys: pytest.CaptureFixture[str], *args: object) -> dict:
    """Return the settings that `--print_config` prints."""
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", *map(str, args), "--print_config"])
    assert exit_info.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def class_paths(config: dict) -> list[str]:
    return [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]


@pytest.fixture
def data_flags(request, fake_cifar10, fake_lgg, fake_pcam, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_volumes(tmp_path / "my volumes", cases=4, shape=(32, 36, 36))
    write_mask_folder(tmp_path / "my nuclei")
    write_mask_folder(tmp_path / "my cells", values=(0, 255))
    small = ["--data.init_args.image_size", "32", "--data.init_args.batch_size", "2"]
    return {
        "digits": [],
        "cifar10": ["--data.init_args.root", str(fake_cifar10), "--data.init_args.batch_size", "2"],
        "lgg": [
            *("--data.init_args.root", str(fake_lgg), "--data.init_args.batch_size", "2"),
            *("--data.init_args.val_fraction", "0.3", "--data.init_args.test_fraction", "0.3"),
        ],
        "pcam": ["--data.init_args.root", str(fake_pcam), "--data.init_args.batch_size", "2"],
        "own/two-classes": ["--data.init_args.root", str(tmp_path / "my nuclei"), *small],
        "own/pretrained": [
            *("--data.init_args.root", str(tmp_path / "my cells"), *small),
            *("--model.init_args.model.init_args.pretrained", "false"),  # the weights would be downloaded
        ],
        "volumes": [
            *("--data.init_args.root", str(tmp_path / "my volumes"), "--data.init_args.num_workers", "1"),
            *("--data.init_args.patch_size", "[32, 32, 32]", "--data.init_args.test_fraction", "0.3"),
            *("--model.init_args.model.init_args.filters", "[4, 8, 8, 8, 8]"),
            *("--model.init_args.inferer.init_args.roi_size", "[32, 32, 32]"),
        ],
        "imagenet": [
            *("--data.init_args.root", str(write_image_folder(tmp_path / "my images", classes=3, train=10, val=2))),
            *("--data.init_args.val_fraction", "0.3", "--model.init_args.num_classes", "3"),
            *("--data.init_args.batch_size", "2", "--data.init_args.num_workers", "1"),
            *("--data.init_args.image_size", "32", "--data.init_args.resize_size", "36"),
        ],
    }


@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
# Python 3.12 and later, when the loader starts its worker beside torch's threads.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("experiment", [trained(path) for path in EXPERIMENTS])
def test_experiment(experiment, data_flags, capsys):
    flags = data_flags.get(name(experiment)) or data_flags[experiment.parent.name]
    main(["fit", "--config", str(experiment), *flags, "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"])
    assert ("val/dice_per_patient" if experiment in MASKS else "val/accuracy") in capsys.readouterr().out


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
    pictures = ["MaskOverlay", "MaskWriter", "ScoreWriter"] if experiment in MASKS else []
    tuning = ["lightning.pytorch.callbacks.BackboneFinetuning"] if experiment.stem == "pretrained" else []
    usual = ["LastCheckpoint", "ModelCheckpoint", "RichProgressBar"]
    assert sorted(file.callbacks) == sorted([*pictures, *tuning, *usual])
    assert not any("clip" in key or "weight_decay" in key for key in file.settings)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=name)
def test_what_every_experiment_keeps(experiment, capsys):
    config = resolved(capsys, "--config", experiment)
    assert config["seed_everything"] == 0
    assert config["trainer"]["logger"]["class_path"].endswith(".CSVLogger")
    assert config["trainer"]["logger"]["init_args"]["name"] == f"{experiment.parent.name}-{experiment.stem}"
    best, last = config["trainer"]["callbacks"][:2]
    metric = "val/dice_per_patient" if experiment in MASKS else "val/accuracy"
    assert (best["init_args"]["monitor"], best["init_args"]["mode"]) == (metric, "max")
    assert (best["init_args"]["filename"], best["init_args"]["auto_insert_metric_name"]) == ("best", False)
    # Lightning writes its own last.ckpt only in epochs that improve: tests/test_cli_interruptions.py.
    assert best["init_args"]["save_last"] is None
    assert last["class_path"] == "lightning_znorm.LastCheckpoint"
    assert last["init_args"] == {"dirpath": None, "enable_version_counter": True}


def test_all_models_of_the_paper():
    names = "densenet121 densenet169 mobilenetv2 resnet101 resnet152 resnet56 vgg16 xception"
    assert [path.stem for path in CIFAR10] == names.split()
    assert [path.stem for path in PCAM] == ["resnet101", "resnet152", "resnet56"]
    assert [path.stem for path in LGG] == ["attention-unet", "resnet50-unet", "unetpp"]


@pytest.mark.parametrize("experiment", [*CIFAR10, *PCAM], ids=name)
def test_settings_of_the_paper(experiment, capsys):
    config = resolved(capsys, "--config", experiment)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert model["optimizer"]["class_path"] == "torch.optim.Adam"
    assert model["optimizer"]["init_args"]["lr"] == 1e-3
    assert model["optimizer"]["init_args"]["weight_decay"] == 0
    assert model["lr_scheduler"] is None
    assert model["model"] == experiment.stem or experiment in CIFAR10
    assert model["model_kwargs"] is None
    assert data["batch_size"] == 256
    assert not data.get("augment")
    assert (model["num_classes"], config["trainer"]["max_epochs"]) == ((10, 100) if experiment in CIFAR10 else (2, 50))


@pytest.mark.parametrize("experiment", LGG, ids=name)
def test_settings_of_the_paper_for_segmentation(experiment, capsys):
    config = resolved(capsys, "--config", experiment)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert model["model"] == experiment.stem.replace("-", "_")
    assert model["optimizer"]["class_path"] == "torch.optim.Adam"
    assert (model["optimizer"]["init_args"]["lr"], model["optimizer"]["init_args"]["weight_decay"]) == (1e-2, 0)
    assert model["lr_scheduler"]["class_path"] == "torch.optim.lr_scheduler.MultiStepLR"
    assert model["lr_scheduler"]["init_args"]["milestones"] == [30, 35, 40, 45]
    assert model["lr_scheduler"]["init_args"]["gamma"] == 0.1
    assert (data["batch_size"], config["trainer"]["max_epochs"], data["augment"]) == (128, 50, False)


def test_imagenet(capsys):
    config = resolved(capsys, "--config", CONFIGS / "imagenet/resnet50.yaml")
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert (model["model"], model["num_classes"]) == ("resnet50", 1000)
    assert (data["image_size"], data["resize_size"]) == (224, 256)
    assert (trainer["devices"], trainer["num_nodes"], trainer["precision"]) == ("auto", 1, "bf16-mixed")
    assert model["lr_scheduler"]["init_args"]["T_max"] == trainer["max_epochs"]
    paths = (CONFIGS / "imagenet/resnet50.yaml", CONFIGS / "methods/wd-1e-4.yaml")
    decayed = resolved(capsys, "--config", paths[0], "--config", paths[1])["model"]["init_args"]
    assert decayed["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert decayed["optimizer"]["init_args"]["lr"] == 1e-3
    assert decayed["lr_scheduler"] == model["lr_scheduler"]


class TestWhatMethodsChange:
    """Each method compared with the experiment alone: the expected settings change, and nothing else does."""

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
        ("method", "added"),
        [
            ("znorm", "ZNormCallback"),
            ("znorm-weights", "ZNormCallback"),
            ("znorm-adaptive", "ZNormCallback"),
            ("gc", "GradientCentralizationCallback"),
        ],
    )
    def test_callbacks(self, change, method, added):
        plain, laid_over = change(method)
        assert class_paths(laid_over) == [*class_paths(plain), added]
        laid_over["trainer"]["callbacks"].pop()
        assert laid_over == plain

    def test_znorm_has_the_eps_of_the_paper(self, change):
        assert change("znorm")[1]["trainer"]["callbacks"][-1]["init_args"]["eps"] == 1e-10

    def test_variants_of_znorm_differ_in_one_option(self, change):
        plain, weights, adaptive = (
            change(f"znorm{variant}")[1]["trainer"]["callbacks"][-1]["init_args"]
            for variant in ("", "-weights", "-adaptive")
        )
        assert (plain["min_ndim"], plain["centering"]) == (0, "full")
        assert weights == {**plain, "min_ndim": 2}
        assert adaptive == {**plain, "centering": "adaptive"}

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


@pytest.mark.parametrize(("epochs", "accuracy"), [(2, 0.8), pytest.param(10, 0.95, marks=pytest.mark.full)])
def test_learns_digits(epochs, accuracy, tmp_path, monkeypatch, capsys):
    """The newcomer's run, cut to a third of its epochs, and to fewer."""
    monkeypatch.chdir(tmp_path)
    methods = [str(DIGITS), str(CONFIGS / "methods/znorm.yaml")]
    flags = ["--trainer.max_epochs", str(epochs), *CPU]
    main(["fit", *(flag for method in methods for flag in ("--config", method)), *flags])
    best = max(float(word) for word in capsys.readouterr().out.partition("best ")[2].split()[:1])
    assert best >= accuracy
