"""Which parameters a callback applies to; what does not fit the model is refused before training."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_znorm import GradientCentralizationCallback, GradientMonitor, GradientTransform, ZNormCallback
from lightning_znorm.gradients import UnsupportedGradientError
from tests.callbacks.training import LR, Training, amp, assert_every_step, assert_weights, batches, stepped, weights_of
from tests.gradients.reference import centralized, zscore

ALL = {"first.weight", "first.bias", "last.weight"}


@pytest.mark.parametrize(
    ("include", "exclude", "min_ndim", "chosen"),
    [
        ("*", (), 0, ALL),
        ("*", (), 1, ALL),
        ("*", (), 2, {"first.weight", "last.weight"}),
        ("*.weight", (), 0, {"first.weight", "last.weight"}),
        ("net.first.*", (), 0, {"first.weight", "first.bias"}),
        (["net.first.bias", "*last*"], [], 0, {"first.bias", "last.weight"}),
        ("*", "*first*", 0, {"last.weight"}),
        ("*", ["*.bias", "net.last.weight"], 0, {"first.weight"}),
        ("net.first.*", "*.bias", 0, {"first.weight"}),
        ("*first*", (), 2, {"first.weight"}),
        ("net.[fl]irst.weigh?", (), 0, {"first.weight"}),
    ],
)
def test_choice(
    fit, include: str | Sequence[str], exclude: str | Sequence[str], min_ndim: int, chosen: set[str]
) -> None:
    module, data = Training(), batches(2)
    fit(module, data, ZNormCallback(include=include, exclude=exclude, min_ndim=min_ndim))
    assert_every_step(module, data, chosen=chosen.__contains__)


@pytest.mark.parametrize("options", [{"exclude": "*first*"}, {"include": "net.last.weight"}])
def test_choice_of_the_other_callbacks(fit, options: dict[str, str]) -> None:
    for callback, method in [
        (GradientCentralizationCallback(**options), centralized),
        (GradientTransform(torch.sign, **options), torch.sign),
    ]:
        module, data = Training(), batches(2)
        fit(module, data, callback)
        assert_every_step(module, data, method=method, chosen=lambda name: name == "last.weight")


def test_min_ndim_of_centralization(fit) -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv1d(1, 4, 3, bias=False)
            self.linear = nn.Linear(16, 2, bias=False)

        def forward(self, batch: Tensor) -> Tensor:
            return self.linear(self.conv(batch.unsqueeze(1)).tanh().flatten(1))

    module, data = Training(Convolution()), batches(2)
    fit(module, data, GradientCentralizationCallback(min_ndim=3))
    assert_every_step(module, data, method=centralized, chosen=lambda name: name == "conv.weight")


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            ZNormCallback(include="net.fist.*"),
            r"ZNormCallback: the pattern 'net\.fist\.\*' matches none of the model's 3 parameters; "
            r"the nearest names are net\.first\.\w+, net\.first\.\w+, net\.last\.weight",
        ),
        (ZNormCallback(exclude=["*.bias", "*embed*"]), r"the pattern '\*embed\*' matches none"),
        (ZNormCallback(include=["*", "last.weight"]), r"the pattern 'last\.weight' .* nearest names are net\.last\.w"),
        (ZNormCallback(include="*.bias", exclude="*first*"), r"include=.*exclude=.*min_ndim=0 together leave none"),
        (ZNormCallback(min_ndim=3), r"min_ndim=3 together leave none of the model's 3 parameters"),
        (ZNormCallback(include=[]), r"include=\[\].* together leave none"),
        (GradientCentralizationCallback("*.conv.*"), r"GradientCentralizationCallback: the pattern '\*\.conv\.\*'"),
        (GradientTransform(torch.sign, "*.conv.*"), r"GradientTransform: the pattern '\*\.conv\.\*'"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_training(fit, callback, message: str) -> None:
    module = Training()
    with pytest.raises(ValueError, match=message):
        fit(module, batches(1), callback)
    assert not module.weights


def test_options_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="min_ndim must be at least 0, got -1"):
        ZNormCallback(min_ndim=-1)
    with pytest.raises(ValueError, match="eps must be finite and at least 0"):
        ZNormCallback(eps=-1e-10)


def unregistered(*registered: nn.Module) -> Training:
    """Trains layers of which the module does not know because they are in a list."""

    class Hidden(Training):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(*registered))
            self.hidden = [nn.Linear(6, 3)]

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.hidden[0](batch).square().sum()

        def configure_optimizers(self) -> SGD:
            return SGD([*self.parameters(), *self.hidden[0].parameters()], LR)

    return Hidden()


@pytest.mark.parametrize("callback_class", [ZNormCallback, GradientMonitor])
@pytest.mark.parametrize("options", [{"include": "net.0.*"}, {"exclude": "*.bias"}, {"include": ["*0*", "*.weight"]}])
def test_patterns_are_refused_for_parameters_without_names(fit, callback_class, options) -> None:
    module = unregistered(nn.Linear(6, 3))
    message = (
        rf"{callback_class.__name__}: include=.* are patterns on the names .* steps 2 that it does not register, such "
        r"as parameter 2 of group 0: register them .*, or leave the patterns out"
    )
    with pytest.raises(ValueError, match=message):
        fit(module, batches(1), callback_class(**options))
    assert not module.moved


@pytest.mark.parametrize("callback_class", [ZNormCallback, GradientMonitor])
def test_parameters_without_names_that_come_later(fit, callback_class) -> None:
    class Growing(Training):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            if batch_idx == 1:
                self.optimizers().add_param_group({"params": [nn.Parameter(torch.zeros(2))]})

    module = Growing()
    with pytest.raises(ValueError, match="steps 1 that it does not register, such as parameter 0 of group 1"):
        fit(module, batches(2), callback_class(exclude="*.bias"), log_every_n_steps=1)
    assert module.moved == [True]


@pytest.mark.parametrize("options", [{}, {"include": ["*"]}, {"min_ndim": 2}])
def test_default_patterns_choose_parameters_without_names(fit, options) -> None:
    module, data = unregistered(nn.Linear(6, 3)), batches(1)
    hidden = module.hidden[0]
    before = weights_of(hidden)
    fit(module, data, ZNormCallback(**options))
    assert_every_step(module, data, chosen=lambda name: name.endswith("weight") or "min_ndim" not in options)
    twin = copy.deepcopy(hidden).double()
    twin.load_state_dict(before)
    weight, bias = torch.autograd.grad(twin(data[0].double()).square().sum(), list(twin.parameters()))
    updates = {"weight": zscore(weight), "bias": bias if "min_ndim" in options else zscore(bias)}
    assert_weights(weights_of(hidden), {name: before[name].double() - LR * update for name, update in updates.items()})


def test_lazy_layers_that_leave_nothing_to_choose(fit) -> None:
    """Whether they do is known after the first forward pass."""

    class Lazy(Training):
        def on_train_start(self) -> None:  # there are no weights yet
            pass

    module = Lazy(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match=r"ZNormCallback: .*min_ndim=3 together leave none of the model's 2 param"):
        fit(module, batches(1), ZNormCallback(min_ndim=3))
    assert not module.weights


def test_lazy_layer_that_is_used_later(fit) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.later = nn.Linear(6, 3), nn.LazyLinear(3)
            self.count = 0

        def forward(self, batch: Tensor) -> Tensor:
            self.count += 1
            return (self.later if self.count > 1 else self.first)(batch)

    class Lazy(Training):
        def on_train_start(self) -> None:
            pass

        def on_train_batch_end(self, *_) -> None:
            if self.net.count > 1:
                self.weights.append(weights_of(self.net))

    net, data = Branches(), batches(3)
    module = Lazy(net)
    fit(module, data, ZNormCallback(min_ndim=2))
    before, after = module.weights
    assert_weights(after, stepped(net, before, data[2:], chosen=lambda name: name.endswith("weight")))


def test_layers_made_in_configure_model_are_known(fit) -> None:
    class Late(Training):
        def __init__(self) -> None:
            super().__init__(nn.Sequential())

        def configure_model(self) -> None:
            if len(self.net) == 0:
                torch.manual_seed(0)
                self.net.add_module("late", nn.Linear(6, 3, bias=False))

    module, data = Late(), batches(2)
    fit(module, data, ZNormCallback(include="net.late.weight"))
    assert_every_step(module, data)


def test_min_ndim_of_lazy_layers(fit) -> None:
    class Lazy(Training):
        def on_train_start(self) -> None:  # there are no weights yet
            pass

    net, data = nn.Sequential(nn.LazyLinear(3)), batches(3)
    module = Lazy(net)
    fit(module, data, ZNormCallback(min_ndim=2))
    for before, batch, after in zip(module.weights, data[1:], module.weights[1:], strict=False):
        assert_weights(after, stepped(net, before, [batch], chosen=lambda name: name.endswith("weight")))


def test_name_that_merely_ends_like_a_wrappers(fit) -> None:
    class OwnName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.my_orig_mod = nn.Linear(6, 3, bias=False)

        def forward(self, batch: Tensor) -> Tensor:
            return self.my_orig_mod(batch)

    module, data = Training(OwnName()), batches(1)
    fit(module, data, ZNormCallback(include="net.my_orig_mod.weight"))
    assert_every_step(module, data)


class SparseEmbedding(nn.Module):
    """Looks up words, the rounded absolute values of a batch, and projects their sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(5, 4, sparse=True)
        self.last = nn.Linear(4, 3, bias=False)

    def forward(self, batch: Tensor) -> Tensor:
        return self.last(self.words(batch.abs().round().long()).sum(1))


