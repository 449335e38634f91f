"""Which kinds of FSDP can be tried on a CPU: all, but with torch 2.6."""

import pytest
import torch

# torch 2.6's asks the CPU's streams for more than they have.
FSDP2_RUNS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")

needs_fsdp2_on_cpu = pytest.mark.skipif(
    not FSDP2_RUNS_ON_CPU, reason="needs a torch newer than 2.6, where a CPU's streams lack what FSDP2 calls"
)

# torch 2.6's crashes when it copies the weights that it has gathered.
FSDP1_GATHERS_STATE_ON_CPU = FSDP2_RUNS_ON_CPU
