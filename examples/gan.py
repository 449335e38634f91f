"""ZNorm for a GAN: manual optimization, two optimizers, one callback.

Each step normalizes the gradients of its own optimizer. The generator's loss also leaves gradients in the
discriminator; these stay as they are.

The GAN learns to draw 8x8 digits. Before and after training, 1,797 drawings are compared with the 1,797 real digits.

    python examples/gan.py
"""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_znorm import ZNormCallback


class GAN(LightningModule):
    def __init__(self, latent: int = 16) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.latent = latent
        # No bias in front of a normalization: its gradient is rounding noise, to which ZNorm would give unit size.
        self.generator = nn.Sequential(
            nn.Linear(latent, 128, bias=False),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Linear(128, 128, bias=False),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.Sigmoid(),
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, 128),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(128, 128),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(128, 1),
        )

    def draw(self, count: int) -> Tensor:
        return self.generator(torch.randn(count, self.latent, device=self.device))

    def training_step(self, real: Tensor) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        drawn = self.draw(len(real))

        # softplus(-logit) is the cross entropy of the answer "real", softplus(logit) that of "drawn".
        loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(drawn.detach())).mean()
        discriminator_optimizer.zero_grad()
        self.manual_backward(loss)
        discriminator_optimizer.step()

        loss = F.softplus(-self.discriminator(drawn)).mean()
        generator_optimizer.zero_grad()
        self.manual_backward(loss)
        generator_optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), lr=5e-4, betas=(0.5, 0.999)) for network in networks]


@torch.no_grad()
def judged(gan: GAN, real: Tensor) -> str:
    distances = torch.cdist(gan.draw(len(real)), real)
    return (
        f"a drawing is {distances.amin(dim=1).mean():.2f} from the nearest real digit, "
        f"a real digit {distances.amin(dim=0).mean():.2f} from the nearest drawing"
    )


def main() -> None:
    seed_everything(0)
    real = torch.as_tensor(load_digits().data / 16, dtype=torch.float32)
    gan = GAN()
    print(f"before training: {judged(gan, real)}")
    trainer = Trainer(
        max_epochs=30, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[ZNormCallback()]
    )
    trainer.fit(gan, DataLoader(real, batch_size=64, shuffle=True))
    print(f"after training: {judged(gan, real)}")


if __name__ == "__main__":
    main()
