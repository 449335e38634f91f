"""Code in a stranger's checkpoint is found, and refused in one sentence, before anything runs it."""

import copy
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.strategies.fsdp import _distributed_checkpoint_load, _distributed_checkpoint_save
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from lightning_znorm.cli import main
from lightning_znorm.cli.checkpoints import check_checkpoint, check_names
from tests.data.somebody_else import as_somebody_else
from tests.fsdp import needs_fsdp2_on_cpu
from tests.processes import run_forked
from tests.test_configs import CONFIGS

# PyTorch warns if there is one process; torch 2.6 also when it saves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is .*uninitialized, assuming"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

DIGITS = str(CONFIGS / "digits" / "resnet20.yaml")
TRUST = "if you trust whoever made the checkpoint"


MKDIR = f"{os.mkdir.__module__}.mkdir"


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("witness",)


class Near:
    """Calls a given function when it is unpickled."""

    def __init__(self, reduced: tuple[Any, ...]) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran() -> bool:
    """Return whether the payload made its folder, and remove the folder."""
    there = Path("witness").is_dir()
    if there:
        Path("witness").rmdir()
    return there


def refused(path: str | Path, *named: str) -> str:
    with pytest.raises(ValueError, match=TRUST) as caught:
        check_checkpoint(str(path))
    assert not ran()
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in named), message
    return message


# A sharded checkpoint, as FSDP and FSDP2 write it


def state() -> dict[str, Any]:
    return {
        "model": {"weight": torch.arange(6.0).reshape(2, 3), "image": torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16)},
        "optimizer_0": {"param_groups": {"lr": 0.1, "betas": (0.9, 0.999), "foreach": None, "name": "weights"}},
    }


def save_parts(path: Path, **values: Any) -> Path:
    _distributed_checkpoint_save({**state(), **values}, path)
    torch.save({"epoch": 1, "pytorch-lightning_version": lightning.__version__}, path / "meta.pt")
    return path


def load_parts(path: Path) -> dict[str, Any]:
    loaded = state()
    loaded["model"] = {name: torch.full_like(weight, 7) for name, weight in loaded["model"].items()}
    loaded["optimizer_0"]["param_groups"] = dict.fromkeys(loaded["optimizer_0"]["param_groups"])
    _distributed_checkpoint_load(loaded, path)
    return loaded


def rewrite_index(path: Path, change: Callable[[Any], Any]) -> None:
    index = FileSystemReader(path).read_metadata()
    (path / ".metadata").write_bytes(pickle.dumps(change(index)))


def in_planner_data(index: Any) -> Any:
    index.planner_data["more"] = Payload()
    return index


def in_folder_name(index: Any) -> Any:
    index.storage_meta.checkpoint_id = Payload()
    return index


def in_value(index: Any) -> Any:
    next(iter(index.storage_data.values())).relative_path = Payload()
    return index


