"""Image and volume segmentation."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MetricCollection
from typing_extensions import override

from lightning_znorm.arguments import checked_choice
from lightning_znorm.errors import ZNormTypeError, ZNormValueError
from lightning_znorm.hyperparameters import plain_value, plain_values
from lightning_znorm.metrics import DiceScore, HausdorffDistance, TverskyIndex
from lightning_znorm.metrics.mask_metric import MaskMetric, at_least_float32, orderable
from lightning_znorm.tasks.base import BUILD_IT, Task
from lightning_znorm.tasks.batches import images_and_targets, images_of, kind_of, logits_of
from lightning_znorm.tasks.networks import create_segmenter
from lightning_znorm.tasks.prior import Prior, plain_prior
from lightning_znorm.tasks.targets import TargetCheck


class SegmentationTask(Task):
    """Train a network to mark regions in images or volumes.

    Batches are tuples or lists that begin with images, ``(N, C, H, W)`` or ``(N, C, D, H, W)``, and masks of the same
    size. Further entries, such as an index, are ignored. Masks are:

    - with ``activation="sigmoid"``, one mask of zeros and ones for each class, ``(N, num_classes, ...)``. Classes may
      overlap. A value in between is used as it is in training, and is scored as 1 if it is at least 0.5;
    - with ``activation="softmax"``, the class of each pixel, ``(N, 1, ...)``, from 0 (background) to
      ``num_classes`` - 1.

    Logged, once per epoch: ``train/loss``, ``val/loss``, ``val/dice``, ``val/tversky``, ``val/hausdorff`` and the same
    for ``test``; see `lightning_znorm.metrics` for how they treat empty masks. With softmax, the background is not
    scored. A mask predicted with NaN gets the worst score. Several loaders for validation or test are scored
    separately, under ``val/dice/dataloader_idx_0`` and so on.

    If all masks of a validation are empty, in prediction and truth, a score is NaN. That is neither an improvement nor
    a divergence: an `lightning.pytorch.callbacks.EarlyStopping` that follows the score goes on. For this, its
    ``check_finite`` is set to False while this task trains. It stays False if the training ends in an error.

    The masks of every batch are checked. A single process on the CPU raises at once. On other devices, and in several
    processes, no step waits: all processes raise together after the first batch of training and at the end of each
    epoch and evaluation. Until then, the loss of a batch with a wrong mask is 0.

    The default loss adds Dice loss and cross entropy, and takes Dice over the pixels of the whole batch. If most masks
    are empty and a structure covers a hundredth of the pixels, the Dice loss of a single empty image is close to 1 for
    any prediction, so it has no slope to follow. Over a batch, the loss sees the few masks that are not empty, and
    cross entropy holds the other pixels at zero.

    Note:
        - A network may return several outputs (deep supervision): all are trained, and the last is scored. So
          ``train/loss`` is a mean over the outputs, and ``val/loss`` is the loss of the last.
        - The loss is computed in float32 or more, whatever the precision of the network.
        - The networks by name have biases in front of normalization layers. Their true gradient is zero, and ZNorm
          scales its rounding errors to unit size. This does not change the output. ``min_ndim=2`` of the callback
          leaves these biases alone.
        - A checkpoint holds plain values only: a ``model``, ``loss``, ``optimizer`` or ``lr_scheduler`` that was given
          as an object has to be passed to ``load_from_checkpoint`` again.

    Args:
        model: Name of a network (``"resnet50_unet"``, ``"unetpp"``, ``"attention_unet"``, from MONAI), or a module that
            maps images to logits of shape ``(N, num_classes, ...)``, to a list of these, or to an output that has them
            as ``logits`` or ``out``, as in transformers and torchvision. Its other entries, such as ``aux``, are not
            trained: make such a network with ``aux_loss=False``, or DDP waits for gradients that never come.
        num_classes: Width of the output.
        in_chans: Channels of the images, for a network by name.
        spatial_dims: 2 for images, 3 for volumes, for a network by name.
        model_kwargs: Further arguments of a network by name, plain values as YAML has them.
        loss: Takes logits and masks; in YAML any loss of MONAI. ``None`` is
            ``DiceCELoss(sigmoid=True, batch=True)``, or ``DiceCELoss(softmax=True, to_onehot_y=True, batch=True)``.
        activation: Turns logits into probabilities.
        threshold: With sigmoid, the probability from which on a pixel belongs to a class. With softmax, a pixel belongs
            to the most probable class.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning rate scheduler from the optimizer; none by default. A
            `lightning.pytorch.cli.ReduceLROnPlateau` follows the metric that it names as its ``monitor``, torch's own
            follows ``val/loss``. A scheduler that needs the number of training steps and was not given it, such as
            `torch.optim.lr_scheduler.OneCycleLR` without ``total_steps``, gets the Trainer's number (an infinite
            one is refused) and steps after every optimizer step.
        lr_scheduler_interval: Whether the scheduler steps after every epoch, or after every optimizer step.
        compile: Compile the network with `torch.compile`, in place: names in checkpoints stay as they are.
        lr_scheduler_frequency: The scheduler steps after every so many epochs, or batches; by default after each one,
            and a plateau scheduler that follows a ``val/`` metric after each epoch with a validation
            (``check_val_every_n_epoch`` of the Trainer).
        lr_scheduler_strict: Whether it is an error if a plateau scheduler's metric is missing when it steps;
            otherwise there is a warning, and the learning rate stays.
        prior: How frequent the classes are: a list of one share of the pixels for each class, or ``"auto"``, which
            counts them in the data module's training masks (its ``class_frequencies``). A single share is that of each
            class with sigmoid, and that of class 1 with softmax over two classes. The bias of the last layer then
            starts at log(p / (1 - p)), or log p with softmax, instead of near zero, so that the first steps need not
            learn that most pixels are background (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017,
            section 4.1). It is set before a training starts; a bias that the task has loaded or trained stays. To find
            it, the network runs on random images of the size of ``example_input_array``, or else of the first training
            images, for which the loader is made once more.
        channels_last: Keep images and the weights of convolutions in the memory format `torch.channels_last`, or
            `torch.channels_last_3d` for volumes. Results differ by rounding at most, and names, shapes and values in
            checkpoints stay as they are, so that a task with the other setting loads them. Many convolutions are faster
            so, above all in half precision on GPUs (PyTorch's tutorial "Channels Last Memory Format in PyTorch",
            https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html);
            ``docs/performance.md`` says where.

    Raises:
        ValueError: If no network has the name, if ``model_kwargs`` come with a module or hold anything but plain
            values, if ``num_classes``, ``activation``, ``threshold`` or ``prior`` is out of range, or if the network's
            output or a mask has another shape or other values than these say. Before a training with ``prior``: if the
            network's output has no bias or layers wait for their first batch, if the size of the images is unknown, or
            if ``"auto"`` finds no shares.
        TypeError: If a batch does not begin with images and masks, if ``prior`` is no number, list or ``"auto"``, or if
            ``channels_last`` is neither ``True`` nor ``False``.

    Example:
        >>> task = SegmentationTask(torch.nn.Conv2d(3, 1, kernel_size=1))
        >>> task.predict_step(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 1, 16, 16])
    """

    def __init__(
        self,
        model: str | nn.Module,
        num_classes: int = 1,
        in_chans: int = 3,
        spatial_dims: int = 2,
        model_kwargs: dict[str, Any] | None = None,
        loss: nn.Module | None = None,
        activation: Literal["sigmoid", "softmax"] = "sigmoid",
        threshold: float = 0.5,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        compile: bool = False,
        lr_scheduler_frequency: int | None = None,
        lr_scheduler_strict: bool = True,
        prior: Prior = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, lr_scheduler_interval, lr_scheduler_frequency, lr_scheduler_strict)
        num_classes, in_chans, spatial_dims, activation, threshold, compile, channels_last = plain_values(
            num_classes=num_classes,
            in_chans=in_chans,
            spatial_dims=spatial_dims,
            activation=activation,
            threshold=threshold,
            compile=compile,
            channels_last=channels_last,
        )
        model_kwargs = plain_value("model_kwargs", model_kwargs, remedy=BUILD_IT)
        prior = plain_prior(prior)
        self.save_hyperparameters()
        activation = checked_choice("activation", activation, ("sigmoid", "softmax"))
        least = 1 if activation == "sigmoid" else 2
        if num_classes < least:
            raise ZNormValueError(f"num_classes must be at least {least} with {activation}, got {num_classes}.")
        if not 0 < threshold < 1:
            raise ZNormValueError(f"threshold is a probability, in (0, 1), got {threshold}.")
        self._stopping_checked_finite: list[EarlyStopping] = []
        self.num_classes = num_classes
        self.activation = activation
        self.threshold = threshold
        self.target_check = TargetCheck(
            "Masks",
            last=1 if activation == "sigmoid" else num_classes - 1,
            only_whole=activation == "softmax",
            settings=f"activation={activation!r} with num_classes={num_classes}",
            remedy="of masks of 0 and 255 pass masks > 0, or change one of these"
            if activation == "sigmoid"
            else "change num_classes or the masks",
        )
        create = partial(create_segmenter, num_classes=num_classes, in_chans=in_chans, spatial_dims=spatial_dims)
        self.configure_network(model, create, model_kwargs or {}, compile, channels_last)
        self.configure_prior(prior, num_classes, softmax=activation == "softmax")
        self.configure_losses(loss)
        self.configure_metrics()

    def configure_losses(self, loss: nn.Module | None) -> None:
        """Set the loss."""
        if loss is None:
            from monai.losses import DiceCELoss

            if self.activation == "sigmoid":
                loss = DiceCELoss(sigmoid=True, batch=True)
            else:
                loss = DiceCELoss(softmax=True, to_onehot_y=True, batch=True)
        self.criterion = loss

    def configure_metrics(self) -> None:
        """Set the metrics."""
        metrics = {"dice": DiceScore(), "tversky": TverskyIndex(), "hausdorff": HausdorffDistance()}
        self.val_metrics = MetricCollection(dict(metrics), prefix="val/")
        self.test_metrics = self.val_metrics.clone(prefix="test/")

    @override
    def setup(self, stage: str) -> None:
        """Let early stopping go on at a NaN score: there was no mask to score, and nothing diverged."""
        super().setup(stage)
        if stage != "fit":
            return
        metrics = self.val_metrics.items(keep_base=False, copy_state=False)
        names = {name for name, metric in metrics if isinstance(metric, MaskMetric)}
        callbacks: Any = self.trainer  # Lightning does not declare its callbacks
        for callback in callbacks.callbacks:
            if not isinstance(callback, EarlyStopping) or not callback.check_finite:
                continue
            if callback.monitor.partition("/dataloader_idx_")[0] in names:
                callback.check_finite = False
                self._stopping_checked_finite.append(callback)
                rank_zero_info(
                    f"EarlyStopping(monitor={callback.monitor!r}) counts NaN as no improvement (check_finite=False), "
                    "because it means that there was no mask to score."
                )

    @override
    def teardown(self, stage: str) -> None:
        """Restore the setting of early stopping. Lightning does not call this after an error."""
        super().teardown(stage)
        for callback in self._stopping_checked_finite:
            callback.check_finite = True
        self._stopping_checked_finite.clear()

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, shape ``(N, num_classes, ...)``, of images of shape ``(N, C, ...)``."""
        return self.logits_of_all_outputs(images)[-1]

    @override
    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Return the loss of a batch: the mean over the network's outputs."""
        images, masks = images_and_targets(batch, "masks")
        masks, misfit = self._checked_masks(images, masks, "training", batch_idx)
        outputs = self.logits_of_all_outputs(images)
        loss = torch.stack([self._loss(logits, masks, misfit) for logits in outputs]).mean()
        self.log_loss("train/loss", loss, len(images))
        return loss

    @override
    def validation_step(self, batch: Sequence[Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Log loss and scores of validation images; return their masks (``preds``) and the true ones (``target``)."""
        metrics = self.metrics_of_loader("validation", self.val_metrics, dataloader_idx)
        return self._evaluation_step("validation", "val/loss", metrics, batch, batch_idx, dataloader_idx)

    @override
    def test_step(self, batch: Sequence[Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Log loss and scores of test images; return their masks (``preds``) and the true ones (``target``)."""
        metrics = self.metrics_of_loader("test", self.test_metrics, dataloader_idx)
        return self._evaluation_step("test", "test/loss", metrics, batch, batch_idx, dataloader_idx)

    @override
    def predict_step(self, batch: Tensor | Sequence[Any], batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """Return probabilities, shape ``(N, num_classes, ...)``.

        Args:
            batch: Images of shape ``(N, C, ...)``, or a tuple or list that begins with them.
            batch_idx: Not used.
            dataloader_idx: Not used.
        """
        return self.probabilities(self(images_of(batch)))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each class at each pixel, same shape as the logits, at least in float32."""
        logits = at_least_float32(logits)
        return logits.sigmoid() if self.activation == "sigmoid" else logits.softmax(dim=1)

    def marked(self, probabilities: Tensor) -> Tensor:
        """Return which pixels belong to which class: bool, same shape as the probabilities."""
        if self.activation == "sigmoid":
            return probabilities >= self.threshold
        return self._one_hot(probabilities.argmax(dim=1, keepdim=True))

    def truth(self, masks: Tensor) -> Tensor:
        """Return masks in the form of :meth:`marked`: bool, ``(N, num_classes, ...)``."""
        return orderable(masks) >= 0.5 if self.activation == "sigmoid" else self._one_hot(masks.long())

    def _loss(self, logits: Tensor, masks: Tensor, misfit: Tensor | None) -> Tensor:
        # Dice sums over the pixels of a batch. In half precision, the sum is infinite or has two digits.
        if masks.is_floating_point():
            masks = at_least_float32(masks)
        else:
            masks = masks.to(at_least_float32(logits).dtype) if self.activation == "sigmoid" else masks.long()
        return self.compute_loss(logits, masks, misfit)

    def _one_hot(self, classes: Tensor) -> Tensor:
        numbers = torch.arange(self.num_classes, device=classes.device)
        return classes == numbers.view(-1, *[1] * (classes.ndim - 2))

    @override
    def logits_of_all_outputs(self, images: Tensor) -> list[Tensor]:
        """Return the logits of all outputs of the network. The last one is the prediction."""
        self.check_channels(images)
        returned = logits_of(self.run_network(images))
        outputs = list(returned) if isinstance(returned, (list, tuple)) and returned else [returned]
        expected = (len(images), self.num_classes, *images.shape[2:])
        for output in outputs:
            if not isinstance(output, Tensor) or output.shape != expected:
                found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else kind_of(output)
                raise ZNormValueError(
                    f"{type(self.model).__name__} turned images of shape {tuple(images.shape)} into {found}, and "
                    f"num_classes={self.num_classes} asks for logits of shape {expected}."
                )
        return outputs

    def _evaluation_step(
        self,
        stage: str,
        loss_name: str,
        metrics: MetricCollection,
        batch: Sequence[Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> dict[str, Tensor]:
        images, masks = images_and_targets(batch, "masks")
        masks, misfit = self._checked_masks(images, masks, stage, batch_idx, dataloader_idx)
        logits = self(images)
        self.log_loss(loss_name, self._loss(logits, masks, misfit), len(images))
        probabilities, target = self.probabilities(logits), self.truth(masks)
        preds = _worst_where_nan(self.marked(probabilities), probabilities, target)
        if self.activation == "softmax":  # leave out the background
            preds, target = preds[:, 1:], target[:, 1:]
        metrics.update(preds, target)
        self.log_metrics(metrics, len(images))
        return {"preds": preds, "target": target}

    def _checked_masks(
        self, images: Tensor, masks: Tensor, stage: str, batch_idx: int, dataloader_idx: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        channels = self.num_classes if self.activation == "sigmoid" else 1
        expected = (len(images), channels, *images.shape[2:])
        if masks.shape != expected:
            raise ZNormValueError(
                f"Masks have shape {tuple(masks.shape)}, and images of shape {tuple(images.shape)} with "
                f"activation={self.activation!r} and num_classes={self.num_classes} ask for {expected}."
            )
        last = self.num_classes - 1
        if self.activation == "softmax" and masks.is_floating_point() and last > 2 / torch.finfo(masks.dtype).eps:
            raise ZNormTypeError(
                f"Masks are {masks.dtype}, which cannot tell all classes from 0 to {last} apart: pass masks.long(), "
                "which no precision of the Trainer rounds."
            )
        return self.check_targets(masks, stage, batch_idx, dataloader_idx=dataloader_idx)


def _worst_where_nan(preds: Tensor, probabilities: Tensor, target: Tensor) -> Tensor:
    """Return predicted masks. A mask with NaN probabilities becomes empty, or full if the true mask is empty."""
    pixels = tuple(range(2, preds.ndim))
    unknown = probabilities.isnan().any(dim=pixels, keepdim=True)
    return torch.where(unknown, ~target.any(dim=pixels, keepdim=True), preds)
