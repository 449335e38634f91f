"""The warning of padding rows that a method would move, and that it is right about them."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import SGD

from lightning_znorm import GradientCentralizationCallback, GradientTransform, SINGCallback, ZNormCallback


class Words(LightningModule):
    def __init__(self, *embeddings: nn.Module, shared: bool = False) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(embeddings)
        self.output = nn.Linear(3, 5, bias=False)
        if shared:
            self.output.weight = embeddings[0].weight

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        tokens = torch.tensor([[1, 2, 0], [3, 4, 0]])
        return sum((self.output(each(tokens)) * torch.arange(5)).square().mean() for each in self.embeddings)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=1e-3)


def embedding(padding_idx: int | None = 0, kind: type = nn.Embedding) -> nn.Module:
    torch.manual_seed(0)
    made = kind(5, 3, padding_idx=padding_idx)
    made.weight.data[0] = 1.0
    return made


@pytest.mark.parametrize(
    ("callback", "moves"),
    [
        (ZNormCallback, True),
        (lambda: ZNormCallback(centering="adaptive"), True),
        (GradientCentralizationCallback, False),
        (SINGCallback, False),
        (lambda: ZNormCallback(exclude="embeddings.*"), False),
        (lambda: ZNormCallback(include="output.*"), False),
    ],
)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_warns_where_the_row_moves(fit, warned, callback, moves: bool, kind: type) -> None:
    module = Words(embedding(kind=kind))
    fit(module, [torch.zeros(1)] * 3, callback(), max_epochs=2)
    row = module.embeddings[0].weight[0].detach()
    assert torch.equal(row, torch.ones(3)) is not moves
    assert len(warned()) == int(moves)


def test_the_warning_names_the_layers_and_the_way_out(fit, warned) -> None:
    module = Words(embedding(), embedding(None), embedding(4))
    fit(module, [torch.zeros(1)], ZNormCallback())
    (message,) = warned()
    assert message == (
        "ZNormCallback would train the padding row of embeddings.0.weight (padding_idx=0), embeddings.2.weight "
        "(padding_idx=4): its gradient is zero, and ZNorm subtracts the mean of the whole gradient from it, so that "
        "the row does not stay as it is. Leave the embedding out: "
        "exclude=['embeddings.0.weight', 'embeddings.2.weight']"
    )
    fit(Words(embedding()), [torch.zeros(1)], ZNormCallback(exclude="embeddings.0.weight"))
    assert len(warned()) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Words(embedding(None)),
        lambda: Words(embedding().requires_grad_(False)),
        lambda: Words(embedding(), shared=True),  # the output layer trains the row in any case
    ],
    ids=["none", "frozen", "shared"],
)
def test_nothing_is_said_where_no_row_is_to_stay(fit, warned, make) -> None:
    fit(make(), [torch.zeros(1)] * 2, ZNormCallback())
    assert warned() == []


def test_unknown_methods_are_not_judged(fit, warned) -> None:
    fit(Words(embedding()), [torch.zeros(1)], GradientTransform(torch.sign))
    assert warned() == []


def test_layer_of_a_users_own_and_a_shared_weight(fit, warned) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.padding_idx = nn.Parameter(torch.randn(5, 3)), 2

        def forward(self, tokens: Tensor) -> Tensor:
            return nn.functional.embedding(tokens, self.weight, self.padding_idx)

    own = Own()
    fit(Words(own, own), [torch.zeros(1)], ZNormCallback())
    (message,) = warned()
    assert "padding row of embeddings.0.weight (padding_idx=2): " in message
