import pytest
import torch

from lightning_znorm.models import ResNet
from lightning_znorm.tasks.networks import create_classifier, create_segmenter
from tests.processes import run_python


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 9), ("resnet56", 27)])
def test_our_own(name, blocks):
    network = create_classifier(name, num_classes=7, in_chans=1)
    assert isinstance(network, ResNet)
    assert sum(len(stage) for stage in (network.stage1, network.stage2, network.stage3)) == blocks
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


def test_timm_with_its_arguments():
    network = create_classifier("mobilenetv2_100", num_classes=7, in_chans=1, drop_rate=0.25)
    assert network.drop_rate == 0.25
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("wrong", "right"), [("resnet65", "resnet56"), ("densnet121", "densenet121"), ("vgg16bn", "vgg16_bn")]
)
def test_unknown_name(wrong, right):
    with pytest.raises(ValueError, match=rf"^No network is called '{wrong}'.*did you mean .*\b{right}\b.*\?$"):
        create_classifier(wrong, num_classes=10)


def test_unlike_any_name():
    with pytest.raises(ValueError, match=r"'///'.*: timm\.list_models\(\) lists the names\.$"):
        create_classifier("///", num_classes=10)


@pytest.mark.full
def test_timm_is_imported_for_its_networks_alone():
    program = """
import sys
from lightning_znorm.tasks import ClassificationTask
ClassificationTask("resnet20", num_classes=10)
assert "timm" not in sys.modules
"""
    process = run_python("-c", program, timeout=120)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize(
    ("create", "name"),
    [
        (create_classifier, "resnet20"),
        (create_classifier, "mobilenetv2_100"),
        (create_segmenter, "resnet50_unet"),
        (create_segmenter, "unetpp"),
        (create_segmenter, "attention_unet"),
    ],
)
def test_unknown_argument(create, name):
    with pytest.raises(TypeError, match=rf"^The network {name} has no argument 'depths'\.$"):
        create(name, num_classes=10, depths=3)


def test_another_error_of_types_is_not_taken_for_an_unknown_argument():
    with pytest.raises(TypeError) as raised:
        create_segmenter("attention_unet", channels=3)
    assert "has no argument" not in str(raised.value)