@pytest.mark.parametrize("precision", [dict, lambda: amp(init_scale=2.0**8)], ids=["32", "16-mixed"])
def test_sparse_gradient_is_refused_before_the_first_update(fit, precision) -> None:
    module = Training(SparseEmbedding())
    with pytest.raises(UnsupportedGradientError, match=r"net\.words\.weight is sparse.*leave this parameter out"):
        fit(module, batches(1), ZNormCallback(), **precision())
    assert_weights(weights_of(module.net), {name: value.double() for name, value in module.weights[0].items()}, atol=0)


def test_sparse_gradient_that_is_left_out_trains(fit) -> None:
    module, data = Training(SparseEmbedding()), batches(2)
    fit(module, data, ZNormCallback(exclude="*words*"))
    module.net.words.sparse = False  # by hand, a dense gradient does
    assert_every_step(module, data, chosen=lambda name: name == "last.weight")
    assert not torch.equal(module.weights[0]["words.weight"], module.weights[-1]["words.weight"])


def test_sparse_adam_beside_a_dense_optimizer(fit) -> None:
    class TwoOptimizers(Training):
        automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            dense, sparse = self.optimizers()
            dense.zero_grad()
            sparse.zero_grad()
            self.manual_backward(Training.training_step(self, batch, batch_idx))
            dense.step()
            sparse.step()

    net, data = SparseEmbedding(), batches(1)
    module = TwoOptimizers(
        net, lambda _: [SGD(net.last.parameters(), LR), torch.optim.SparseAdam(net.words.parameters(), LR)]
    )
    fit(module, data, ZNormCallback(include="net.last.*"))
    net.words.sparse = False
    gradient_step = stepped(net, module.weights[0], data, method=torch.sign)  # Adam's first step, if its eps is ignored
    assert_weights(
        module.weights[1],
        {
            "words.weight": gradient_step["words.weight"],
            "last.weight": stepped(net, module.weights[0], data, zscore)["last.weight"],
        },
        atol=1e-5,
    )
