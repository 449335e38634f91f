import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_znorm.models import resnet20, resnet56
from lightning_znorm.models.resnet import BasicBlock


def conv(inputs: int, outputs: int) -> int:
    return inputs * outputs * 3 * 3


def norm(channels: int) -> int:
    return 2 * channels


def parameters_of_the_paper(n: int, num_classes: int, in_chans: int) -> int:
    """He et al. 2016, section 4.2: 6n + 1 convolutions without bias, each with its batch normalization, one linear."""
    total = conv(in_chans, 16) + norm(16)
    inputs = 16
    for channels in (16, 32, 64):
        total += conv(inputs, channels) + (2 * n - 1) * conv(channels, channels) + 2 * n * norm(channels)
        inputs = channels
    return total + 64 * num_classes + num_classes


@pytest.mark.parametrize(("factory", "n"), [(resnet20, 3), (resnet56, 9)])
@pytest.mark.parametrize(("num_classes", "in_chans"), [(10, 3), (2, 1)])
def test_parameters(factory, n, num_classes, in_chans):
    network = factory(num_classes=num_classes, in_chans=in_chans)
    assert sum(p.numel() for p in network.parameters()) == parameters_of_the_paper(n, num_classes, in_chans)
    weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 6 * n + 2
    assert all(m.bias is None for m in weighted if isinstance(m, nn.Conv2d))


def test_resnet56_has_0_85_million_parameters():
    assert sum(p.numel() for p in resnet56().parameters()) == 853_018


def test_feature_maps_of_table_6():
    network = resnet20()
    sizes = []
    for stage in (network.stage1, network.stage2, network.stage3):
        stage.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[1:])))
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8)])
def test_any_input_size(size):
    assert resnet20(in_chans=1)(torch.zeros(2, 1, *size)).shape == (2, 10)


def test_shortcut_subsamples_and_pads_with_zeros():
    block = BasicBlock(16, 32, stride=2)
    nn.init.zeros_(block.bn2.weight)  # silences the residual branch
    x = torch.rand(2, 16, 7, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, :16] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), expected)


def test_identity_shortcut_is_added_before_the_last_relu():
    block = BasicBlock(16, 16, stride=1)
    x = torch.randn(2, 16, 8, 8)
    residual = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), F.relu(x + residual))


def test_weights_start_from_he_normal():
    torch.manual_seed(0)
    for module in resnet56().modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 9000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)


def test_every_parameter_gets_a_gradient():
    network = resnet20()
    network(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
