"""Lets torch 2.6 run FSDP2 on a CPU, so that the tests of gradients and strategies are the same under every torch."""

import torch

LACK_EVENTS = not hasattr(torch.cpu.Stream, "record_event")  # as in torch 2.6, whose FSDP2 asks its streams for them


def give_events() -> None:
    """Gives streams of the CPU events, if they have none. Nothing on a CPU is asynchronous, nor waited for."""
    if LACK_EVENTS:
        torch.cpu.Stream.record_event = lambda self, event=None: event or torch.cpu.Event()
        torch.cpu.Stream.wait_event = lambda self, event: None
