"""Image classification."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy
from typing_extensions import override

from lightning_znorm.batches import images_and_targets, images_of, kind_of, logits_of
from lightning_znorm.errors import ZNormTypeError, ZNormValueError
from lightning_znorm.hyperparameters import plain_value, plain_values
from lightning_znorm.metrics.mask_metric import at_least_float32
from lightning_znorm.tasks.base import BUILD_IT, Task
from lightning_znorm.tasks.networks import create_classifier
from lightning_znorm.tasks.prior import Prior, plain_prior
from lightning_znorm.tasks.targets import ProbabilitySumCheck, TargetCheck


class ClassificationTask(Task):
    """Train a network to classify images, by cross entropy.

    Batches are tuples or lists that begin with images, ``(N, C, H, W)``, and integer labels, ``(N,)``, from 0 to
    ``num_classes`` - 1. Further entries, such as an index, are ignored. In training, labels may also be probabilities
    of the classes, ``(N, num_classes)``, as Mixup and CutMix make them, which add up to 1 for each image. With one
    logit, they are the probabilities of class 1, ``(N,)``.

    Logged, once per epoch: ``train/loss``, ``val/loss``, ``val/accuracy``, ``test/loss``, ``test/accuracy`` (the share
    of images whose most probable class is the true one). Several loaders for validation or test are scored separately,
    under ``val/accuracy/dataloader_idx_0`` and so on.

    With ``num_classes=1`` the network has one logit that tells two classes, 0 and 1, apart (binary cross entropy).

    The labels of every batch are checked. A single process on the CPU raises at once. On other devices, and in several
    processes, no step waits: all processes raise together after the first batch of training and at the end of each
    epoch and evaluation. Until then, the loss of a batch with a wrong label is 0. An image whose logits hold NaN counts
    as classified wrongly.

    Note:
        Loss and probabilities are computed in float32 or more, whatever the precision of the network.

        A checkpoint holds plain values only, and loads with ``torch.load(..., weights_only=True)``. So if a task was
        built in Python, its ``optimizer``, its ``lr_scheduler`` and a ``model`` that is a module are not
        hyperparameters: pass them to ``load_from_checkpoint`` again (the first two, if training is to go on).

    Args:
        model: Name of a network, in `lightning_znorm.models` or else in timm, or a module that maps images to logits
            of shape ``(N, num_classes)``, or to an output that has them as ``logits``, as in transformers and in
            torchvision's GoogLeNet and Inception. Auxiliary logits are not trained: make such a network with
            ``aux_logits=False``, or DDP waits for gradients that never come.
        num_classes: Number of classes, or 1 for two classes told apart by one logit.
        in_chans: Channels of the images, for a network by name.
        model_kwargs: Further arguments of a network by name, plain values as YAML has them.
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
        prior: How frequent the classes are: a list of one share for each class, or ``"auto"``, which counts them in the
            data module's training labels (its ``class_frequencies``). With one logit, or with two classes, a single
            share is that of class 1. The bias of the last layer then starts at log p, or with one logit at
            log(p / (1 - p)), instead of near zero, so that the first steps need not learn how rare a class is (Lin et
            al., "Focal Loss for Dense Object Detection", ICCV 2017, section 4.1). It is set before a training starts; a
            bias that the task has loaded or trained stays. To find it, the network runs on random images of the size of
            ``example_input_array``, or else of the first training images, for which the loader is made once more.
        channels_last: Keep images and the weights of convolutions in the memory format `torch.channels_last`, or
            `torch.channels_last_3d` for volumes. Results differ by rounding at most, and names, shapes and values in
            checkpoints stay as they are, so that a task with the other setting loads them. Many convolutions are faster
            so, above all in half precision on GPUs (PyTorch's tutorial "Channels Last Memory Format in PyTorch",
            https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html);
            ``docs/performance.md`` says where.

    Raises:
        ImportError: If the network is one of timm's, and timm is missing.
        ValueError: If no network has the name, if ``model_kwargs`` come with a module or hold anything but plain
            values, if ``prior`` is out of range, if ``num_classes`` is less than 1 or not the data module's, if the
            network's output has another width, or if labels have another shape, are out of range or not whole, or are
            probabilities whose sum differs from 1 by more than 0.02. Before a training with ``prior``: if the network's
            output has no bias or layers wait for their first batch, if the size of the images is unknown, or if
            ``"auto"`` finds no shares.
        TypeError: If a batch does not begin with images and labels, or if labels are not integers. Two kinds of floats
            are allowed: probabilities in training and, with one logit, 0.0 and 1.0. If ``prior`` is no number, list or
            ``"auto"``, or ``channels_last`` neither ``True`` nor ``False``.

    Example:
        >>> task = ClassificationTask("resnet20", num_classes=10, in_chans=1)
        >>> task(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        model: str | nn.Module,
        num_classes: int,
        in_chans: int = 3,
        model_kwargs: dict[str, Any] | None = None,
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
        num_classes, in_chans, compile, channels_last = plain_values(
            num_classes=num_classes, in_chans=in_chans, compile=compile, channels_last=channels_last
        )
        model_kwargs = plain_value("model_kwargs", model_kwargs, remedy=BUILD_IT)
        prior = plain_prior(prior)
        self.save_hyperparameters()
        if num_classes < 1:
            raise ZNormValueError(f"num_classes must be at least 1, got {num_classes}.")
        self.num_classes = num_classes
        # A wrong label kills a CUDA process in cross entropy, and binary cross entropy accepts it without a word.
        self.target_check = TargetCheck(
            "Labels",
            last=max(num_classes, 2) - 1,
            only_whole=True,
            settings=f"num_classes={num_classes}",
            remedy="change num_classes or the labels",
        )
        self.probability_check = TargetCheck(
            "Labels",
            last=1,
            only_whole=False,
            settings="cross entropy with class probabilities",
            remedy="divide those of each image by their sum",
        )
        self.sum_check = ProbabilitySumCheck()
        create = partial(create_classifier, num_classes=num_classes, in_chans=in_chans)
        self.configure_network(model, create, model_kwargs or {}, compile, channels_last)
        self.configure_prior(prior, num_classes, softmax=num_classes > 1)
        self.configure_losses()
        self.configure_metrics()

    def configure_losses(self) -> None:
        """Set the loss."""
        self.criterion = nn.BCEWithLogitsLoss() if self.num_classes == 1 else nn.CrossEntropyLoss()

    def configure_metrics(self) -> None:
        """Set the metrics."""
        # `check_targets` checks the same as validate_args, without waiting for the device.
        if self.num_classes == 1:
            accuracy: Metric = BinaryAccuracy(validate_args=False)
        else:
            accuracy = MulticlassAccuracy(self.num_classes, average="micro", validate_args=False)
        self.val_metrics = MetricCollection({"accuracy": accuracy}, prefix="val/")
        self.test_metrics = self.val_metrics.clone(prefix="test/")

    @property
    @override
    def target_checks(self) -> tuple[TargetCheck, ...]:
        """The checks of class numbers, of class probabilities and of their sums."""
        return (self.target_check, self.probability_check, self.sum_check)

    @override
    def setup(self, stage: str) -> None:
        """Compare the number of classes with the data module's, if it has one."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        data_classes = getattr(data, "num_classes", self.num_classes)
        if data_classes != self.num_classes and (self.num_classes, data_classes) != (1, 2):
            raise ZNormValueError(
                f"{type(data).__name__} has {data_classes} classes, and the task was given num_classes="
                f"{self.num_classes}: make it {data_classes} (in YAML, model.init_args.num_classes)."
            )

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, shape ``(N, num_classes)``, of images of shape ``(N, C, H, W)``."""
        self.check_channels(images)
        logits = logits_of(self.run_network(images))
        expected = (len(images), self.num_classes)
        if not isinstance(logits, Tensor):
            raise ZNormValueError(
                f"{type(self.model).__name__} turned {len(images)} images into {kind_of(logits)}, and the task takes "
                f"logits, a tensor of shape {expected}, or an output that has them as `logits`: let it return that."
            )
        if logits.shape != expected:
            raise ZNormValueError(
                f"{type(self.model).__name__} turned {len(images)} images into an output of shape "
                f"{tuple(logits.shape)}, and num_classes={self.num_classes} asks for {expected}: change one of the two."
            )
        return logits

    @override
    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Return the loss of a batch.

        Raises:
            ValueError: If batch normalization gets a batch of one image whose size has shrunk to 1x1.
        """
        try:
            loss, _, labels = self._loss_logits_labels(batch, "training", batch_idx)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ZNormValueError(
                f"Batch {batch_idx} holds one image, and batch normalization needs two values of each channel, where "
                f"{type(self.model).__name__} has made them 1x1: choose a batch_size that is not 1, and of which no "
                "single image is left over at the end of an epoch."
            ) from error
        self.log_loss("train/loss", loss, len(labels))
        return loss

    @override
    def validation_step(self, batch: Sequence[Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy of the validation images."""
        metrics = self.metrics_of_loader("validation", self.val_metrics, dataloader_idx)
        self._evaluation_step("validation", "val/loss", metrics, batch, batch_idx, dataloader_idx)

    @override
    def test_step(self, batch: Sequence[Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy of the test images."""
        metrics = self.metrics_of_loader("test", self.test_metrics, dataloader_idx)
        self._evaluation_step("test", "test/loss", metrics, batch, batch_idx, dataloader_idx)

    @override
    def predict_step(self, batch: Tensor | Sequence[Any], batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """Return probabilities.

        Args:
            batch: Images of shape ``(N, C, H, W)``, or a tuple or list that begins with them.
            batch_idx: Not used.
            dataloader_idx: Not used.

        Returns:
            The probability of each class, shape ``(N, num_classes)``; with one logit, that of class 1, shape ``(N,)``.
        """
        return self._probabilities(self(images_of(batch)))

    def _evaluation_step(
        self,
        stage: str,
        loss_name: str,
        metrics: MetricCollection,
        batch: Sequence[Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        loss, logits, labels = self._loss_logits_labels(batch, stage, batch_idx, dataloader_idx)
        metrics.update(self._scored_probabilities(logits, labels), labels)
        self.log_loss(loss_name, loss, len(labels))
        self.log_metrics(metrics, len(labels))

    def _loss_logits_labels(
        self, batch: Sequence[Any], stage: str, batch_idx: int, dataloader_idx: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        images, labels = images_and_targets(batch, "labels")
        if stage == "training" and labels.is_floating_point() and (self.num_classes == 1 or labels.ndim == 2):
            return self._loss_of_probabilities(images, labels, batch_idx)
        self._require_labels(images, labels)
        labels, misfit = self.check_targets(labels, stage, batch_idx, dataloader_idx=dataloader_idx)
        labels = labels.long()
        logits = self(images)
        targets = labels.to(at_least_float32(logits).dtype).unsqueeze(1) if self.num_classes == 1 else labels
        return self.compute_loss(logits, targets, misfit), logits, labels

    def _loss_of_probabilities(self, images: Tensor, labels: Tensor, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        expected = (len(images),) if self.num_classes == 1 else (len(images), self.num_classes)
        if labels.shape != expected:
            raise ZNormValueError(
                f"Class probabilities have shape {tuple(labels.shape)}, and {len(images)} images with num_classes="
                f"{self.num_classes} ask for {expected}."
            )
        checks = [self.probability_check, *([self.sum_check] if self.num_classes > 1 else [])]
        labels, misfit = self.check_targets(labels, "training", batch_idx, *checks)
        logits = self(images)
        targets = labels.to(at_least_float32(logits).dtype).view_as(logits)
        return self.compute_loss(logits, targets, misfit), logits, labels

    def _probabilities(self, logits: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        return logits.squeeze(1).sigmoid() if self.num_classes == 1 else logits.softmax(dim=1)

    def _scored_probabilities(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return probabilities. If an image's are NaN, they are replaced: a wrong class gets 1."""
        probabilities = self._probabilities(logits)
        if self.num_classes == 1:
            return torch.where(probabilities.isnan(), (1 - labels).to(probabilities.dtype), probabilities)
        # `torch.nn.functional.one_hot` would wait for the device.
        wrong = torch.arange(self.num_classes, device=labels.device) == ((labels + 1) % self.num_classes).unsqueeze(1)
        unknown = probabilities.isnan().any(dim=1, keepdim=True)
        return torch.where(unknown, wrong.to(probabilities.dtype), probabilities)

    def _require_labels(self, images: Tensor, labels: Tensor) -> None:
        if labels.shape != (len(images),):
            raise ZNormValueError(
                f"Labels have shape {tuple(labels.shape)}, and {len(images)} images ask for {(len(images),)}: the "
                "number of the class of each."
            )
        if labels.is_complex() or (labels.is_floating_point() and self.num_classes > 1):
            raise ZNormTypeError(f"Labels are {labels.dtype}, and class numbers are integers: pass labels.long().")
