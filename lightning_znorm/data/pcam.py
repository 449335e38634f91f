"""PatchCamelyon."""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from typing_extensions import override

from lightning_znorm.data.arguments import check_number, checked_folder
from lightning_znorm.data.array_file import cache_folder
from lightning_znorm.data.files import refuse_broken_links
from lightning_znorm.data.images import ImageDataModule, stratified_indices
from lightning_znorm.data.mapped import BlockShuffle, MappedImages
from lightning_znorm.data.pcam_h5 import ADVICE, h5_path, read_h5, refuse_same_files
from lightning_znorm.data.pcam_kaggle import LABELS, read_kaggle
from lightning_znorm.errors import ZNormFileNotFoundError, ZNormValueError
from lightning_znorm.hyperparameters import plain_values

_SPLITS = ("train", "valid", "test")


class PCamDataModule(ImageDataModule):
    """PatchCamelyon: patches of lymph node sections, 96x96 pixels, RGB; class 1 has tumour in its central 32x32 pixels.

    Either of two layouts. The published one, where the split is given (262,144, 32,768 and 32,768 patches, from slides
    of their own, half of them with tumour)::

        root/
          pcam/                                        (or root is this folder)
            camelyonpatch_level_2_split_train_x.h5     'x': (N, 96, 96, 3) uint8
            camelyonpatch_level_2_split_train_y.h5     'y': (N, 1, 1, 1) uint8
            camelyonpatch_level_2_split_valid_{x,y}.h5
            camelyonpatch_level_2_split_test_{x,y}.h5

    and Kaggle's competition ``histopathologic-cancer-detection``, 220,025 patches without duplicates, of which nobody
    says from which slide they are. Its ``test`` has no labels, so validation and test images are drawn from ``train``,
    stratified by class; patches of one slide are then in all three sets, and figures look better than they are::

        root/
          histopathologic-cancer-detection/            (or root is this folder)
            train_labels.csv                           id,label
            train/
              f38a6374c348f90b587e046aac6079959adf3835.tif
              ...

    Kaggle's images may end in tif or tiff, in upper or lower case, and be links. Each is read as it is stored, or
    refused by name: RGB of 8 bits for each channel, one page, 96x96 pixels. No file is there for two labels. One
    warning names what else is in ``train``, but for hidden files, what systems leave in folders, and texts.

    Images need not fit in memory. Where they lie uncompressed and in one piece in their HDF5 file, as h5py writes them
    by default, they are read from there through a memory map. Compressed or chunked files, and Kaggle's, are decoded
    once into ``cache_dir`` (9.1 GB for PCam, 6.1 GB for Kaggle's), by one process per machine. Training images are read
    in blocks of 32 neighbours in random order, and shuffled among 256 such blocks
    (`lightning_znorm.data.mapped.BlockShuffle`).

    Source:
        Veeling et al., "Rotation Equivariant CNNs for Digital Pathology", MICCAI 2018,
        https://github.com/basveeling/pcam (CC0), from Ehteshami Bejnordi et al., "Diagnostic Assessment of Deep
        Learning Algorithms for Detection of Lymph Node Metastases in Women With Breast Cancer", JAMA 2017.

    Args:
        root: Folder that holds one of the layouts.
        batch_size: Images per batch and process.
        num_workers: Worker processes per loader and process, which read ahead of the training: for slow disks. Images
            that the system has in memory anyway come faster without.
        val_fraction: Of Kaggle's layout, share of the images that are not test images to validate on.
        test_fraction: Of Kaggle's layout, share of the images to test on.
        seed: Of Kaggle's layout, draws the validation and test images, and nothing else.
        cache_dir: Folder for decoded images, by default ``~/.cache/lightning_znorm``. What is in it may be deleted.

    Raises:
        ValueError: If an argument is out of range, if the data are not PatchCamelyon's, or if a file is there
            under two names, through a link or as a hard link.
        TypeError: If an argument is of another type.
        FileNotFoundError: If files are missing, or are links that lead nowhere.
        RuntimeError: If an HDF5 file cannot be read.

    Example:
        >>> data = PCamDataModule(root="data", batch_size=128)
        >>> data.num_classes, data.hparams.batch_size
        (2, 128)
    """

    num_classes = 2
    max_value = 255
    # Of 2,217 of the training images.
    mean = (0.7026, 0.5483, 0.6997)
    std = (0.2397, 0.2833, 0.2167)

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 256,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed, num_workers)
        root, test_fraction, cache_dir = plain_values(root=root, test_fraction=test_fraction, cache_dir=cache_dir)
        check_number("test_fraction", test_fraction, float)
        if not 0 < test_fraction < 1:
            raise ZNormValueError(f"test_fraction is the share of the images to test on, in (0, 1): {test_fraction}.")
        self.save_hyperparameters()
        self.root = checked_folder("root", root)
        self.test_fraction = test_fraction
        self.cache = cache_folder(cache_dir)

    @override
    def prepare_data(self) -> None:
        """Decode what has to be decoded; one process per machine runs this."""
        folder, is_kaggle = self._layout()
        if is_kaggle:
            read_kaggle(folder, self.cache)
            return
        for split in _SPLITS:
            if h5_path(folder, split, "x").is_file() and h5_path(folder, split, "y").is_file():
                read_h5(folder, split, self.cache)

    @override
    def setup(self, stage: str) -> None:
        """Find the images that the stage needs, and read their labels."""
        super().setup(stage)
        folder, is_kaggle = self._layout()
        if is_kaggle:
            self._split(folder)
        elif stage in ("fit", "validate"):
            self.train_set, self.val_set = (
                MappedImages(*read_h5(folder, split, self.cache)) for split in ("train", "valid")
            )
        else:
            self.test_set = MappedImages(*read_h5(folder, "test", self.cache))

    @override
    def sampler(self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0, seed: int = 0) -> BlockShuffle:
        """Make what draws the order of the training images."""
        assert isinstance(dataset, MappedImages)
        return BlockShuffle(dataset, num_replicas, rank, seed)

    def _layout(self) -> tuple[Path, bool]:
        """Return the folder of the files, and whether they are Kaggle's."""
        for folder in (self.root, self.root / "pcam"):
            paths = [h5_path(folder, split, what) for split in _SPLITS for what in "xy"]
            refuse_broken_links([folder, *paths])
            if paths := [path for path in paths if path.is_file()]:
                refuse_same_files(paths)
                return folder, False
        for folder in (self.root, self.root / "histopathologic-cancer-detection"):
            if (folder / LABELS).is_file() and (folder / "train").is_dir():
                return folder, True
        packed = sorted(path for folder in (self.root, self.root / "pcam") for path in folder.glob("camelyon*.h5.gz"))
        if packed:
            raise ZNormFileNotFoundError(
                f"PatchCamelyon is still packed: unpack {', '.join(map(str, packed))} with gunzip."
            )
        raise ZNormFileNotFoundError(
            f"No PatchCamelyon at {self.root}, neither {h5_path(Path('pcam'), 'train', 'x')} and its like nor Kaggle's "
            f"{LABELS} and train: let root name the folder that holds them, or {ADVICE}."
        )

    def _split(self, folder: Path) -> None:
        images, labels = read_kaggle(folder, self.cache)
        rest, test = stratified_indices(labels, self.test_fraction, self.seed)
        train, val = stratified_indices(labels[rest], self.val_fraction, self.seed)
        for name, rows in (("train_set", rest[train]), ("val_set", rest[val]), ("test_set", test)):
            rows.sort()  # neighbours stay neighbours
            setattr(self, name, MappedImages(images, labels[rows], rows))
