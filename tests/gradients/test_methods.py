"""transform_grads_ with methods of a user's own."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_znorm import GradientTransform
from lightning_znorm.functional import attach, transform_grads_, zscore_grads_
from lightning_znorm.gradients import SING, AffineMethod, Statistics, UnsupportedGradientError, ZScore
from lightning_znorm.gradients.kernels import transform_segments_
from lightning_znorm.gradients.shards import unsharded_segments
from tests.gradients.reference import sing, wide, zscore

pytestmark = pytest.mark.usefixtures("each_kernel")


class RMSNorm(AffineMethod):
    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
        return None, (stats.std.square() + stats.mean.abs().square()).rsqrt()


class RowZScore(AffineMethod):
    over = "row"

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
        return stats.mean, stats.std.reciprocal()


class HalfCentered(AffineMethod):
    needs_std = False

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
        return stats.mean / 2, None


class Counted(AffineMethod):
    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
        assert stats.m2 is not None
        return None, stats.m2 / stats.m2 * stats.count


def applied(method: AffineMethod, *grads: Tensor, loss_scale: Tensor | None = None) -> list[Tensor]:
    copies = [grad.clone() for grad in grads]
    transform_segments_(unsharded_segments(copies, method), method, loss_scale)
    return [wide(grad) for grad in copies]


GRADS = [
    torch.randn(shape, generator=torch.Generator().manual_seed(5)) + 0.3
    for shape in [(40, 30), (40, 30), (7,), (7,), (9,), (200, 150), (800, 900)]
]


def test_scale_without_shift() -> None:
    for got, grad in zip(applied(RMSNorm(), *GRADS), GRADS, strict=True):
        torch.testing.assert_close(got, wide(grad) / wide(grad).square().mean().sqrt(), rtol=0, atol=2e-5)


def test_shift_without_scale() -> None:
    for got, grad in zip(applied(HalfCentered(), *GRADS), GRADS, strict=True):
        torch.testing.assert_close(got, wide(grad) - wide(grad).mean() / 2, rtol=0, atol=2e-6)


def test_counts() -> None:
    for got, grad in zip(applied(Counted(), *GRADS), GRADS, strict=True):
        torch.testing.assert_close(got, wide(grad) * grad.numel(), rtol=2e-5, atol=0.5)


def test_rows_with_deviation() -> None:
    for got, grad in zip(applied(RowZScore(), *GRADS), GRADS, strict=True):
        if grad.ndim == 1:  # rows of one element
            assert torch.equal(got, wide(grad))
            continue
        rows = torch.stack([zscore(row, eps=0.0) for row in grad])
        torch.testing.assert_close(got, rows, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_sing(dtype: torch.dtype, eps: float) -> None:
    grads = [*GRADS, torch.randn(40, 1), torch.randn(1)]
    params = [nn.Parameter(torch.zeros_like(grad, dtype=dtype)) for grad in grads]
    for seed, param in enumerate(params):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).to(dtype) + 0.3
    before = [param.grad.clone() for param in params]
    transform_grads_(params, SING(eps))
    for param, grad in zip(params, before, strict=True):
        expected = sing(grad, eps) if grad.numel() > 1 else wide(grad)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(wide(param.grad), expected, rtol=tolerance, atol=tolerance * 1e-2)


def test_sing_of_constant_rows_is_zero() -> None:
    param = nn.Parameter(torch.zeros(3, 999))
    param.grad = torch.tensor([[1000.3], [-0.7], [0.0]]).expand(3, 999).contiguous()
    transform_grads_(param, SING())
    # A row of large constants leaves no digits for the others.
    assert param.grad[0].abs().max() == 0
    alone = nn.Parameter(torch.zeros(2, 5))
    alone.grad = torch.tensor([[0.1], [0.1]]).expand(2, 5).contiguous()
    transform_grads_(alone, SING())
    assert alone.grad.abs().max() == 0


@pytest.mark.parametrize(("over", "needs_std"), [("tensor", True), ("row", False)])
def test_std_over_is_about_rows_with_a_deviation(over: str, needs_std: bool) -> None:
    options = {"over": over, "needs_std": needs_std, "std_over": "row" if over == "tensor" else "tensor"}
    with pytest.raises(TypeError, match=r"Whole\.std_over = '\w+' is about deviations of rows"):
        type("Whole", (RMSNorm,), options)


def test_misspelt_std_over_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"Rows\.std_over must be None, 'tensor' or 'row', got 'rows'"):

        class Rows(RMSNorm):
            std_over = "rows"  # type: ignore[assignment]


FORMER_NAME = r"\w+\.pooled is now called std_over: write `std_over = \"tensor\"` .* Version 0\.2 removes the old name"


class TestPooled:
    """The former name of ``std_over``: users' methods that set it work as before, with a warning."""

    def test_sets_std_over(self) -> None:
        with pytest.warns(FutureWarning, match=FORMER_NAME) as caught:

            class Pooled(RowZScore):
                pooled = True

        assert caught[0].filename == __file__
        assert (Pooled.std_over, RowZScore.std_over) == ("tensor", None)
        weight = nn.Parameter(torch.zeros(4, 5))
        weight.grad = torch.randn(4, 5)
        centred = wide(weight.grad - weight.grad.mean(1, keepdim=True))
        transform_grads_(weight, Pooled())
        torch.testing.assert_close(wide(weight.grad), centred / centred.square().mean().sqrt(), rtol=0, atol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")

            class Renamed(Pooled):
                """Warned once."""

        assert Renamed.std_over == "tensor"

    def test_of_a_base_that_is_no_method_counts_too(self) -> None:
        class Mixin:
            pooled = True

        with pytest.warns(FutureWarning, match=FORMER_NAME):

            class Pooled(Mixin, RowZScore):
                pass

        assert Pooled.std_over == "tensor"

    def test_is_read_and_set(self) -> None:
        method = RowZScore()
        with pytest.warns(FutureWarning, match=FORMER_NAME) as caught:
            assert (SING.pooled, SING().pooled, ZScore().pooled, method.pooled) == (True, True, False, False)
        with pytest.warns(FutureWarning, match=FORMER_NAME):
            method.pooled = True
        assert {warning.filename for warning in caught} == {__file__}
        assert method.std_over == "tensor"

    def test_set_on_the_class_later(self) -> None:
        class Late(RowZScore):
            pass

        Late.pooled = True
        weight = nn.Parameter(torch.zeros(2, 2))
        weight.grad = torch.tensor([[1.0, 3.0], [5.0, 25.0]])
        centred = torch.tensor([[-1.0, 1.0], [-10.0, 10.0]])
        with pytest.warns(FutureWarning, match=FORMER_NAME):
            transform_grads_(weight, Late())
        torch.testing.assert_close(weight.grad, centred / centred.square().mean().sqrt())

    def test_property_is_refused(self) -> None:
        with (
            pytest.warns(FutureWarning),
            pytest.raises(TypeError, match=r"Asked\.pooled must be True or False.*std_over"),
        ):

            class Asked(RowZScore):
                @property
                def pooled(self) -> bool:
                    return False

    def test_is_about_rows(self) -> None:
        with pytest.warns(FutureWarning), pytest.raises(TypeError, match=r"Whole\.pooled is about deviations of rows"):

            class Whole(RMSNorm):
                pooled = True


def test_needs_std_false_withholds_it() -> None:
    class Greedy(AffineMethod):
        needs_std = False

        def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
            return stats.mean, stats.std

    with pytest.raises(RuntimeError, match="needs_std = True"):
        applied(Greedy(), torch.randn(5))


@pytest.mark.parametrize("method", [RMSNorm(), RowZScore(), HalfCentered()], ids=lambda method: type(method).__name__)
def test_loss_scale_passes_through(method: AffineMethod) -> None:
    plain = applied(method, *GRADS)
    scaled = applied(method, *(grad * 4096 for grad in GRADS), loss_scale=torch.tensor(4096.0))
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other / 4096, one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("copies", [1, 2])
def test_huge_loss_scale(copies: int) -> None:
    # Its square overflows, and the z-scores would be zero.
    grads = [torch.randn(50) * 1e-9 for _ in range(copies)]
    scaled = applied(ZScore(), *(grad * 2.0**66 for grad in grads), loss_scale=torch.tensor(2.0**66))
    for got, grad in zip(scaled, grads, strict=True):
        torch.testing.assert_close(got / 2.0**66, zscore(grad), rtol=0, atol=1e-5)


@pytest.mark.parametrize("numel", [6, 20_000])
def test_loss_scale_does_not_hide_eps(numel: int) -> None:
    grad = torch.randn(numel)
    (got,) = applied(ZScore(eps=0.5), grad * 65536, loss_scale=torch.tensor(65536.0))
    torch.testing.assert_close(got / 65536, zscore(grad, eps=0.5), rtol=0, atol=1e-5)


def test_function() -> None:
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([-3.0, 0.5])
    pointer = param.grad.data_ptr()
    transform_grads_(param, torch.sign)
    assert param.grad.tolist() == [-1.0, 1.0]
    assert param.grad.data_ptr() == pointer


def test_function_of_another_shape_is_refused() -> None:
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([-3.0, 0.5])
    with pytest.raises(UnsupportedGradientError, match=r"shape \(\).*shape \(2,\)"):
        transform_grads_(param, torch.sum)


def test_function_that_returns_nothing_is_refused() -> None:
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([-3.0, 0.5])
    with pytest.raises(UnsupportedGradientError, match=r"made None from .*must return its replacement"):
        transform_grads_(param, lambda grad: None)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("method", [RMSNorm, 0.5, None])
def test_what_is_no_method_is_refused_at_once(method: object) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    uses = [lambda: transform_grads_([], method), lambda: GradientTransform(method)]  # type: ignore[arg-type]
    if method is not None:  # ZNorm, for attach
        uses.append(lambda: attach(optimizer, method))  # type: ignore[arg-type]
    for use in uses:
        with pytest.raises(TypeError, match="a gradient method is an AffineMethod object or a function"):
            use()


def test_misspelt_over_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"Rows\.over must be 'tensor' or 'row', got 'rows'"):

        class Rows(RMSNorm):
            over = "rows"  # type: ignore[assignment]


