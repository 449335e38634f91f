"""ZNorm in two processes (DDP), on the CPU.

DDP averages the gradients before the callback sees them. So every process normalizes the same numbers and takes the
same step, which is also the step of a single process with twice the batch. Lightning starts the second process itself.

    python examples/ddp.py
"""

from functools import partial

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_znorm import ZNormCallback
from lightning_znorm.data import DigitsDataModule
from lightning_znorm.tasks import ClassificationTask


def main() -> None:
    seed_everything(0)
    task = ClassificationTask("resnet20", num_classes=10, in_chans=1, optimizer=partial(torch.optim.Adam, lr=1e-3))
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        callbacks=[ZNormCallback()],
    )
    trainer.fit(task, datamodule=DigitsDataModule(batch_size=32))
    weights = torch.cat([parameter.detach().flatten() for parameter in task.parameters()])
    print(f"process {trainer.global_rank} of {trainer.world_size}: sum of the weights {weights.double().sum():.12f}")
    if trainer.is_global_zero:
        print(f"validation accuracy {trainer.callback_metrics['val/accuracy']:.3f}")


if __name__ == "__main__":
    main()
