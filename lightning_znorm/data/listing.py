"""Listings of folders: which files are images, each of them once, and which are left out."""

import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lightning_znorm.errors import ZNormFileNotFoundError

# What operating systems leave in folders, besides hidden files.
_LITTER = {"__macosx", "desktop.ini", "lost+found", "thumbs.db"}
# Files that often lie beside images; README and LICENSE have no suffix.
_TEXTS = {"", ".bib", ".csv", ".html", ".json", ".log", ".md", ".pdf", ".rst", ".tsv", ".txt", ".xml", ".yaml", ".yml"}

OTHER_TYPES = "of other types"
OUTSIDE = "outside of the folders that hold the images"
NESTED = "folders where only files are expected"
AGAIN = "other names of what is listed already"
LONE_MASKS = "masks without an image beside them"
MASK = re.compile(r"_mask(_\d+)?$", re.IGNORECASE)
"""The end of a mask's name, without the suffix, as `MaskWriter` names masks."""


@dataclass
class Listing:
    """The files of a folder.

    Hidden files and folders, what operating systems leave in folders, and texts such as README and data.csv are neither
    listed nor named as skipped: they are common, and nobody takes them for images.

    It goes beyond torchvision's ImageFolder: that reads a file twice if it has two names, and a training image may be a
    test image.

    Args:
        paths: The files that were asked for, sorted by folder and then by name.
        inodes: Inode of each file. Several names of one file have the same inode.
        skipped: Paths of other files and folders, by the reason why they are left out.
        faults: Why the folder cannot be used, in sentences that begin with a path.
    """

    paths: list[str] = field(default_factory=list)
    inodes: list[int] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def skip(self, reason: str, paths: Iterable[str]) -> None:
        """Add paths, if there are any, to the skipped ones."""
        if paths := [*paths]:
            self.skipped.setdefault(reason, []).extend(paths)

    def extend(self, other: "Listing") -> None:
        """Add everything in another listing."""
        self.paths += other.paths
        self.inodes += other.inodes
        self.faults += other.faults
        for reason, paths in other.skipped.items():
            self.skip(reason, paths)


def list_files(folder: str | Path, suffixes: Collection[str], recursive: bool = True) -> Listing:
    """List the files in a folder that have one of some suffixes, in upper or lower case.

    Links to files and folders are followed. No folder is entered twice: a link to a folder that is listed already, or
    to one that contains ``folder``, is skipped.

    Args:
        folder: Where to look.
        suffixes: In lower case, with their dots.
        recursive: Whether to look in the folders inside it too; otherwise they are skipped.

    Returns:
        The files. Folders that cannot be listed and broken links are among the faults.
    """
    listing = Listing()
    by_folder: dict[str, Listing] = {}
    entered = _identities_above(folder)
    # Links come last, so that a file is listed by its path without links, if it has one.
    folders, links = [os.fspath(folder)], list[str]()
    while folders or links:
        path = folders.pop() if folders else links.pop(0)
        try:
            identity = file_identity(path)
            if identity in entered:
                listing.skip(AGAIN, [path])
                continue
            entries = _entries(path)
        except OSError as error:
            listing.faults.append(f"{path}: cannot be listed ({error.strerror})")
            continue
        entered.add(identity)
        by_folder[path] = Listing()
        for entry in entries:
            if not _is_folder(entry):
                _add_file(entry, suffixes, by_folder[path])
            elif recursive:
                (links if entry.is_symlink() else folders).append(entry.path)
            else:
                listing.skip(NESTED, [entry.path])
    for _, files in sorted(by_folder.items()):
        listing.extend(files)
    return listing


def list_images(
    folder: Path, suffixes: Collection[str], stem: Callable[[Path], str] = lambda path: path.stem
) -> Listing:
    """List the images in a folder, also in folders inside it, to predict for. One warning names what is skipped.

    Masks are left out: files named like an image beside them with ``_mask``, or ``_mask_0`` and so on, as `MaskWriter`
    names them, in upper or lower case. The warning names masks without an image. An image counts once, however many
    links lead to it.

    Args:
        folder: Where to look.
        suffixes: In lower case, with their dots.
        stem: Returns the name of a file without its suffix, and without the number of a channel if each has a file.

    Raises:
        FileNotFoundError: If there are none.
    """
    found = list_files(folder, suffixes) if folder.is_dir() else Listing()
    paths = list(map(Path, found.paths))
    numbers = [index for index, path in enumerate(paths) if not MASK.search(stem(path))]
    images, inodes = [found.paths[index] for index in numbers], [found.inodes[index] for index in numbers]
    again = {other for _, other in same_files(images, inodes)}
    found.skip(AGAIN, [images[index] for index in again])
    kept = [index for index in range(len(images)) if index not in again]
    names = {(path.parent, stem(path)) for path in (Path(images[index]) for index in kept)}
    masks = [path for path in paths if MASK.search(stem(path))]
    found.skip(LONE_MASKS, [str(path) for path in masks if (path.parent, MASK.sub("", stem(path))) not in names])
    found.paths, found.inodes = [images[index] for index in kept], [inodes[index] for index in kept]
    warn_of_skipped(folder, found)
    if not kept and not found.faults:
        raise ZNormFileNotFoundError(
            f"No images at {folder}, files that end in {', '.join(sorted(suffixes))} and are not masks (*_mask)."
        )
    return found