@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0)], ids=["number", "scalar tensor"])
def test_scale_of_another_shape_is_refused(scale: object) -> None:
    class Doubled(AffineMethod):
        def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
            return None, scale  # type: ignore[return-value]

    with pytest.raises(TypeError, match=r"Doubled\.affine must return .* of shape \(1,\)"):
        applied(Doubled(), torch.randn(5))


def test_parameters_by_mistake() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"Linear is a module: give its parameters\(\)"):
        zscore_grads_(model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"parameter 0 is not a tensor but a tuple"):
        zscore_grads_(model.named_parameters())  # type: ignore[arg-type]


def test_wrapper_without_hooks_is_refused() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    with pytest.raises(TypeError, match=r"Wrapper runs no hooks .*before it is wrapped"):
        attach(Wrapper(torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)))


def test_representation_names_what_was_given() -> None:
    assert repr(ZScore(eps=0.5)) == "ZScore(eps=0.5)"
    assert repr(RMSNorm()) == "RMSNorm()"


class InPlace(AffineMethod):
    """Changes what it is given, which kernels keep between steps."""

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
        return None, stats.count.sqrt_().reciprocal_()


@pytest.mark.parametrize("numel", [30, 3_000, 300_000])
def test_a_method_that_changes_the_counts_changes_them_for_itself(numel: int) -> None:
    for _ in range(3):
        for got, grad in zip(applied(InPlace(), torch.ones(numel), torch.ones(70)), (numel, 70), strict=True):
            torch.testing.assert_close(got, torch.full_like(got, grad**-0.5), rtol=1e-6, atol=0)
