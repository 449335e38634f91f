from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from lightning_znorm.data.augmentation import random_crop_and_flip, random_flip_and_rotate


def views(image: torch.Tensor, padding: int) -> set[bytes]:
    """Return every possible result for this image, computed one by one."""
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("augment", [random_crop_and_flip, lambda images: random_flip_and_rotate(images)[0]])
def test_draws_do_not_depend_on_the_default_dtype(augment, dtype):
    images = distinct_images(20, height=6, width=6)
    torch.manual_seed(0)
    expected = augment(images)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(augment(images), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("images", [distinct_images(1), torch.rand(3, 1, 4, 4)])
def test_input_is_left_alone(images):
    before = images.clone()
    out = random_crop_and_flip(images)
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert torch.equal(images, before)


def dihedral(image: torch.Tensor) -> list[bytes]:
    """Return the eight orientations of a square image, computed one by one."""
    turns = [torch.rot90(image, k, (-2, -1)) for k in range(4)]
    return [view.contiguous().numpy().tobytes() for turn in turns for view in (turn, turn.flip(-1))]


class TestFlipAndRotate:
    def test_each_of_the_eight_views_as_often_and_nothing_else(self):
        image = distinct_images(1, height=6, width=6)
        (out,) = random_flip_and_rotate(image.expand(8000, -1, -1, -1))
        assert out.dtype == torch.uint8
        counts = Counter(view.numpy().tobytes() for view in out)
        assert set(counts) == set(dihedral(image[0]))
        assert len(counts) == 8
        assert min(counts.values()) > 850
        assert max(counts.values()) < 1150

    def test_image_and_mask_alike_and_each_by_its_own_draw(self):
        images = distinct_images(200, height=8, width=8)
        masks = torch.rand(200, 1, 8, 8) < 0.5
        views, views_of_masks = random_flip_and_rotate(images, masks)
        assert views_of_masks.dtype == torch.bool
        drawn = set()
        for image, mask, view, view_of_mask in zip(images, masks, views, views_of_masks, strict=True):
            way = dihedral(image).index(view.contiguous().numpy().tobytes())
            assert dihedral(mask)[way] == view_of_mask.contiguous().numpy().tobytes()
            drawn.add(way)
        assert drawn == set(range(8))

    def test_oblong_images_keep_their_shape(self):
        image = distinct_images(1, height=4, width=6)
        (out,) = random_flip_and_rotate(image.expand(500, -1, -1, -1))
        flips = [image[0], image[0].flip(-1), image[0].flip(-2), image[0].flip(-2, -1)]
        assert {view.numpy().tobytes() for view in out} == {view.contiguous().numpy().tobytes() for view in flips}

    def test_the_seed_repeats_it_and_input_is_left_alone(self):
        images = distinct_images(20, height=5, width=5)
        before = images.clone()
        torch.manual_seed(1)
        (first,) = random_flip_and_rotate(images)
        (second,) = random_flip_and_rotate(images)
        torch.manual_seed(1)
        assert torch.equal(random_flip_and_rotate(images)[0], first)
        assert not torch.equal(first, second)
        assert torch.equal(images, before)
