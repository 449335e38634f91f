"""The documented commands train on two hosts, with the same weights on both, which equal those of one machine."""

import json
import os
import re
import shlex
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from lightning_znorm.cli import main
from tests.data.jpegs import write_image_folder
from tests.many_machines.documented import (
    LAUNCHER,
    SBATCH,
    TIMEOUT,
    TORCHRUN,
    free_port,
    torchrun,
    with_values,
    witnessed,
)
from tests.many_machines.namespaces import ADDRESSES, INTERFACE, two_hosts
from tests.many_machines.programs import Programs
from tests.many_machines.records import WITNESS, check_hosts, check_same_weights


def run(commands: Sequence[Sequence[str]], environment: Mapping[str, str], cwd: Path) -> str:
    """Run one program on each host to its end."""
    with Programs(commands, [environment] * len(commands), cwd) as programs:
        output = programs.end(timeout=150)
    assert programs.returncodes == [0] * len(commands), output
    assert "All distributed processes registered. Starting with 2 processes" in output
    return output


@pytest.mark.parametrize("block", [TORCHRUN, SBATCH, LAUNCHER], ids=["torchrun", "sbatch", "Lightning's launcher"])
def test_commands_name_settings_that_there_are(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The settings are read, and nothing is started."""
    nodes = 1 if block == LAUNCHER else 2
    given = block.replace("$SLURM_NNODES", "2").replace("$SLURM_NTASKS_PER_NODE", "8").replace("\\\n", "")
    command = shlex.split(given, comments=True)
    flags = [*command[command.index("lightning_znorm") + 1 :], *shlex.split(TIMEOUT)]
    with pytest.raises(SystemExit) as exit_info:
        main([*flags, "--print_config"])
    assert exit_info.value.code == 0
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (trainer["num_nodes"], int(trainer["devices"])) == (nodes, 8)
    assert trainer["strategy"]["init_args"]["timeout"] == "0:05:00"


@pytest.mark.full
def test_two_network_namespaces(tmp_path: Path, reference: Path) -> None:
    flags = witnessed(tmp_path)
    with two_hosts() as hosts:
        commands = [
            ["ip", "netns", "exec", host, *torchrun(node, ADDRESSES[0], 29500, flags)]
            for node, host in enumerate(hosts)
        ]
        run(commands, {**WITNESS, "GLOO_SOCKET_IFNAME": INTERFACE}, tmp_path)
    check_hosts(tmp_path, "TorchElasticEnvironment", ADDRESSES[0])
    check_same_weights(tmp_path, reference)


@pytest.mark.full
def test_number_of_machines_forgotten(tmp_path: Path) -> None:
    """Lightning would let each of two processes train by itself. Both are on one machine, where they start sooner."""
    command = torchrun(0, "127.0.0.1", free_port(), [])
    command = with_values(command, {"--nnodes": 1, "--nproc_per_node": 2})
    at = command.index("--trainer.num_nodes")
    del command[at : at + 2]
    with Programs([command], [{}], tmp_path) as programs:
        output = programs.end(timeout=120)
    assert programs.returncodes == [1]
    assert "error: torchrun has started 2 processes (WORLD_SIZE), but the Trainer works with 1" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_slurm(tmp_path: Path) -> None:
    """The file for sbatch, with a fake srun: two nodes with one task each."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SBATCH, flags=re.MULTILINE))
    nodes = int(options["nodes"])
    assert nodes == 2
    assert options["gres"] == f"gpu:{options['ntasks-per-node']}"  # one task per device
    script = tmp_path / "imagenet.sbatch"
    script.write_text(SBATCH)
    srun = tmp_path / "bin/srun"
    srun.parent.mkdir()
    srun.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).with_name("fake_srun.py")}" "$@"\n')
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
    images = write_image_folder(tmp_path / "images", classes=3, train=12, val=1)
    flags = [
        *("--data.init_args.root", str(images), "--data.init_args.image_size", "32"),
        *("--data.init_args.resize_size", "36", "--data.init_args.val_fraction", "0.25"),
        *("--data.init_args.batch_size", "4", "--data.init_args.num_workers", "1"),
        *("--model.init_args.model", "resnet20", "--model.init_args.num_classes", "3"),
        *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.accelerator", "cpu"),
        *("--trainer.enable_model_summary", "false", *witnessed(tmp_path)),
    ]
    environment = {
        **WITNESS,
        "PATH": f"{srun.parent}:{os.environ['PATH']}",
        "FLAGS_OF_THE_TEST": json.dumps(flags),
        "SLURM_JOB_ID": str(free_port(15000, 25000) - 15000),  # from which Lightning computes the port
        "SLURM_JOB_NAME": options["job-name"],
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
    }
    run([["bash", str(script)]], environment, tmp_path)
    check_hosts(tmp_path, "SLURMEnvironment", "localhost")
    check_same_weights(tmp_path)
    assert (tmp_path / "logs/imagenet-resnet50/first/checkpoints/last.ckpt").is_file()
