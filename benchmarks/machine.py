"""What GPU benchmarks run on: ``python -m benchmarks.machine``.

It prints the date, the device and its driver, and versions; it fails if there is no CUDA device.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "triton", "lightning", "torchvision", "timm", "torchmetrics", "pytorch_optimizer", "deepspeed")


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is not installed"


def driver() -> str:
    """Return the version of the device's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return process.stdout.split("\n")[0]


def main() -> int:
    argparse.ArgumentParser(description="What GPU benchmarks run on.").parse_args()
    print(f"date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC")
    print(f"python {platform.python_version()}, {', '.join(map(installed, PACKAGES))}")
    print(f"LIGHTNING_ZNORM_KERNEL: {os.environ.get('LIGHTNING_ZNORM_KERNEL', 'not set')}")
    if not torch.cuda.is_available():
        print("There is no CUDA device, or this build of torch cannot use it.")
        return 1
    device = torch.cuda.get_device_properties(0)
    print(
        f"device: {device.name}, {device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} "
        f"multiprocessors, driver {driver()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
