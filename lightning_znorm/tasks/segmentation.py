"""Image and volume segmentation."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from lightning_znorm.arguments import checked_choice, checked_integer
from lightning_znorm.batches import Cases, cases_of, images_and_targets, images_of, kind_of
from lightning_znorm.errors import ZNormTypeError, ZNormValueError
from lightning_znorm.hyperparameters import plain_value, plain_values
from lightning_znorm.metrics import PatientDiceScore
from lightning_znorm.metrics.mask_metric import MaskMetric, at_least_float32, orderable
from lightning_znorm.requirements import needed_by
from lightning_znorm.tasks import scores
from lightning_znorm.tasks.base import BUILD_IT, Task
from lightning_znorm.tasks.networks import create_segmenter
from lightning_znorm.tasks.networks import size_divisor as divisor_of_network
from lightning_znorm.tasks.outputs import (
    Output,
    averages_images,
    counted_pixels,
    crop_to,
    outputs_of,
    pad_to_multiple,
)
from lightning_znorm.tasks.prior import Prior, plain_prior
from lightning_znorm.tasks.targets import TargetCheck


class SegmentationTask(Task):
    """Train a network to mark regions in images or volumes.

    Batches are tuples or lists that begin with images, ``(N, C, H, W)`` or ``(N, C, D, H, W)``, and masks of the same
    size, or dictionaries with ``image`` and ``label``, as MONAI makes them. They may say to which patient each image
    belongs (`lightning_znorm.batches`). Masks are:

    - with ``activation="sigmoid"``, one mask of zeros and ones for each class, ``(N, num_classes, ...)``. Classes may
      overlap. A value in between is used as it is in training, and is scored as 1 if it is at least 0.5;
    - with ``activation="softmax"``, the class of each pixel, ``(N, 1, ...)``, from 0 (background) to
      ``num_classes`` - 1.

    Logged, once per epoch, are ``train/loss`` and, for validation and in the same way for ``test``:

    - ``val/loss``;
    - ``val/dice``, ``val/tversky``, ``val/hausdorff``: means over all masks, that is, over images and classes. A mask
      that is empty in prediction and truth is left out; if only one of them is empty, it gets the worst score;
    - ``val/dice_foreground``: the mean of Dice over the masks whose truth is not empty;
    - ``val/dice_per_patient``: the slices of a patient are scored as one volume, and this is the mean over patients.
      It is there if batches name the patients;
    - ``val/masks_counted`` and ``val/masks_left_out``: of how many masks ``val/dice`` is the mean, and how many are
      left out; ``val/masks_foreground``: how many have a true structure. ``val/patients_counted`` and
      ``val/patients_left_out`` say the first two for patients. These counts stay the same if ``metrics`` are chosen.

    With several classes, each score is also logged for each class, as ``val/dice_NAME``. With softmax, the background
    is not scored. ``metrics`` replaces all these scores but the counts; see `lightning_znorm.metrics` for how they
    treat empty masks. A mask predicted with NaN gets the worst score. Several loaders for validation or test are scored
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
        - A network may return several outputs (deep supervision): all are trained, and one is scored. Of a list, that
          is the last one in the size of the images; smaller ones are interpolated to that size. Of a tensor with one
          more dimension, ``(N, outputs, num_classes, ...)``, it is the first. Outputs of one size have the same weight,
          and each lower resolution has half the weight of the one before. So ``train/loss`` is a weighted mean over the
          outputs, and ``val/loss`` is the loss of the one that is scored. MONAI's U-Net++, DynUNet and SegResNetDS
          train like this.
        - The loss is computed in float32 or more, whatever the precision of the network.
        - The networks by name have biases in front of normalization layers. Their true gradient is zero, and ZNorm
          scales its rounding errors to unit size. This does not change the output. ``min_ndim=2`` of the callback
          leaves these biases alone.
        - A checkpoint holds plain values only: a ``model``, ``loss``, ``optimizer``, ``lr_scheduler``, ``metrics`` or
          ``inferer`` that was given as an object has to be passed to ``load_from_checkpoint`` again.

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
        metrics: The scores by name, in place of the default ones: metrics of `lightning_znorm.metrics`, or of
            torchmetrics that take masks, bool ``(N, K, ...)``, for prediction and truth. In YAML by class path, with
            arguments. Metrics of patients need batches that name patients.
        class_names: Names of the classes for logs and files: of the ``num_classes`` channels with sigmoid, and of all
            but the background with softmax. By default their numbers.
        ignore_index: Value of pixels in masks that do not count, in losses and scores; with sigmoid, a pixel with this
            value in any channel. The loss is taken over the other pixels of the batch, or of each image for a loss with
            ``batch=False``, in a line one pixel wide: losses that look at neighbouring pixels do not fit. In distances
            between masks, ignored pixels belong to neither mask. To choose pixels, each step waits for the device.
        inferer: Called with images and the network in validation, test and prediction, and returns the logits. In YAML
            one of `monai.inferers`, such as ``SlidingWindowInferer``, for volumes that do not fit in memory. It may
            return them on another device; to be scored, they are moved back.
        size_divisor: Images whose sizes are no multiples of this number are padded to the next multiple, by repeating
            their last pixels, and the logits are cropped back. By default the number that a network by name needs; 1,
            which pads nothing, for a module.

    Raises:
        ImportError: If the network or the loss is one of MONAI's, and MONAI is missing.
        ValueError: If no network has the name, if ``model_kwargs`` come with a module or hold anything but plain
            values, if ``num_classes``, ``activation``, ``threshold``, ``prior``, ``class_names``, ``ignore_index``,
            ``size_divisor`` or a name in ``metrics`` is out of range, or if the network's output or a mask has another
            shape or other values than these say. Before a training with ``prior``: if the
            network's output has no bias or layers wait for their first batch, if the size of the images is unknown, or
            if ``"auto"`` finds no shares.
        TypeError: If a batch does not hold images and masks, if ``prior`` is no number, list or ``"auto"``, if
            ``channels_last`` is neither ``True`` nor ``False``, if one of the ``metrics`` is no metric, or if
            ``inferer`` cannot be called.

    Example:
        >>> task = SegmentationTask(torch.nn.Conv2d(3, 1, kernel_size=1))
        >>> task.predict_step(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 1, 16, 16])
    """

    # Of the class, so that tasks that were pickled before there were these have them too.
    class_names: Sequence[str] = ()
    ignore_index: int | None = None
    inferer: Callable[..., Any] | None = None
    size_divisor = 1
    _needs_patients: frozenset[str] = frozenset()

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
        metrics: dict[str, Metric] | None = None,
        class_names: Sequence[str] | None = None,
        ignore_index: int | None = None,
        inferer: Callable[..., Any] | None = None,
        size_divisor: int | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, lr_scheduler_interval, lr_scheduler_frequency, lr_scheduler_strict)
        plain = plain_values(
            num_classes=num_classes,
            in_chans=in_chans,
            spatial_dims=spatial_dims,
            activation=activation,
            threshold=threshold,
            compile=compile,
            channels_last=channels_last,
            class_names=class_names,
            ignore_index=ignore_index,
            size_divisor=size_divisor,
        )
        num_classes, in_chans, spatial_dims, activation, threshold, compile, channels_last = plain[:7]
        class_names, ignore_index, size_divisor = plain[7:]
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
        self.class_names = _checked_names(class_names, num_classes, activation)
        """Names of the classes that are scored."""
        self.ignore_index = _checked_ignored(ignore_index, self.num_classes, activation)
        if inferer is not None and not callable(inferer):
            raise ZNormTypeError(
                f"inferer must be callable with images and a network, such as monai.inferers.SlidingWindowInferer, got "
                f"{type(inferer).__name__}."
            )
        self.inferer = inferer
        if size_divisor is not None:
            size_divisor = checked_integer("size_divisor", size_divisor, minimum=1, bits=31)
        elif isinstance(model, str):
            size_divisor = divisor_of_network(model, **model_kwargs or {})
        self.size_divisor = size_divisor or 1
        self.target_check = TargetCheck(
            "Masks",
            last=1 if activation == "sigmoid" else num_classes - 1,
            only_whole=activation == "softmax",
            settings=f"activation={activation!r} with num_classes={num_classes}",
            remedy="of masks of 0 and 255 pass masks > 0, or change one of these"
            if activation == "sigmoid"
            else "change num_classes or the masks",
            ignored=self.ignore_index,
        )
        create = partial(create_segmenter, num_classes=num_classes, in_chans=in_chans, spatial_dims=spatial_dims)
        self.configure_network(model, create, model_kwargs or {}, compile, channels_last)
        self.configure_prior(prior, num_classes, softmax=activation == "softmax")
        self.configure_losses(loss)
        self._needs_patients = frozenset(metrics or ())
        self.metrics = scores.checked_metrics(metrics)
        """The scores by name, as they were given; see `val_metrics` and `test_metrics` for those of an epoch."""
        self.configure_metrics()

    def configure_losses(self, loss: nn.Module | None) -> None:
        """Set the loss."""
        if loss is None:
            with needed_by("SegmentationTask"):
                from monai.losses import DiceCELoss

            if self.activation == "sigmoid":
                loss = DiceCELoss(sigmoid=True, batch=True)
            else:
                loss = DiceCELoss(softmax=True, to_onehot_y=True, batch=True)
        self.criterion = loss

    def configure_metrics(self) -> None:
        """Set the metrics of validation and test."""
        collection = scores.collection(self.metrics, self.class_names)
        self.val_metrics = collection.clone(prefix="val/")
        self.test_metrics = collection.clone(prefix="test/")

    @override
    def setup(self, stage: str) -> None:
        """Let early stopping go on at a NaN score: there was no mask to score, and nothing diverged."""
        super().setup(stage)
        if stage != "fit":
            return
        metrics = self.val_metrics.items(keep_base=False, copy_state=False)
        names = {name for name, metric in metrics if isinstance(metric, (MaskMetric, PatientDiceScore))}
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

    def infer(self, images: Tensor) -> Tensor:
        """Return the logits as validation, test and prediction use them: by the ``inferer``, if there is one.

        Args:
            images: Shape ``(N, C, ...)``.

        Returns:
            Shape ``(N, num_classes, ...)``.

        Raises:
            ValueError: If the inferer returns another shape.
        """
        if self.inferer is None:
            logits: Tensor = self(images)
            return logits
        returned = self.inferer(images, self.forward)
        expected = (len(images), self.num_classes, *images.shape[2:])
        if not isinstance(returned, Tensor) or returned.shape != expected:
            found = f"shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else kind_of(returned)
            raise ZNormValueError(
                f"{type(self.inferer).__name__} turned images of shape {tuple(images.shape)} into {found}, and logits "
                f"of shape {expected} are expected: choose an inferer that merges its windows."
            )
        return returned

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch: the weighted mean over the network's outputs."""
        images, masks = images_and_targets(batch, "masks")
        masks, misfit = self._checked_masks(images, masks, "training", batch_idx)
        if type(self).logits_of_all_outputs is SegmentationTask.logits_of_all_outputs:
            outputs = self._outputs(images)
        else:  # a subclass chooses among the outputs
            logits = self.logits_of_all_outputs(images)
            outputs = [Output(each, 1 / len(logits)) for each in logits]
        losses = [output.weight * self._loss(output.logits, masks, misfit) for output in outputs]
        loss = torch.stack(losses).sum()
        self.log_loss("train/loss", loss, self._count_of_images(masks))
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Log loss and scores of validation images, and return what :meth:`test_step` returns."""
        metrics = self.metrics_of_loader("validation", self.val_metrics, dataloader_idx)
        return self._evaluation_step("validation", "val/loss", metrics, batch, batch_idx, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Log loss and scores of test images, and return their masks and the scores of each.

        Args:
            batch: Images and masks, in one of the forms that `lightning_znorm.batches` describes.
            batch_idx: Number of the batch.
            dataloader_idx: Number of the loader, where there are several.

        Returns:
            ``"preds"`` and ``"target"``, the masks as they are scored, bool, shape ``(N, K, ...)``; and ``"scores"``:
            by the name of each metric that scores masks one by one, shape ``(N, K)``, NaN where a mask is left out.
        """
        metrics = self.metrics_of_loader("test", self.test_metrics, dataloader_idx)
        return self._evaluation_step("test", "test/loss", metrics, batch, batch_idx, dataloader_idx)

    @override
    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """Return probabilities, shape ``(N, num_classes, ...)``.

        Args:
            batch: Images of shape ``(N, C, ...)``, a tuple or list that begins with them, or a dictionary with
                ``image``.
            batch_idx: Not used.
            dataloader_idx: Not used.
        """
        return self.probabilities(self.infer(images_of(batch)))

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
        """Return masks in the form of :meth:`marked`: bool, ``(N, num_classes, ...)``, without ignored pixels."""
        if self.activation == "softmax":
            return self._one_hot(masks.long()) & self.counts(masks)
        return (orderable(masks) >= 0.5) & self.counts(masks)

    def counts(self, masks: Tensor) -> Tensor:
        """Return which pixels count, bool, ``(N, 1, ...)``: all without ``ignore_index`` in any channel."""
        if self.ignore_index is None:
            return torch.ones((), dtype=torch.bool, device=masks.device).expand(len(masks), 1, *masks.shape[2:])
        return (orderable(masks) != self.ignore_index).all(dim=1, keepdim=True)

    def scored(self, probabilities: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted and true masks as they are scored: without ignored pixels and without softmax's background.

        A mask predicted with NaN becomes one with the worst score.

        Args:
            probabilities: Shape ``(N, num_classes, ...)``.
            masks: As batches hold them.

        Returns:
            Both bool, shape ``(N, K, ...)`` for the ``K`` names in ``class_names``.
        """
        target = self.truth(masks)
        preds = _worst_where_nan(self.marked(probabilities), probabilities, target) & self.counts(masks)
        return (preds[:, 1:], target[:, 1:]) if self.activation == "softmax" else (preds, target)

    def mask_scores(self, preds: Tensor, target: Tensor, cases: Cases) -> dict[str, Tensor]:
        """Return the scores of each mask by the task's ``metrics``, without a change of what is logged.

        Args:
            preds: Predicted masks as :meth:`scored` returns them, bool, shape ``(N, K, ...)``.
            target: True masks, of the same shape and dtype.
            cases: What the batch says about its images, as :func:`~lightning_znorm.batches.cases_of` returns it.

        Returns:
            The ``"scores"`` of :meth:`test_step`: by the name of each metric that scores masks one by one, shape
            ``(N, K)``, NaN where a mask is left out.

        Example:
            >>> task = SegmentationTask(torch.nn.Conv2d(3, 1, kernel_size=1))
            >>> masks = torch.ones(2, 1, 8, 8, dtype=torch.bool)
            >>> task.mask_scores(masks, masks, cases_of(torch.zeros(2, 3, 8, 8)))["dice"].tolist()
            [[1.0], [1.0]]
        """
        return scores.mask_scores(self.metrics, preds, target, cases)

    def _loss(self, logits: Tensor, masks: Tensor, misfit: Tensor | None) -> Tensor:
        counts = None if self.ignore_index is None else self.counts(masks)
        # Dice sums over the pixels of a batch. In half precision, the sum is infinite or has two digits.
        if masks.is_floating_point():
            masks = at_least_float32(masks)
        else:
            masks = masks.to(at_least_float32(logits).dtype) if self.activation == "sigmoid" else masks.long()
        if counts is None:
            return self.compute_loss(logits, masks, misfit)
        parts = [(logits, masks, counts)]
        if averages_images(self.criterion):
            each = (slice(index, index + 1) for index in range(len(logits)))
            parts = [(logits[image], masks[image], counts[image]) for image in each]
        chosen = [counted_pixels(*part) for part in parts if part[2].any()]
        if not chosen:
            return (at_least_float32(logits) * 0.0).sum()  # without a gradient; a sum in half precision may overflow
        return torch.stack([self.compute_loss(*part, misfit) for part in chosen]).mean()

    def _count_of_images(self, masks: Tensor) -> int:
        """Return how many images a mean of losses is over: those with pixels that count."""
        return len(masks) if self.ignore_index is None else int(self.counts(masks).flatten(1).any(dim=1).sum())

    def _one_hot(self, classes: Tensor) -> Tensor:
        numbers = torch.arange(self.num_classes, device=classes.device)
        return classes == numbers.view(-1, *[1] * (classes.ndim - 2))

    @override
    def logits_of_all_outputs(self, images: Tensor) -> list[Tensor]:
        """Return the logits of all outputs of the network, in the size of the images. The last is the prediction."""
        return [output.logits for output in self._outputs(images)]

    def _outputs(self, images: Tensor) -> list[Output]:
        self.check_channels(images)
        padded = pad_to_multiple(images, self.size_divisor)
        outputs = outputs_of(self.run_network(padded), type(self.model).__name__, padded.shape, self.num_classes)
        if padded is images:
            return outputs
        return [Output(crop_to(output.logits, images.shape[2:]), output.weight) for output in outputs]

    def _evaluation_step(
        self, stage: str, loss_name: str, metrics: MetricCollection, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> dict[str, Any]:
        images, masks = images_and_targets(batch, "masks")
        masks, misfit = self._checked_masks(images, masks, stage, batch_idx, dataloader_idx)
        logits = self.infer(images).to(masks.device)  # an inferer may put whole volumes together elsewhere
        self.log_loss(loss_name, self._loss(logits, masks, misfit), self._count_of_images(masks))
        preds, target = self.scored(self.probabilities(logits), masks)
        of_masks, without = scores.update(
            metrics, preds, target, cases_of(batch), self.class_names, self._needs_patients
        )
        self.log_metrics(metrics, len(images), without)
        return {"preds": preds, "target": target, "scores": of_masks}

    @override
    def shows_in_progress_bar(self, name: str) -> bool:
        """Return whether the progress bar shows a score: not counts, and not those of each class."""
        return scores.is_headline(name, self.class_names)

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


def _checked_names(names: Sequence[str] | None, num_classes: int, activation: str) -> list[str]:
    first = 0 if activation == "sigmoid" else 1
    if names is None:
        return [str(number) for number in range(first, num_classes)]
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ZNormTypeError(f"class_names is a list of names, got {names!r}.")
    if len(names) != num_classes - first:
        without = " (all but the background)" if first else ""
        raise ZNormValueError(
            f"class_names must hold {num_classes - first} names{without}, because num_classes={num_classes} with "
            f"activation={activation!r}, got {list(names)}."
        )
    if len({*names}) < len(names) or any(not name or set(name) & set("/.") for name in names):
        raise ZNormValueError(f"class_names must be different names without '/' and '.', got {list(names)}.")
    return list(names)


def _checked_ignored(ignore_index: int | None, num_classes: int, activation: str) -> int | None:
    if ignore_index is None:
        return None
    ignored = checked_integer("ignore_index", ignore_index, minimum=-(2**15), bits=15)
    classes = 2 if activation == "sigmoid" else num_classes
    if 0 <= ignored < classes:
        raise ZNormValueError(
            f"ignore_index={ignored} is a value of masks that count, from 0 to {classes - 1}: choose another, such as "
            "255, and give the pixels that value."
        )
    return ignored


def _worst_where_nan(preds: Tensor, probabilities: Tensor, target: Tensor) -> Tensor:
    """Return predicted masks. A mask with NaN probabilities becomes empty, or full if the true mask is empty."""
    pixels = tuple(range(2, preds.ndim))
    unknown = probabilities.isnan().any(dim=pixels, keepdim=True)
    return torch.where(unknown, ~target.any(dim=pixels, keepdim=True), preds)
