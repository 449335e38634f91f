import pytest
import torch
import torch.nn.functional as F

from lightning_znorm.data.augmentation import random_crop_and_flip


def views(image: torch.Tensor, padding: int) -> set[bytes]:
    """Every image that may come out for this one, made the plain way."""
    height, width = image.shape[1:]
    padded = F.pad(image, (padding,) * 4)
    crops = [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return {view.numpy().tobytes() for crop in crops for view in (crop, crop.flip(-1))}


def distinct_images(n: int, channels: int = 3, height: int = 6, width: int = 5) -> torch.Tensor:
    return torch.randint(1, 256, (n, channels, height, width), dtype=torch.uint8)


def test_all_views_of_an_image_and_nothing_else():
    image = distinct_images(1)
    out = random_crop_and_flip(image.expand(2000, -1, -1, -1), padding=2)
    assert out.dtype == torch.uint8
    assert {view.numpy().tobytes() for view in out} == views(image[0], padding=2)


def test_each_image_gets_a_view_of_its_own():
    images = distinct_images(50)
    for image, view in zip(images, random_crop_and_flip(images), strict=True):
        assert view.numpy().tobytes() in views(image, padding=4)


def test_half_are_mirrored():
    images = distinct_images(4000)
    out = random_crop_and_flip(images, padding=0)
    mirrored = (out == images.flip(-1)).flatten(1).all(1)
    assert ((out == images).flatten(1).all(1) ^ mirrored).all()
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_the_seed_repeats_it():
    images = distinct_images(20)
    torch.manual_seed(1)
    first = random_crop_and_flip(images)
    second = random_crop_and_flip(images)
    torch.manual_seed(1)
    assert torch.equal(random_crop_and_flip(images), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("images", [distinct_images(1), torch.rand(3, 1, 4, 4)])
def test_input_is_left_alone(images):
    before = images.clone()
    out = random_crop_and_flip(images)
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert torch.equal(images, before)
