"""Marks for tests of FSDP on a CPU, which torch 2.6 cannot run."""

import pytest
import torch

# torch 2.6 uses methods of streams that the CPU's streams lack.
FSDP2_RUNS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")

needs_fsdp2_on_cpu = pytest.mark.skipif(
    not FSDP2_RUNS_ON_CPU, reason="needs a torch newer than 2.6, where a CPU's streams lack what FSDP2 calls"
)

# torch 2.6 crashes when it copies the weights that it has gathered.
FSDP1_GATHERS_STATE_ON_CPU = FSDP2_RUNS_ON_CPU
