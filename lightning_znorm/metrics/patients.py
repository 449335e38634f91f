"""Scores of patients: all slices of a patient are one volume."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_znorm.errors import ZNormTypeError, ZNormValueError
from lightning_znorm.metrics.mask_metric import Empty, MetricOfMasks, sizes_of, widest_float

# Of a row of the state, one for each mask: patient, class, and numbers of pixels in both masks, in the predicted one,
# and in the true one.
_COLUMNS = 5


class PatientMetric(MetricOfMasks):
    """Base of the metrics of patients: it gathers the numbers of pixels of each patient and class.

    The state has a row of 40 bytes for each mask, and no pixels. The slices of a patient may come in any order, in any
    batches, and in different processes: they find together by a hash of the patient's name.

    Args:
        threshold: Smallest probability of a pixel in the predicted mask.
        empty: What an empty volume means: ``"skip"``, ``"best"`` or ``"skip_true"``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: If ``threshold`` is not in (0, 1), or ``empty`` is another word.
    """

    misfits: Tensor

    def __init__(self, threshold: float, empty: Empty = "skip", **kwargs: Any) -> None:
        super().__init__(threshold, empty, **kwargs)
        # In compute groups of a MetricCollection, metrics of the same masks share these states, whatever their policy.
        self._rows = f"rows of patients {threshold}"
        self.add_state(self._rows, [], dist_reduce_fx="cat")
        # Batches with impossible values in preds, batches with such in target.
        self.add_state("misfits", torch.tensor([0, 0], dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(
        self,
        preds: Tensor,
        target: Tensor,
        patient: Sequence[str | int | None] | None = None,
        sizes: Tensor | None = None,
    ) -> None:
        """Add a batch of slices or volumes.

        On the CPU, the values are checked at once. On other devices a check makes the program wait, so they are checked
        when the result is computed.

        Args:
            preds: Probabilities or bool, shape ``(N, C, H, W)`` or ``(N, C, D, H, W)``.
            target: Bool, or integers 0 and 1, of the same shape.
            patient: For each image, the name or number of its patient; None for an image that is a patient of its own.
                By default all of them are.
            sizes: What :func:`~lightning_znorm.metrics.mask_metric.sizes_of` returns for these masks, so that several
                metrics count their pixels once.

        Raises:
            TypeError: If ``preds`` are neither floating point nor bool, ``target`` is neither bool nor integer, or
                ``patient`` is no list of names.
            ValueError: If the shapes are none of these or differ, or there is not one patient for each image, or on the
                CPU if probabilities are NaN or outside [0, 1], or a value of ``target`` is neither 0 nor 1.
        """
        preds, target, misfits = self.checked(preds, target)
        images, classes = preds.shape[:2]
        patients = torch.tensor(self._keys(patient, images), dtype=torch.int64)
        patients = patients.to(preds.device, non_blocking=True)  # a blocking copy would wait for the device
        if sizes is None:
            sizes = sizes_of(preds, target)
        number = torch.arange(classes, device=preds.device)
        rows = torch.stack(
            [patients.unsqueeze(1).expand(-1, classes), number.expand(images, -1), *sizes.unbind()], dim=2
        )
        getattr(self, self._rows).append(rows.flatten(0, 1))
        self.misfits = self.misfits + misfits

    @override
    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes; see `torchmetrics.Metric.sync`."""
        # For a process without a batch, torchmetrics would send a tensor of another dtype and other axes, or none.
        if isinstance(rows := getattr(self, self._rows), list) and not rows:
            rows.append(self._all_rows())
        super().sync(*args, **kwargs)

    def _keys(self, patient: Sequence[str | int | None] | None, images: int) -> list[int]:
        name = type(self).__name__
        if patient is None:
            return [-1] * images
        if isinstance(patient, (str, Tensor)) or not all(isinstance(each, (str, int, type(None))) for each in patient):
            raise ZNormTypeError(
                f"{name} takes patient as a list with a name or a number (or None) for each image, got "
                f"{type(patient).__name__}: for a tensor or an array, pass patient.tolist()."
            )
        if len(patient) != images:
            raise ZNormValueError(
                f"{name} takes one patient for each image, got {len(patient)} for {images} images: pass "
                "patient=[...] with a name for each, or None for an image that is a patient of its own."
            )
        # Python's own hash of a text differs between processes.
        return [
            -1 if each is None else int.from_bytes(blake2b(str(each).encode(), digest_size=8).digest(), "big") >> 1
            for each in patient
        ]

    def _all_rows(self) -> Tensor:
        rows: Tensor | list[Tensor] = getattr(self, self._rows)  # one tensor while the metric is synchronised
        if isinstance(rows, Tensor):
            return rows
        return torch.cat(rows) if rows else torch.zeros(0, _COLUMNS, dtype=torch.int64, device=self.device)

    def _volumes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the score of each volume (of a patient and class) and what is known of it, without waiting.

        There are as many entries as rows; what is left of them after the last volume does not exist.

        Returns:
            Scores, whether the volume exists, whether it is in the mean, and the number of its patient. Numbers count
            from 0.
        """
        rows = self._all_rows()
        patient, number = rows[:, 0], rows[:, 1]
        # An image without a name is a patient of its own. Its rows follow one another, from class 0 on.
        patient = torch.where(patient < 0, -1 - ((patient < 0) & (number == 0)).cumsum(dim=0), patient)
        order = number.argsort(stable=True)
        order = order[patient[order].argsort(stable=True)]
        rows, patient, number = rows[order], patient[order], number[order]

        patients = _steps(patient)
        volumes = (patients | _steps(number)).cumsum(dim=0) - 1
        overlap, predicted, true = torch.zeros_like(rows[:, 2:]).index_add(0, volumes, rows[:, 2:]).unbind(dim=1)
        exists = torch.zeros_like(volumes).index_add(0, volumes, torch.ones_like(volumes)) > 0
        patient_of = torch.zeros_like(volumes).index_copy(0, volumes, patients.cumsum(dim=0) - 1)

        sizes = (predicted + true).to(widest_float(rows.device))
        scores = torch.where(sizes > 0, 2 * overlap / sizes, 1.0)
        return scores, exists, exists & self.counts_in(predicted > 0, true > 0), patient_of


def _steps(values: Tensor) -> Tensor:
    """Return where a value differs from the one before. The first one does."""
    return torch.cat([torch.ones_like(values[:1], dtype=torch.bool), values[1:] != values[:-1]])


class PatientDiceScore(PatientMetric):
    r"""Dice score of patients: all slices of a patient are one volume, and have one score for each class.

    For the sets :math:`P` and :math:`G` of predicted and true pixels in all slices of a patient,

    .. math::
        D(P, G) = \frac{2 |P \cap G|}{|P| + |G|}

    The result is the mean over all patients and classes. A stray pixel in a slice without a tumour hardly changes it,
    whereas it decides the score of that slice in `DiceScore`.

    What an empty volume means is said by ``empty``, as for the masks of `DiceScore`:

    - ``"skip"``: a volume that is empty in prediction and truth is left out, and counted in ``metric.skipped``. If one
      is empty, the score is 0.
    - ``"best"``: if both are empty, the score is 1.
    - ``"skip_true"``: a volume whose truth is empty is left out.

    If all are left out, the result is NaN, with one warning.

    The result is the same for any order and batches of the slices, and for any number of processes. A slice that is
    given twice, as by a sampler that fills up the last batch, counts twice.

    Args:
        threshold: Smallest probability of a pixel in the predicted mask.
        empty: What an empty volume means: ``"skip"``, ``"best"`` or ``"skip_true"``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Attributes:
        counted: Number of volumes (one for each patient and class) in the mean, in this process.
        skipped: Number of volumes left out, in this process.

    Raises:
        ValueError: If ``threshold`` is not in (0, 1), or ``empty`` is another word.

    Shape:
        ``preds``, probabilities or bool, and ``target``, bool or integers 0 and 1: ``(N, C, H, W)`` or
        ``(N, C, D, H, W)`` both. ``patient``: a list of N names. The result is a scalar, float32.

    Example:
        >>> preds = torch.tensor([[[[0.9, 0.8]]], [[[0.1, 0.7]]], [[[0.9, 0.1]]]])  # three slices of two pixels
        >>> target = torch.tensor([[[[1, 1]]], [[[0, 0]]], [[[1, 0]]]])
        >>> metric = PatientDiceScore()
        >>> metric(preds, target, patient=["anna", "anna", "ben"])  # anna's 2 * 2 / (3 + 2), and ben's 1
        tensor(0.9000)
        >>> metric.counted, metric.skipped
        (tensor(2), tensor(0))
    """

    higher_is_better = True
    plot_upper_bound = 1.0

    def __init__(self, threshold: float = 0.5, empty: Empty = "skip", **kwargs: Any) -> None:
        super().__init__(threshold, empty, **kwargs)

    @property
    def counted(self) -> Tensor:
        """Number of volumes in the mean, of this process, or of all processes while the metric is synchronised."""
        _, _, counted, _ = self._volumes()
        return counted.sum()

    @property
    def skipped(self) -> Tensor:
        """Number of volumes left out because of ``empty``, of the same processes."""
        _, exists, counted, _ = self._volumes()
        return (exists & ~counted).sum()

    @override
    def compute(self) -> Tensor:
        """Return the mean over all patients and classes that are not left out, in float32; NaN if there are none.

        Raises:
            ValueError: If ``preds`` or ``target`` had impossible values.
        """
        self.check_values(self.misfits)
        scores, exists, counted, _ = self._volumes()
        self.warn_of_nothing(counted.sum(), (exists & ~counted).sum(), "volumes of patients")
        return (torch.where(counted, scores, 0.0).sum() / counted.sum()).float()


class PatientCount(PatientMetric):
    """Number of patients that `PatientDiceScore` counts, or leaves out because they are empty.

    A patient is counted if at least one of its classes is in the mean, and left out if none is. So the two numbers add
    up to the number of patients. An image without a patient's name is a patient of its own.

    Args:
        left_out: Whether to count the patients that are left out instead.
        threshold: Smallest probability of a pixel in the predicted mask.
        empty: What an empty volume means: ``"skip"``, ``"best"`` or ``"skip_true"``; see `PatientDiceScore`.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: If ``threshold`` is not in (0, 1), or ``empty`` is another word.

    Shape:
        As `PatientDiceScore`. The result is a scalar, float32.

    Example:
        >>> target = torch.tensor([[[[1, 1]]], [[[0, 0]]], [[[0, 0]]]])  # three slices of two pixels
        >>> PatientCount()(target.bool(), target, patient=["anna", "anna", "ben"])
        tensor(1.)
        >>> PatientCount(left_out=True)(target.bool(), target, patient=["anna", "anna", "ben"])
        tensor(1.)
    """

    def __init__(self, left_out: bool = False, threshold: float = 0.5, empty: Empty = "skip", **kwargs: Any) -> None:
        super().__init__(threshold, empty, **kwargs)
        self.left_out = left_out

    @override
    def compute(self) -> Tensor:
        """Return the number, in float32.

        Raises:
            ValueError: If ``preds`` or ``target`` had impossible values.
        """
        self.check_values(self.misfits)
        _, exists, counted, patient = self._volumes()
        nobody = torch.zeros_like(patient)
        known = nobody.index_add(0, patient, exists.long()) > 0
        scored = nobody.index_add(0, patient, counted.long()) > 0
        return (known & ~scored if self.left_out else scored).sum().float()
