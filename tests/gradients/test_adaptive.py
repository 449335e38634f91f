"""ZNorm with adaptive centring: its numbers, what is proved of it, and where it is as ZNorm and where it is not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_znorm import ZNormCallback
from lightning_znorm.functional import attach, transform_grads_, zscore_grads_
from lightning_znorm.gradients import ZScore
from tests.gradients.reference import wide, zscore
from tests.gradients.test_zscore import TOLERANCE, parameter

pytestmark = pytest.mark.usefixtures("each_kernel")

ADAPTIVE = ZScore(centering="adaptive")


def adaptive(grad: Tensor, eps: float = 1e-10) -> Tensor:
    param = parameter(grad.clone())
    zscore_grads_(param, eps=eps, centering="adaptive")
    assert param.grad is not None
    return param.grad


@st.composite
def gradients(draw: st.DrawFn) -> Tensor:
    """Gradients of any shape, scale and share of the mean, in float64; constant ones too."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3).filter(lambda shape: math.prod(shape) > 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    deviation = draw(st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e3]))
    mean = draw(st.sampled_from([0.0, 1e-3, 1.0, -30.0, 1e6]))
    grad = mean + deviation * torch.randn(shape, generator=generator, dtype=torch.float64)
    return grad * draw(st.sampled_from([1e-6, 1.0, 1e12]))


def cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.dot(first.flatten() / first.norm(), second.flatten() / second.norm()))


@given(gradients().filter(lambda grad: bool(grad.any())))
@settings(deadline=None, max_examples=200)
def test_descent_direction_for_every_gradient_that_is_not_zero(grad: Tensor) -> None:
    """And the inner product is n (s^2 + (1 - r) m^2) / (root + eps)."""
    z = adaptive(grad)
    product = float((z * grad).sum())
    assert product > 0
    mean, variance = float(grad.mean()), float(grad.var(correction=0))
    removed = variance / (variance + mean**2)
    root = math.sqrt(variance + (1 - removed) ** 2 * mean**2)
    assert product == pytest.approx(grad.numel() * (variance + (1 - removed) * mean**2) / (root + 1e-10), rel=1e-6)


@given(gradients().filter(lambda grad: bool(grad.any())))
@settings(deadline=None, max_examples=200)
def test_cosine_is_at_least_that_of_full_centring(grad: Tensor) -> None:
    full = zscore(grad)
    least = cosine(full, grad) if float(grad.std(correction=0)) > 1e-9 * float(grad.abs().max()) else 0.0
    assert cosine(adaptive(grad), grad) >= max(least, 0.9265) - 1e-9


def test_the_least_cosine() -> None:
    """Where the mean holds three tenths of the squared gradient."""
    grad = torch.tensor([1.0, -1.0], dtype=torch.float64) * 0.7**0.5 + 0.3**0.5
    assert cosine(adaptive(grad), grad) == pytest.approx((0.79**2 / 0.727) ** 0.5)


@given(gradients().filter(lambda grad: bool(grad.any())))
@settings(deadline=None, max_examples=200)
def test_root_mean_square_is_one(grad: Tensor) -> None:
    z = adaptive(grad, eps=0.0)
    assert float(z.square().mean()) == pytest.approx(1.0, rel=1e-6)


@given(gradients(), st.sampled_from([1e-3, 7.0, -2.0]))
@settings(deadline=None)
def test_the_scale_and_the_sign_of_a_gradient_pass_through(grad: Tensor, factor: float) -> None:
    expected = math.copysign(1.0, factor) * adaptive(grad, eps=0.0)
    torch.testing.assert_close(adaptive(factor * grad, eps=0.0), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0, 10.0, 1e3], ids="mean {} deviations".format)
