"""Memory of the activations of the networks of configs/lgg: ``python -m benchmarks.activations``.

It counts the bytes that the forward pass and the loss save for the backward pass: each storage once, without the
weights. A step of two images less a step of one is what an image needs, and what remains of the step of one image is
needed once, such as autocast's copies of the weights. Weights, their gradients and Adam's two moments come on top. What
operations allocate while they run is not counted, nor are metrics.

It runs on the CPU. A CPU without native bfloat16 emulates it, slowly. Autocast keeps other operations in float32 on a
GPU than on a CPU, so there the figures of bf16-mixed are estimates.
"""

import argparse

import torch

from lightning_znorm.tasks import SegmentationTask

NETWORKS = ("resnet50_unet", "unetpp", "attention_unet")
PRECISIONS = {"32-true": False, "bf16-mixed": True}
MIB, GIB = 2**20, 2**30


def saved_bytes(task: SegmentationTask, size: int, batch_size: int, autocast: bool) -> int:
    """Return the bytes that one training step saves for its backward pass, without the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*task.parameters(), *task.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # The tensors are kept, so that no address is used twice.
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    images = torch.rand(batch_size, 3, size, size)
    masks = (torch.rand(batch_size, 1, size, size) < 0.1).float()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = task.logits_of_all_outputs(images)
        loss = torch.stack([task.compute_loss(logits, masks) for logits in outputs]).mean()
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of the activations of the networks of configs/lgg.")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS, help="default: all")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS, help="default: both")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels (default: 256)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, CPU, saved for the backward pass, images of {args.size}x{args.size}\n")
    print("| network        | precision  | MiB an image | MiB once | weights and Adam, MiB | GiB at batch 128 |")
    print("| -------------- | ---------- | -----------: | -------: | --------------------: | ---------------: |")
    for name in args.networks:
        task = SegmentationTask(name).train()
        weights = 4 * sum(weight.numel() * weight.element_size() for weight in task.parameters())
        for precision in args.precisions:
            one, two = (saved_bytes(task, args.size, images, PRECISIONS[precision]) for images in (1, 2))
            image, once = two - one, 2 * one - two
            print(
                f"| {name:14} | {precision:10} | {image / MIB:12.1f} | {once / MIB:8.1f} | {weights / MIB:21.1f} | "
                f"{(128 * image + once + weights) / GIB:16.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