class TestParts:
    def test_those_that_pytorch_writes(self, folder: Path) -> None:
        path = save_parts(folder / "saved")
        check_checkpoint(str(path))
        loaded, expected = load_parts(path), state()
        assert all(torch.equal(loaded["model"][name], weight) for name, weight in expected["model"].items())
        assert loaded["optimizer_0"] == expected["optimizer_0"]

    @pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
    def test_those_of_other_versions(self, folder: Path, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Versions of pickle and of Python: some of 3.11 name the members of an Enum by ``getattr``."""
        path = save_parts(folder / "saved")
        index = FileSystemReader(path).read_metadata()
        (path / ".metadata").write_bytes(pickle.dumps(index, protocol))
        check_checkpoint(str(path))
        monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
        content = pickle.dumps(index, protocol)
        assert b"getattr" in content
        (path / ".metadata").write_bytes(content)
        check_checkpoint(str(path))

    @pytest.mark.parametrize("change", [lambda _: Payload(), in_planner_data, in_folder_name, in_value])
    def test_in_the_index(self, folder: Path, change: Callable[[Any], Any]) -> None:
        path = save_parts(folder / "saved")
        rewrite_index(path, change)
        pickle.loads((path / ".metadata").read_bytes())
        assert ran()  # if nothing checks the file before
        refused(path, f"{path}/.metadata names {MKDIR}, and may run any code")

    def test_in_a_value(self, folder: Path) -> None:
        path = save_parts(folder / "saved", callbacks={"mine": Payload()})
        _distributed_checkpoint_load({"callbacks": {"mine": None}}, path)
        assert ran()
        refused(path, f"{path}/__0_0.distcp (callbacks.mine) names {MKDIR}")

    def test_in_what_lightning_adds(self, folder: Path) -> None:
        path = save_parts(folder / "saved")
        torch.save({"epoch": Payload()}, path / "meta.pt")
        refused(path, f"{path}/meta.pt names {MKDIR}")
        torch.save({"epoch": Near((eval, ("open('witness', 'w')",)))}, path / "meta.pt")
        refused(path, f"{path}/meta.pt names", "eval, and may run any code")

    @pytest.mark.parametrize(
        ("reduced", "named"),
        [
            ((getattr, (_MEM_FORMAT_ENCODING, "__init__")), "builtins.getattr"),
            ((getattr, (torch.Size, "TORCH_CONTIGUOUS_FORMAT")), "builtins.getattr"),
            ((Path.touch, (Path("witness"),)), "pathlib.Path.touch"),
            ((torch.load, ("other.pt",)), "torch.serialization.load"),
            ((eval, ("open('witness', 'w')",)), "builtins.eval"),
        ],
    )
    def test_what_is_near_to_what_is_known(self, folder: Path, reduced: tuple[Any, ...], named: str) -> None:
        path = save_parts(folder / "saved")
        rewrite_index(path, lambda _: Near(reduced))
        refused(path, f"names {named}, and may run any code")

    @pytest.mark.parametrize("name", ["Metadata", "MetadataIndex", "TensorStorageMetadata"])
    def test_that_changes_the_classes(self, folder: Path, name: str) -> None:
        """With changed classes, PyTorch could find another entry than the one that was checked."""
        module = "torch.distributed.checkpoint.metadata"
        path = save_parts(folder / "saved")
        changes = f"c{module}\n{name}\n(N}}V__eq__\nctorch\nSize\nstb0".encode()
        (path / ".metadata").write_bytes(b"\x80\x04" + changes + (path / ".metadata").read_bytes()[2:])
        with pytest.raises(ValueError, match=f"cannot be read .it changes {name}"):
            check_checkpoint(str(path))

    def test_damaged(self, folder: Path) -> None:
        path = save_parts(folder / "saved")
        whole = (path / ".metadata").read_bytes()
        for content in (b"", b"text", whole[:-20], pickle.dumps([1]), pickle.dumps(None)):
            (path / ".metadata").write_bytes(content)
            with pytest.raises(
                ValueError, match=rf"^{path}/.metadata is not a checkpoint, or a damaged one: it cannot be"
            ):
                check_checkpoint(str(path))
        (path / ".metadata").write_bytes(whole)
        (path / "__0_0.distcp").write_bytes(b"")
        with pytest.raises(ValueError, match=r"__0_0.distcp \(optimizer_0.*\) is not a checkpoint, or a damaged one"):
            check_checkpoint(str(path))
        (path / "__0_0.distcp").unlink()
        with pytest.raises(ValueError, match=r".metadata is not a checkpoint, or a damaged one: .*No such file"):
            check_checkpoint(str(path))


SHARDED = """\
from torch.distributed.fsdp import fully_shard
from lightning_znorm.tasks import ClassificationTask

class Sharded(ClassificationTask):
    def configure_model(self):
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
"""
SHARDED_RUN = """\
model: {class_path: sharded.Sharded}
trainer:
  accelerator: cpu
  devices: 1
  strategy: {class_path: lightning.pytorch.strategies.ModelParallelStrategy}
  limit_train_batches: 2
  limit_val_batches: 1
"""


@pytest.mark.full
@needs_fsdp2_on_cpu
def test_resumed_from_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("sharded.py").write_text(SHARDED)
    monkeypatch.syspath_prepend(str(folder))
    Path("sharded.yaml").write_text(SHARDED_RUN)
    command = ["fit", "--config", DIGITS, "--config", "sharded.yaml"]
    log = Path("log")
    assert run_forked([*command, "--trainer.max_epochs", "1"], log) == 0, log.read_text()
    first, second = (Path("logs", "digits-resnet20", f"version_{n}", "checkpoints", "last.ckpt") for n in (0, 1))
    assert (first / ".metadata").is_file()

    resumed = [*command, "--trainer.max_epochs", "2", "--ckpt_path"]
    assert run_forked([*resumed, str(first)], log) == 0, log.read_text()
    assert torch.load(second / "meta.pt")["global_step"] == 4
    rewrite_index(second, in_planner_data)
    for path in (str(second), "last"):
        log.unlink()
        assert run_forked([*resumed, path], log) == 1
        assert f"error: {second}/.metadata names {MKDIR}, and may run any code" in log.read_text()
        assert not ran()


def test_what_can_be_read_once(folder: Path) -> None:
    os.mkfifo("pipe")
    for path in ("pipe", os.devnull):
        with pytest.raises(ValueError, match=f"^{path} is a pipe or a device, and a checkpoint is read several times"):
            check_checkpoint(path)


def test_torchs_advice_to_run_code_is_not_passed_on(folder: Path) -> None:
    Path("raw.ckpt").write_bytes(pickle.dumps({"state_dict": Payload()}))
    with pytest.raises(ValueError, match=r"^raw\.ckpt ") as caught:
        check_checkpoint("raw.ckpt")
    assert "weights_only` set to `False" not in str(caught.value)
    assert not ran()


class TestDeepSpeed:
    @pytest.fixture
    def saved(self, folder: Path) -> Path:
        """A checkpoint as DeepSpeed writes it, with DeepSpeed's objects."""
        pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install '.[deepspeed]'")
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        parts = folder / "saved" / "checkpoint"
        parts.mkdir(parents=True)
        (folder / "saved" / "latest").write_text("checkpoint")
        torch.save({"module": {"weight": torch.zeros(3)}, "epoch": 1}, parts / "mp_rank_00_model_states.pt")
        scalers = {"loss_scaler": LossScaler(2), "other": DynamicLossScaler.__new__(DynamicLossScaler)}
        scalers["other"].cur_scale = 8
        state = {"zero_stage": ZeroStageEnum(2), "mappings": {"weight": fragment_address(numel=3, start=0)}, **scalers}
        torch.save({"optimizer_state_dict": state}, parts / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        return folder / "saved"

    def test_its_own(self, saved: Path) -> None:
        before = set(torch.serialization.get_safe_globals())
        check_checkpoint(str(saved))
        assert set(torch.serialization.get_safe_globals()) == before

    @pytest.mark.parametrize(
        "name",
        [
            "checkpoint/mp_rank_00_model_states.pt",
            "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "checkpoint/zero/weight/fp32.pt",
            ".hidden/bf16_zero_pp_rank_0_mp_rank_00_optim_states.PT",
        ],
    )
    @pytest.mark.parametrize("archive", [True, False])
    def test_payload(self, saved: Path, name: str, archive: bool) -> None:
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"module": Payload()}, saved / name, _use_new_zipfile_serialization=archive)
        torch.load(saved / name, weights_only=False)
        assert ran()
        refused(saved, f"{saved / name} names {MKDIR}")

    @pytest.mark.parametrize("latest", ["latest", "latest_universal"])
    def test_behind_a_link(self, saved: Path, latest: str) -> None:
        (saved.parent / "elsewhere").mkdir()
        (saved / ".hidden").symlink_to(saved.parent / "elsewhere")
        (saved / latest).write_text(".hidden\n")
        torch.save(Payload(), saved.parent / "elsewhere" / "mp_rank_00_model_states.pt")
        refused(saved, f"{saved}/.hidden/mp_rank_00_model_states.pt names {MKDIR}")

    def test_in_a_folder_that_cannot_be_listed(self, saved: Path) -> None:
        """DeepSpeed opens some of its files by name."""
        saved.parent.chmod(0o755)
        (saved / "checkpoint").chmod(0o311)
        with as_somebody_else(), pytest.raises(PermissionError, match="saved/checkpoint"):
            check_checkpoint("saved")
        (saved / "checkpoint").chmod(0o755)

    def test_a_link_to_itself(self, saved: Path) -> None:
        (saved / "checkpoint" / "again").symlink_to(saved)
        check_checkpoint(str(saved))

    @pytest.mark.parametrize("tag", ["../other", "/other", "checkpoint/../../other"])
    def test_elsewhere(self, saved: Path, tag: str) -> None:
        (saved / "latest").write_text(tag)
        with pytest.raises(ValueError, match=f"^{saved}/latest names {tag}, which is not in this folder"):
            check_checkpoint(str(saved))