def list_subfolders(folder: str | Path, suffixes: Collection[str]) -> tuple[list[str], Listing]:
    """List the folders in a folder; files beside them are skipped.

    Broken links may have led to folders, so they are among the faults.

    Args:
        folder: Where to look.
        suffixes: Of the files that the folders should hold, in lower case.

    Returns:
        Names of the folders, sorted, and what is skipped or wrong.
    """
    names, listing = [], Listing()
    for entry in _entries(folder):
        if _is_folder(entry):
            names.append(entry.name)
        elif fault := _fault_of_link(entry):
            listing.faults.append(fault)
        elif _suffix(entry) in suffixes:
            listing.skip(OUTSIDE, [entry.path])
        elif _suffix(entry) not in _TEXTS:
            listing.skip(OTHER_TYPES, [entry.path])
    return names, listing


def refuse_broken_links(paths: Iterable[Path]) -> None:
    """Refuse a broken link, because other data would be read in its place.

    Args:
        paths: Of files and folders, which need not exist.

    Raises:
        FileNotFoundError: If one is a broken link.
    """
    for path in paths:
        if os.path.islink(path) and not os.path.exists(path):
            raise ZNormFileNotFoundError(
                f"{path} is a link that leads nowhere: mount or restore its target, or delete it."
            )


def same_files(paths: list[str], inodes: list[int]) -> list[tuple[int, int]]:
    """Find names of one file: links to it, and hard links.

    Args:
        paths: Of files, from a `Listing`.
        inodes: Inode of each file, from there too.

    Returns:
        Pairs of indices of ``paths``: the first name of a file (which is not a link if the file has such a name), and
        another name.
    """
    numbers = np.array([inode % 2**64 for inode in inodes], dtype=np.uint64)  # some are longer on Windows
    order = np.argsort(numbers, kind="stable")
    repeated = np.flatnonzero(numbers[order][1:] == numbers[order][:-1])
    # These files are compared in full, because inodes of two file systems may be equal by chance.
    by_identity: dict[object, list[int]] = {}
    for index in sorted({*order[repeated].tolist(), *order[repeated + 1].tolist()}):
        by_identity.setdefault(file_identity(paths[index]), []).append(index)
    pairs = []
    for indices in by_identity.values():
        first = min(indices, key=lambda index: (os.path.islink(paths[index]), index))
        pairs += [(first, index) for index in indices if index != first]
    return pairs


def file_identity(path: str | Path) -> object:
    """Return a key that all names of a file or folder have in common."""
    state = os.stat(path)
    # Some network file systems have no inode numbers.
    return (state.st_dev, state.st_ino) if state.st_ino else os.path.realpath(path)


def warn_of_skipped(folder: Path, listing: Listing) -> None:
    """Warn once of what is skipped in a folder, unless it has faults, which must be mended first."""
    if listing.faults:
        return
    reasons = [
        f"{reason} ({len(paths)}: {some(os.path.relpath(path, folder) for path in paths)})"
        for reason, paths in sorted(listing.skipped.items())
    ]
    if reasons:
        count = sum(map(len, listing.skipped.values()))
        _warn_once(f"{folder}: {count} {'entry is' if count == 1 else 'entries are'} left out: {'; '.join(reasons)}.")


def some(names: Iterable[str]) -> str:
    """Return the first three names, and how many more there are."""
    names = sorted(names)
    others = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{others}"


@cache
def _warn_once(message: str) -> None:
    rank_zero_warn(message)


def _entries(folder: str | Path) -> list["os.DirEntry[str]"]:
    """Return the entries of a folder by name, without hidden ones and what operating systems leave there."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if entry.name[0] != "." and entry.name.lower() not in _LITTER]
    return sorted(shown, key=lambda entry: entry.name)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # it is a link to itself
        return False


def _fault_of_link(entry: "os.DirEntry[str]") -> str:
    """Return a sentence if an entry is a broken link. One with the suffix of a text did not lead to images."""
    if not entry.is_symlink() or _suffix(entry) in _TEXTS - {""}:
        return ""
    try:
        entry.stat()
    except OSError as error:
        return f"{entry.path}: is a link that cannot be followed ({error.strerror})"
    return ""


def _suffix(entry: "os.DirEntry[str]") -> str:
    return os.path.splitext(entry.name)[1].lower()


def _add_file(entry: "os.DirEntry[str]", suffixes: Collection[str], listing: Listing) -> None:
    if fault := _fault_of_link(entry):
        listing.faults.append(fault)
        return
    if _suffix(entry) not in suffixes:
        if _suffix(entry) not in _TEXTS:
            listing.skip(OTHER_TYPES, [entry.path])
        return
    if not entry.is_file():
        listing.faults.append(f"{entry.path}: is neither a file nor a folder")
        return
    listing.paths.append(entry.path)
    # For entries that are not links, the inode is known without another system call.
    listing.inodes.append(entry.stat().st_ino if entry.is_symlink() else entry.inode())


def _identities_above(folder: str | Path) -> set[object]:
    """Return the identities of the folders that contain a folder, by its path and by its path without links."""
    parents = {*Path(os.path.abspath(folder)).parents, *Path(os.path.realpath(folder)).parents}
    return {file_identity(parent) for parent in parents}
