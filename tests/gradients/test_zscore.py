"""zscore_grads_: its numbers, on every kind of gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_znorm.functional import transform_grads_, zscore_grads_
from lightning_znorm.gradients import SING, AffineMethod, UnsupportedGradientError, ZScore
from tests.gradients.reference import wide, zscore

pytestmark = pytest.mark.usefixtures("each_kernel")

# z is of unit size, so these are absolute: a few units of rounding of the gradient's own type.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
    torch.complex64: 2e-5,
    torch.complex128: 1e-12,
}


def parameter(grad: Tensor | None, shape: tuple[int, ...] | None = None) -> nn.Parameter:
    """A parameter with this gradient."""
    like = torch.zeros(shape or ()) if grad is None else grad
    result = nn.Parameter(torch.zeros(like.shape, dtype=like.dtype))
    result.grad = grad
    return result


def check_zscore(*grads: Tensor, eps: float = 1e-10) -> None:
    """Normalizes all at once, in place, and compares each with its definition."""
    expected = [zscore(grad, eps) for grad in grads]
    pointers = [grad.data_ptr() for grad in grads]
    parameters = [parameter(grad) for grad in grads]
    zscore_grads_(parameters, eps=eps)
    for param, want, pointer in zip(parameters, expected, pointers, strict=True):
        assert param.grad is not None
        assert param.grad.data_ptr() == pointer
        torch.testing.assert_close(wide(param.grad), want, rtol=0, atol=TOLERANCE[param.grad.dtype] * 3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2,), (7,), (3, 5), (16, 3, 3, 3), (300, 70), (1, 40), (40, 1)], ids=str)
def test_matches_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(shape, generator=generator, dtype=torch.complex128) * 3 + 1
    check_zscore((grad if dtype.is_complex else grad.real).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_many_tensors_of_mixed_shapes_and_types(dtype: torch.dtype) -> None:
    # Equal small shapes are stacked, others share a block, the largest is cut into blocks.
    shapes = [(64,)] * 5 + [(8, 8)] * 3 + [(64, 64, 3, 3), (20_000,), (700_000,), (1100, 2000), (9,), (64,)]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator).to(dtype) * 10.0**index for index, shape in enumerate(shapes, -8)]
    check_zscore(*grads, *(grad.to(torch.float64, copy=True) for grad in grads[:4]))


def test_stack_larger_than_a_block() -> None:
    check_zscore(*(torch.randn(16_000) + index for index in range(70)))


@pytest.mark.parametrize("mean", [0.0, 1.0, -1e3, 1e5])
@pytest.mark.parametrize("numel", [1_000, 100_000, 2_000_000])
def test_large_mean_costs_no_more_digits_than_the_mean_has(mean: float, numel: int) -> None:
    grad = torch.randn(numel, generator=torch.Generator().manual_seed(2)) + mean
    expected = zscore(grad)
    param = parameter(grad)
    zscore_grads_(param)
    # What a rounded mean can do, in units of the deviation, which is 1; E[x^2] - E[x]^2 would be off by mean^2 * eps.
    tolerance = 2e-5 + 8 * torch.finfo(torch.float32).eps * abs(mean)
    torch.testing.assert_close(wide(param.grad), expected, rtol=0, atol=tolerance)


def test_deviation_far_below_the_mean_is_seen() -> None:
    grad = torch.tensor([1.0, 1.0 + 2**-18] * 500)  # a deviation of 16 units of rounding
    param = parameter(grad)
    zscore_grads_(param, eps=0.0)
    # The mean is right to two units of rounding, an eighth of the deviation.
    torch.testing.assert_close(param.grad, torch.tensor([-1.0, 1.0] * 500), rtol=0, atol=1 / 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_has_zero_mean_and_unit_deviation(dtype: torch.dtype) -> None:
    # Statistics taken in bfloat16 left a mean of -0.16 here.
    param = parameter((torch.randn(50_000, generator=torch.Generator().manual_seed(3)) + 0.5).to(dtype))
    zscore_grads_(param)
    z = wide(param.grad)
    assert abs(z.mean().item()) < 1e-3
    assert abs(z.std(correction=0).item() - 1) < 1e-3


def test_half_precision_keeps_a_small_eps() -> None:
    param = parameter(torch.tensor([0.0, 6e-8] * 8, dtype=torch.float16))
    zscore_grads_(param, eps=3e-8)  # zero in float16; as large as the deviation
    torch.testing.assert_close(param.grad, torch.tensor([-0.5, 0.5] * 8, dtype=torch.float16), rtol=1e-2, atol=0)


@pytest.mark.parametrize("eps", [0.0, 1e-3, 1.0])
def test_eps(eps: float) -> None:
    check_zscore(torch.randn(50) * 0.01, torch.randn(20_000) * 0.01, eps=eps)


def test_eps_is_absolute() -> None:
    param = parameter(torch.randn(1000, dtype=torch.float64) * 1e-12)
    zscore_grads_(param)
    assert param.grad.std(correction=0).item() == pytest.approx(1e-2, rel=0.1)


@pytest.mark.parametrize("eps", [-1e-10, math.inf, math.nan])
def test_bad_eps(eps: float) -> None:
    with pytest.raises(ValueError, match="eps"):
        zscore_grads_([], eps=eps)


def test_eps_as_text() -> None:
    with pytest.raises(TypeError, match="eps must be a number, got '1e-10'"):
        zscore_grads_([], eps="1e-10")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numel", [2, 3, 10, 999, 20_000, 1_000_000])
@pytest.mark.parametrize("copies", [1, 3])
def test_constant_becomes_zero(numel: int, copies: int, dtype: torch.dtype) -> None:
    for value in (1000.3, -0.1, 1e-7, 3.14e4, 0.0):
        params = [parameter(torch.full((numel,), value, dtype=dtype)) for _ in range(copies)]
        zscore_grads_(params)
        for param in params:
            assert torch.equal(param.grad, torch.zeros(numel, dtype=dtype)), value


def test_constant_but_for_rounding_becomes_zero() -> None:
    values = torch.full((5000,), 1000.3)
    values[::3] = torch.nextafter(values[0], torch.tensor(math.inf))
    param = parameter(values)
    zscore_grads_(param)
    assert torch.equal(param.grad, torch.zeros(5000))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_one_element_passes_through(shape: tuple[int, ...]) -> None:
    param = parameter(torch.full(shape, 0.25))
    zscore_grads_([param, parameter(torch.full(shape, 0.5))])
    assert torch.equal(param.grad, torch.full(shape, 0.25))


def test_empty_and_missing_are_skipped() -> None:
    empty, missing, other = parameter(torch.zeros(0, 3)), parameter(None, (3,)), parameter(torch.tensor([1.0, 3.0]))
    zscore_grads_([empty, missing, other])
    assert empty.grad is not None
    assert empty.grad.shape == (0, 3)
    assert missing.grad is None
    assert other.grad.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("numel", [8, 20_000])
@pytest.mark.parametrize("copies", [1, 2])
def test_inf_and_nan_stay_visible(bad: float, numel: int, copies: int) -> None:
    grads = [torch.randn(numel) for _ in range(copies)]
    grads[0][3] = bad
    params = [parameter(grad) for grad in grads]
    zscore_grads_(params)
    assert params[0].grad.isnan().all()
    for other in params[1:]:
        assert other.grad.isfinite().all()


def test_overflow_of_the_deviation_stays_visible() -> None:
    # The squares are inf in float32; a scale of 1 / inf would silently zero the gradient.
    param = parameter(torch.tensor([1e30, -1e30, 5e29]))
    zscore_grads_(param)
    assert param.grad.isnan().all()


BOUNDS = {  # of the deviation, times the square root of the number of elements: where the sum of squares is largest
    torch.float32: math.sqrt(torch.finfo(torch.float32).max),
    torch.bfloat16: math.sqrt(torch.finfo(torch.float32).max),
    torch.float64: math.sqrt(torch.finfo(torch.float64).max),
}


@pytest.mark.parametrize("method", [ZScore(), SING()], ids=["zscore", "sing"])
@pytest.mark.parametrize("mean", [0.0, 100.0], ids=["centred", "large mean"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_deviation_that_overflows_depends_on_the_number_of_elements(
    dtype: torch.dtype, mean: float, method: AffineMethod
) -> None:
    assert [float(f"{BOUNDS[torch.float32] / math.sqrt(numel):.1e}") for numel in (1, 512, 10**6)] == [
        *(1.8e19, 8.2e17, 1.8e16)  # as the docstring of zscore_grads_ says
    ]
    spread = 0.05 if dtype == torch.bfloat16 else 0.01  # of which the rounding of elements near the bound is a part
    mean *= dtype != torch.bfloat16  # whose digits would not hold both
    for numel in (4, 512, 1000, 10**6):
        signs = torch.ones(numel, dtype=torch.float64)
        signs[::2] = -1
        for factor in (1 - spread, 1 + spread):
            deviation = factor * BOUNDS[dtype] / math.sqrt(numel)
            grad = ((signs + mean) * deviation).to(dtype).view(2, -1)
            for laid in (grad, grad.t().contiguous().t()):
                param = parameter(laid.clone(memory_format=torch.preserve_format))
                transform_grads_(param, method)
                assert bool(param.grad.isfinite().all()) == (factor < 1)
                assert bool(param.grad.isnan().all()) == (factor > 1)


def test_no_deviation_overflows_in_half_precision() -> None:
    grad = torch.full((10**6,), 65504.0, dtype=torch.float16)
    grad[::2] = -65504.0
    param = parameter(grad)
    zscore_grads_(param)
    assert (param.grad.abs() == 1).all()


def layouts() -> dict[str, Tensor]:
    base = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(4))
    return {
        "channels_last": base.to(memory_format=torch.channels_last),
        "channels_last_3d": base.unsqueeze(0).to(memory_format=torch.channels_last_3d),
        "channels_last, one channel": torch.randn(6, 1, 4, 3).to(memory_format=torch.channels_last),
        "transposed": torch.randn(40, 30).t(),
        "strided slice": torch.randn(12, 10)[::2, 1::3],
        "column": torch.randn(9, 4)[:, 1],
        "offset view": torch.randn(100)[10:40].view(5, 6),
        "large transposed": torch.randn(300, 400).t(),
        "large slice": torch.randn(400, 400)[:, ::2],
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_in_place(layout: str, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        check_zscore(layouts()[layout])
        check_zscore(layouts()[layout], layouts()[layout])
    else:
        grad = layouts()[layout]
        check_zscore(torch.empty_strided(grad.shape, grad.stride(), dtype=dtype).copy_(grad))


def test_neighbours_in_a_shared_storage_are_untouched() -> None:
    bucket = torch.randn(4 * 30_000)  # as DDP's bucket views
    before = bucket.clone()
    params = [parameter(bucket[start : start + 30_000].view(300, 100)) for start in (0, 60_000)]
    zscore_grads_(params)
    for start in (0, 60_000):
        torch.testing.assert_close(
            bucket[start : start + 30_000].double(), zscore(before[start : start + 30_000]), rtol=0, atol=2e-5
        )
        assert torch.equal(bucket[start + 30_000 : start + 60_000], before[start + 30_000 : start + 60_000])


def test_expanded_gradient_is_replaced() -> None:
    param = parameter(torch.tensor([[1.0], [3.0]]).expand(2, 4))
    zscore_grads_(param)
    assert param.grad.tolist() == [[-1.0] * 4, [1.0] * 4]


def test_gradient_with_a_graph() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    weight.grad = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)[0]
    assert weight.grad.grad_fn is not None
    expected = zscore(weight.grad)
    zscore_grads_(weight)
    torch.testing.assert_close(weight.grad.detach(), expected)


def test_graph_through_the_gradients_is_not_recorded() -> None:
    param = parameter(torch.randn(5))
    with torch.enable_grad():
        zscore_grads_(param)
    assert param.grad.grad_fn is None


def test_shared_parameter_once() -> None:
    param = parameter(torch.randn(10))
    expected = zscore(param.grad, eps=1.0)
    zscore_grads_(iter([param, param]), eps=1.0)  # a second time would show, because of eps
    torch.testing.assert_close(param.grad.double(), expected, rtol=0, atol=1e-6)


def test_single_tensor() -> None:
    param = parameter(torch.tensor([1.0, 3.0]))
    zscore_grads_(param)
    assert param.grad.tolist() == [-1.0, 1.0]


def test_complex_deviation_is_that_of_torch_std() -> None:
    grad = torch.randn(64, dtype=torch.complex128)
    expected = (grad - grad.mean()) / grad.std(correction=0)
    param = parameter(grad)
    zscore_grads_(param, eps=0.0)
    torch.testing.assert_close(param.grad, expected)


def test_lazily_conjugated_gradients() -> None:
    weights = [nn.Parameter(torch.randn(6, dtype=torch.complex128)) for _ in range(2)]
    sum((weight.conj() * torch.randn(6)).abs().square().sum() for weight in weights).backward()
    assert all(weight.grad.is_conj() for weight in weights)
    expected = [zscore(weight.grad.resolve_conj()) for weight in weights]
    zscore_grads_(weights)
    for weight, want in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad.resolve_conj(), want)


def test_sparse_is_refused_before_anything_is_changed() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    first = parameter(torch.tensor([1.0, 2.0]))
    with pytest.raises(UnsupportedGradientError, match=r"parameter 1 is sparse .*shape \(10, 3\).*sparse=False"):
        zscore_grads_([first, embedding.weight])
    assert first.grad.tolist() == [1.0, 2.0]


shapes = st.lists(st.integers(1, 12), min_size=1, max_size=4).filter(lambda shape: math.prod(shape) > 1)
scales = st.floats(-6, 6).map(lambda exponent: 10.0**exponent)


@st.composite
def gradients(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    grad = torch.randn(draw(shapes), generator=generator, dtype=torch.float64) * draw(scales)
    return grad + draw(st.floats(-3, 3)) * grad.std(correction=0)


def normalized(grad: Tensor) -> Tensor:
    param = parameter(grad.clone())
    zscore_grads_(param)
    assert param.grad is not None
    return param.grad


@given(gradients())
@settings(deadline=None)
def test_lemma_4_1_inner_product_is_d_sigma(grad: Tensor) -> None:
    sigma = grad.std(correction=0)
    product = (normalized(grad) * grad).sum()
    # eps shrinks z by the factor sigma / (sigma + eps)
    torch.testing.assert_close(product, grad.numel() * sigma * sigma / (sigma + 1e-10), rtol=1e-9, atol=0)


@given(gradients())
@settings(deadline=None)
def test_theorem_4_2_descent_direction(grad: Tensor) -> None:
    assert (normalized(grad) * grad).sum() > 0


@given(gradients(), scales.filter(lambda scale: scale > 1e-3), st.floats(-100, 100))
@settings(deadline=None)
def test_invariant_to_positive_affine_maps(grad: Tensor, scale: float, shift: float) -> None:
    grad = grad / grad.std(correction=0)  # against which eps is 1e-7 at most
    torch.testing.assert_close(normalized(scale * (grad + shift)), normalized(grad), rtol=0, atol=1e-6)