# A file


HPARAMS: dict[str, Any] = {
    "_class_path": "lightning_znorm.tasks.ClassificationTask",
    "model": "resnet20",
    "num_classes": 10,
    "in_chans": 1,
    "model_kwargs": None,
    "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001}},
    "lr_scheduler": None,
    "_instantiator": "lightning.pytorch.cli.instantiate_module",
}


def save_file(path: str, settings: dict[str, Any], **more: Any) -> None:
    content = {"state_dict": {}, "pytorch-lightning_version": lightning.__version__, "hyper_parameters": settings}
    torch.save({**content, **more}, path)


def test_payload_in_a_file() -> None:
    save_file("saved.ckpt", HPARAMS, callbacks=Payload())
    refused("saved.ckpt", f"saved.ckpt names {MKDIR}, and may run any code when it is loaded")


STRANGERS = """\
import os, torch
from lightning_znorm.tasks import ClassificationTask
os.mkdir("witness")
class Task(ClassificationTask): pass
class Optimizer(torch.optim.SGD): pass
class Network(torch.nn.Linear): pass
def make(params) -> torch.optim.Optimizer: return torch.optim.SGD(params)
"""


class TestNames:
    @pytest.fixture(autouse=True)
    def module(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """A module that makes a folder when it is imported."""
        Path("strangers.py").write_text(STRANGERS)
        Path("strangers.yaml").write_text("class_path: strangers.Optimizer")
        monkeypatch.syspath_prepend(str(folder))
        yield
        sys.modules.pop("strangers", None)

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"_class_path": "strangers.Task"}, "strangers.Task for model.class_path,"),
            (
                {"optimizer": {"class_path": "strangers.Optimizer"}},
                "strangers.Optimizer for model.init_args.optimizer.",
            ),
            ({"optimizer": "strangers.make"}, "strangers.make for model.init_args.optimizer,"),
            ({"optimizer": "{class_path: strangers.Optimizer}"}, "strangers.Optimizer for model.init_args.optimizer."),
            ({"optimizer": r'{"class_path": "\u0073trangers.Optimizer"}'}, "strangers.Optimizer for model"),
            ({"optimizer": "strangers.yaml"}, "strangers.yaml for model.init_args.optimizer,"),
            ({"optimizer": "' strangers.yaml'"}, " strangers.yaml for"),
            ({"model": {"class_path": "strangers.Network"}}, "strangers.Network for model.init_args.model.class_path,"),
            ({"lr_scheduler": [{"class_path": "strangers.Task"}]}, "model.init_args.lr_scheduler[0].class_path,"),
            (
                {"model_kwargs": {"a": {"b": {"class_path": "strangers.Network"}}}},
                "init_args.model_kwargs.a.b.class_path",
            ),
            ({"optimizer": "torch.optim.adam.torch.load"}, "torch.optim.adam.torch.load for"),
            ({"optimizer": "torch.optim.adam.Tensor"}, "torch.optim.adam.Tensor for"),
            ({"optimizer": "torch.hub.load"}, "torch.hub.load for"),
            ({"optimizer": "os.system"}, "os.system for"),
        ],
    )
    def test_refused(self, settings: dict[str, Any], named: str) -> None:
        if " strangers.yaml" in named:
            Path("strangers.yaml").rename(" strangers.yaml")
        assert named in self.refusal("test", settings)

    @pytest.mark.parametrize("command", ["fit", "validate", "predict"])
    def test_every_command(self, command: str) -> None:
        assert "strangers.Task for model.class_path" in self.refusal(command, {"_class_path": "strangers.Task"})

    def refusal(self, command: str, settings: dict[str, Any]) -> str:
        save_file("saved.ckpt", {**HPARAMS, **settings})
        with pytest.raises(SystemExit) as caught:
            main([command, "--config", DIGITS, "--ckpt_path", "saved.ckpt"])
        assert not ran()
        assert "strangers" not in sys.modules
        message = str(caught.value)
        assert message.startswith("error: saved.ckpt names ")
        assert TRUST in message
        assert "\n" not in message
        return message

    def test_imported_otherwise(self) -> None:
        """Without a check, the module makes its folder: the tests above would see it."""
        __import__("strangers")
        assert ran()

    def test_named_by_the_user(self) -> None:
        settings = {"_class_path": "strangers.Task", "optimizer": "strangers.make", "model": "strangers.yaml"}
        save_file("saved.ckpt", {**HPARAMS, **settings})
        given: dict[str, Any] = {"class_path": "strangers.Task", "init_args": {"optimizer": "strangers.make"}}
        with pytest.raises(ValueError, match=r"names strangers.yaml for model\.init_args\.model,"):
            check_names("saved.ckpt", given)
        given["init_args"]["model"] = "strangers.yaml"
        check_names("saved.ckpt", given)

    @pytest.mark.parametrize(
        "settings",
        [
            {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}},
            {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.MultiStepLR"}},
            {"_class_path": "lightning_znorm.tasks.SegmentationTask"},
            {"model": {"class_path": "monai.networks.nets.UNet"}, "loss": {"class_path": "monai.losses.TverskyLoss"}},
            {
                "model": "resnet18.a1_in1k",
                "model_kwargs": {"name": "data/a.b", "act_layer": "gelu", "texts": ["a.b", "{", "- a"]},
            },
            {"model": "convnext_tiny.fb_in22k_ft_in1k", "note": "as in arXiv:2408.01215, section 4.1. See docs."},
        ],
    )
    def test_other_settings(self, settings: dict[str, Any]) -> None:
        """The command takes such settings, with a warning, or refuses them later as another training's."""
        save_file("saved.ckpt", {**HPARAMS, **settings})
        check_names("saved.ckpt", {"class_path": HPARAMS["_class_path"], "init_args": copy.deepcopy(HPARAMS)})


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class TestAddress:
    @pytest.fixture
    def address(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """The address of a server of the folder."""
        monkeypatch.setenv("TORCH_HOME", str(folder / "downloaded"))
        handler = partial(QuietHandler, directory=str(folder))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = Thread(target=server.serve_forever)
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
            thread.join()

    def test_payload(self, address: str) -> None:
        """By default, Lightning loads a checkpoint at an address with ``weights_only=False``."""
        save_file("saved.ckpt", HPARAMS, callbacks=Payload())
        with pytest.raises(pickle.UnpicklingError, match=rf"GLOBAL {MKDIR}"):
            main(["test", "--config", DIGITS, "--trainer.logger", "false", "--ckpt_path", f"{address}/saved.ckpt"])
        assert Path("downloaded", "hub", "checkpoints", "saved.ckpt").exists()
        assert not ran()