@pytest.mark.parametrize("shape", [(2,), (7,), (40, 1), (16, 3, 3, 3), (300, 70)], ids=str)
def test_matches_definition(shape: tuple[int, ...], ratio: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(shape, generator=generator, dtype=torch.complex128) / 2 + ratio
    grad = (grad if dtype.is_complex else grad.real).to(dtype)
    expected = zscore(grad, centering="adaptive")
    torch.testing.assert_close(wide(adaptive(grad)), expected, rtol=0, atol=3 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("numel", [3, 600, 300_000])
def test_mean_a_million_times_the_deviation(numel: int, dtype: torch.dtype) -> None:
    """Even where the deviation is lost in the rounding of the gradient, the result is the sign of the mean."""
    size = 2e4 if dtype == torch.float16 else 1e6
    grad = (torch.randn(numel, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - size).to(dtype)
    expected = zscore(grad, centering="adaptive")
    torch.testing.assert_close(wide(adaptive(grad)), expected, rtol=0, atol=3 * TOLERANCE[dtype])
    torch.testing.assert_close(expected, -torch.ones_like(expected), rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("numel", [2, 600, 300_000])
@pytest.mark.parametrize("value", [-3.7, 1e-4, 0.0])
def test_constant_becomes_its_sign_and_zero_stays_zero(value: float, numel: int, dtype: torch.dtype) -> None:
    z = adaptive(torch.full((numel,), value, dtype=dtype))
    expected = torch.full_like(z, float(torch.sign(torch.tensor(value))))
    torch.testing.assert_close(z, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-18, 1e-25, 1e-39])
@pytest.mark.parametrize("numel", [2, 600, 300_000])
def test_gradients_so_small_that_squares_underflow(numel: int, scale: float) -> None:
    """Without eps, too: they are constant, or zero, but not amplified beyond unit size."""
    grad = (torch.randn(numel, generator=torch.Generator().manual_seed(4)) + 0.1) * scale
    assert adaptive(grad, eps=0.0).square().mean() <= 1.0 + 1e-4


@pytest.mark.parametrize("mean", [0.0, 1e-3])
def test_a_small_mean_leaves_znorm(mean: float) -> None:
    grad = torch.randn(1000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grad = (grad - grad.mean()) / grad.std(correction=0) + mean
    torch.testing.assert_close(adaptive(grad), zscore(grad), rtol=0, atol=2 * mean**3 + 1e-12)


@pytest.mark.parametrize("numel", [2, 600, 300_000])
def test_squares_that_overflow(numel: int) -> None:
    """A mean whose square overflows is no trouble. Deviations whose squares do are visible, as in ZNorm."""
    torch.testing.assert_close(adaptive(torch.full((numel,), -1e22)), -torch.ones(numel))
    alternating = torch.tensor([1e25, -1e25]).repeat(numel // 2)
    assert adaptive(alternating).isnan().all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("numel", [2, 600, 300_000])
def test_inf_and_nan_stay_visible(bad: float, numel: int) -> None:
    grad = torch.ones(numel)
    grad[-1] = bad
    assert adaptive(grad).isnan().all()


def test_one_element_stays() -> None:
    assert adaptive(torch.tensor([0.25])).tolist() == [0.25]


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-10])
def test_loss_scale(scale: float) -> None:
    weight = nn.Parameter(torch.zeros(600))
    weight.grad = (torch.randn(600, generator=torch.Generator().manual_seed(3)) + 2) * scale
    expected = zscore(weight.grad / scale, eps=0.5, centering="adaptive")
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    handle = attach(optimizer, ZScore(0.5, "adaptive"))
    optimizer.grad_scale = torch.tensor(scale)
    optimizer.step()
    handle.remove()
    torch.testing.assert_close(-wide(weight), expected, rtol=0, atol=1e-5)


def test_all_ways_to_ask_for_it_agree() -> None:
    grad = torch.tensor([4.0, 6.0])
    expected = torch.tensor([0.7754, 1.1827])  # mean 5, deviation 1, r = 1 / 26
    by_function, by_method, by_callback = (parameter(grad.clone()) for _ in range(3))
    zscore_grads_(by_function, centering="adaptive")
    transform_grads_(by_method, ADAPTIVE)
    transform_grads_(by_callback, ZNormCallback(centering="adaptive").method)
    for param in (by_function, by_method, by_callback):
        torch.testing.assert_close(param.grad, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrong", ["half", "Adaptive", None, True, 1])
def test_other_words_are_refused(wrong: object) -> None:
    for ask in (ZScore, ZNormCallback, lambda centering: zscore_grads_([], centering=centering)):
        with pytest.raises(ValueError, match="centering must be 'full' or 'adaptive', got "):
            ask(centering=wrong)


class TestNameInCheckpoints:
    def test_full_centring_has_the_name_that_it_had(self) -> None:
        assert repr(ZScore()) == "ZScore(eps=1e-10)"
        assert repr(ADAPTIVE) == "ZScore(eps=1e-10, centering='adaptive')"

    def test_subclass_with_options_of_its_own(self) -> None:
        class Own(ZScore):
            def __init__(self, k: int, centering: str = "full") -> None:
                super().__init__(centering=centering)
                self.k = k

        assert repr(Own(2)) == "Own(eps=1e-10, k=2)"
        assert repr(Own(2, "adaptive")) == "Own(eps=1e-10, centering='adaptive', k=2)"

    def test_the_two_have_different_states(self) -> None:
        assert ZNormCallback().state_key != ZNormCallback(centering="adaptive").state_key

    def test_method_that_was_pickled_before_there_was_a_choice(self) -> None:
        old = ZScore()
        vars(old).pop("centering")
        assert repr(old) == "ZScore(eps=1e-10)"
        weight = parameter(torch.tensor([4.0, 6.0]))
        transform_grads_(weight, old)
        assert weight.grad.tolist() == [-1.0, 1.0]
