"""Pictures without labels: any folder, a list file, or several of them with weights."""

from __future__ import annotations

import hashlib
import heapq
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from mmengine.logging import print_log
from torch.utils.data import Dataset

from densessl.datasets.image_io import ENDINGS, LoadImage, UnreadableImageError
from densessl.errors import DenseSSLError
from densessl.registry import DATASETS, TRANSFORMS

_MAX_DRAWS = 16


@DATASETS.register_module()
class UnlabelledImages(Dataset):
    """All pictures below one or several folders, or those that list files name.

    Folders are scanned anew at each start, which takes seconds where reading the
    pictures takes hours; there is no index file that could go stale.

    A sample is a function of ``seed`` and its key alone. A picture that cannot be read
    is replaced by another one of its root, drawn from the sample's own generator, and
    named in the sample's ``broken``.

    Args:
        data_root: a folder, or several.
        list_file: a text file with one path a line, for each root or for the only one;
            None (for a root, or for all) takes every picture below the root. Paths are
            relative to the root, else to the list file; blank lines and lines that
            begin with ``#`` are skipped, and so are further columns behind the path.
        weights: relative share of the images of an epoch for each root, no unit; the
            sampler follows them. None draws each picture equally often.
        fraction: share in (0, 1] of each root to keep, balanced over its classes, see
            `balanced_subset`. None keeps all.
        seed: seed of the samples and of the fraction.
        pipeline: transforms, as callables or configs, that turn ``dict(path, rng)``
            into a sample.

    Attributes:
        roots: the folders that the pictures' names start from.
        root_sizes: number of pictures of each root.
        weights: as given, or None.

    Raises:
        DenseSSLError: a folder is missing, unreadable or without pictures, or an
            argument does not fit.
    """

    def __init__(
        self,
        data_root: str | Sequence[str],
        list_file: str | Sequence[str | None] | None = None,
        weights: Sequence[float] | None = None,
        fraction: float | None = None,
        seed: int = 0,
        pipeline: Sequence[dict[str, Any] | Callable] = (),
    ) -> None:
        roots = _listed(data_root)
        lists = _listed(list_file) if list_file is not None else [None] * len(roots)
        if not roots or len(lists) != len(roots):
            raise DenseSSLError(
                f'data_root names {len(roots)} folders and list_file {len(lists)} '
                'files; give one list file (or None) for each folder'
            )
        _check_weights(weights, len(roots))
        self.roots: list[str] = []
        self.root_sizes: list[int] = []
        self.weights = None if weights is None else list(weights)
        self.seed = seed
        self.transforms = [
            TRANSFORMS.build(step) if isinstance(step, dict) else step
            for step in pipeline
        ]
        readers = (step for step in self.transforms if hasattr(step, 'endings'))
        self._reader = next(readers, LoadImage())
        names: list[bytes] = []
        for root, listed in zip(roots, lists, strict=True):
            base, found = _find_pictures(root, listed, self._reader.endings)
            if fraction is not None:
                found = balanced_subset(found, fraction, seed, base)
                print_log(f'fraction={fraction}: {len(found)} kept', logger='current')
            self.roots.append(base)
            self.root_sizes.append(len(found))
            names += found
        self._names = _PackedNames(names)
        self._root_ends = np.cumsum(self.root_sizes)
        self.metainfo: dict[str, Any] = {}  # MMEngine's loops warn where it is missing

    def __len__(self) -> int:
        return len(self._names)

    def path(self, index: int) -> str:
        """Path of picture ``index``, 0 <= index < len(self)."""
        root = self.roots[self._root_of(index)]
        return os.path.join(root, os.fsdecode(self._names[index]))

    def picture(self, index: int) -> np.ndarray:
        """Picture ``index`` ``(H, W, C)``, whole, as the pipeline's reader gives it.

        Raises:
            UnreadableImageError: it cannot be read.
            DenseSSLError: it is of another kind than the reader was told.
        """
        return np.asarray(self._reader({'path': self.path(index)})['img'])

    def __getitem__(self, key: int | tuple[int, int, int]) -> dict[str, Any]:
        """Make the sample of a key ``(epoch, position, index)``.

        A plain index stands for the key ``(0, index, index)``.

        Returns:
            What the pipeline makes, with ``path`` of the picture shown and ``broken``,
            the paths that had to be replaced.

        Raises:
            DenseSSLError: 16 pictures in a row could not be read.
        """
        epoch, position, index = key if isinstance(key, tuple) else (0, key, key)
        rng = np.random.default_rng((self.seed, epoch, position))
        root = self._root_of(index)
        end = int(self._root_ends[root])
        broken: list[str] = []
        while len(broken) < _MAX_DRAWS:
            path = self.path(index)
            try:
                results: dict[str, Any] = {'path': path, 'rng': rng}
                for transform in self.transforms:
                    results = transform(results)
            except UnreadableImageError:
                broken.append(path)
                index = int(rng.integers(end - self.root_sizes[root], end))
            else:
                return {**results, 'broken': broken}
        raise DenseSSLError(
            f"{_MAX_DRAWS} pictures drawn in a row from '{self.roots[root]}' cannot be "
            f"read, the last one '{broken[-1]}'; check that the folder is whole"
        )

    def _root_of(self, index: int) -> int:
        return int(np.searchsorted(self._root_ends, index, side='right'))


class _PackedNames:
    """Many names in one byte string and one array of ends.

    A list of a million strings would be copied into every worker, page by page, as
    each look-up writes a reference count.
    """

    def __init__(self, names: Sequence[bytes]) -> None:
        self._text = b''.join(names)
        lengths = np.fromiter(map(len, names), dtype=np.int64, count=len(names))
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        begin = self._ends[index - 1] if index else 0
        return self._text[begin : self._ends[index]]


def scan_folder(
    root: str, endings: Sequence[str] = ENDINGS
) -> tuple[list[bytes], Counter[str]]:
    """Find the pictures below a folder, at any depth, by their endings.

    Hidden files and folders (``.name``) are skipped. Links are followed, yet no folder
    is entered twice, so that a loop of links ends; the way through real folders wins.

    Args:
        root: an existing folder.
        endings: of pictures, in lower case.

    Returns:
        The names relative to ``root``, with ``/`` between folders, sorted by bytes;
        and how many files were passed over, by ending.

    Raises:
        DenseSSLError: a folder cannot be read.
    """
    kinds = {ending.encode() for ending in endings}
    pictures: list[bytes] = []
    passed_over: Counter[str] = Counter()
    seen: set[bytes] = set()  # by real path: some network drives have no inode numbers
    folders, links = [(b'', os.path.realpath(os.fsencode(root)))], []
    while folders or links:
        folder, place = folders.pop() if folders else heapq.heappop(links)
        if place in seen:
            continue
        seen.add(place)
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.startswith(b'.'):
                        continue
                    name = folder + b'/' + entry.name if folder else entry.name
                    stem, dot, ending = entry.name.rpartition(b'.')
                    if entry.is_dir(follow_symlinks=False):
                        folders.append((name, entry.path))
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        heapq.heappush(links, (name, os.path.realpath(entry.path)))
                    elif stem and ending.lower() in kinds:
                        pictures.append(name)
                    else:
                        passed_over[os.fsdecode(dot + ending) if dot else ''] += 1
        except OSError as error:
            raise DenseSSLError(
                f"cannot read the folder '{os.fsdecode(place)}': {error.strerror}; "
                'mend its permissions or move it out of the data folder'
            ) from error
    pictures.sort()
    return pictures, passed_over


def read_list(
    list_file: str, root: str, endings: Sequence[str] = ENDINGS
) -> tuple[str, list[bytes]]:
    """Read the paths of a list file, in its order.

    A path may hold blanks: a line is cut behind the last picture ending that a blank,
    a comma or a semicolon follows. Where a line holds several such endings (a column
    of pictures and one of masks) the longest path that exists counts, else the first.

    Args:
        list_file: text file, one path a line.
        root: folder the paths are relative to.
        endings: of pictures.

    Returns:
        The folder that the paths turned out to be relative to (the root, else the list
        file's own; '' for absolute paths), and the paths.

    Raises:
        DenseSSLError: the file cannot be read, or a line names no picture, or none of
            the first 100 pictures exists.
    """
    choices = _parse_list(list_file, endings)
    if not choices:
        return root, []
    beside = os.path.dirname(os.path.abspath(list_file))

    def within(base: str, path: bytes) -> bytes:
        # DAVIS's lists begin each path with a slash although it is relative.
        return path.lstrip(b'/') if base else path

    def exists(base: str, path: bytes) -> bool:
        return os.path.exists(os.path.join(os.fsencode(base), within(base, path)))

    def pick(base: str, paths: list[bytes]) -> bytes:
        if len(paths) == 1:
            return within(base, paths[0])
        there = (path for path in reversed(paths) if exists(base, path))
        return within(base, next(there, paths[0]))

    for paths in choices[:100]:
        for base in ('', root, beside) if os.path.isabs(paths[0]) else (root, beside):
            if any(exists(base, path) for path in paths):
                return base, [pick(base, paths) for paths in choices]
    raise DenseSSLError(
        f"list file '{list_file}': none of the first {len(choices[:100])} pictures is "
        f"in '{root}' or in '{beside}'; check data_root"
    )


def _parse_list(list_file: str, endings: Sequence[str]) -> list[list[bytes]]:
    """The possible paths of each line, which is one in all but odd cases."""
    try:
        with open(list_file, 'rb') as file:
            lines = file.read().removeprefix(b'\xef\xbb\xbf').splitlines()
    except OSError as error:
        raise DenseSSLError(
            f"cannot read list_file '{list_file}': {error.strerror}; check its path"
        ) from error
    # Where a path may end in a line: behind an ending and before a column.
    kinds = b'|'.join(ending.encode() for ending in sorted(endings))
    path_end = re.compile(rb'\.(?:' + kinds + rb')(?=[\s,;]|$)', re.IGNORECASE)
    choices: list[list[bytes]] = []
    for number, line in enumerate(map(bytes.strip, lines), start=1):
        if not line or line.startswith(b'#'):
            continue
        choices.append([line[: end.end()] for end in path_end.finditer(line)])
        if not choices[-1]:
            raise DenseSSLError(
                f"list file '{list_file}', line {number}: '{os.fsdecode(line)[:100]}' "
                f'names no picture ({", ".join(endings)}); mend the line or begin it '
                'with #'
            )
    return choices


def balanced_subset(
    names: Sequence[bytes], fraction: float, seed: int, root: str
) -> list[bytes]:
    """Keep a share of an ImageFolder tree with equally many pictures of each class.

    A class is a folder directly below the root. Of ``N`` pictures in ``C`` classes
    ``max(C, round(fraction * N))`` are kept, picked in turn: one of each class, a
    second of each class, and so on; a class that is used up is passed over. So each
    class gives at least one, and their numbers differ by at most one unless a class has
    no more. The order of picks follows from a hash of the seed and the names alone: it
    is the same on every rank and machine, and a smaller fraction is part of a greater.

    Args:
        names: pictures relative to the root, with ``/`` between folders.
        fraction: share to keep, in (0, 1].
        seed: seed of the choice.
        root: the tree's root, for messages.

    Returns:
        The names that are kept, in the order given.

    Raises:
        DenseSSLError: the fraction is out of range, or pictures lie outside a class.
    """
    if not 0 < fraction <= 1:
        raise DenseSSLError(
            f'fraction={fraction} is not in (0, 1]; 10 % is fraction=0.1'
        )
    classes: defaultdict[bytes, list[bytes]] = defaultdict(list)
    for name in names:
        folder, slash, _ = name.partition(b'/')
        if not (folder and slash):
            raise DenseSSLError(
                f"fraction needs one folder a class, yet '{os.fsdecode(name)}' lies "
                f"directly in '{root}'; sort the pictures into folders or leave "
                'fraction out'
            )
        classes[folder].append(name)

    def rank(name: bytes) -> bytes:
        return hashlib.blake2b(b'%d/' % seed + name, digest_size=16).digest()

    picks = sorted(
        (turn, rank(label), name)
        for label, members in classes.items()
        for turn, name in enumerate(sorted(members, key=rank))
    )
    total = max(len(classes), int(fraction * len(names) + 0.5))
    kept = {name for *_, name in picks[:total]}
    return [name for name in names if name in kept]


def _find_pictures(
    root: str, list_file: str | None, endings: Sequence[str]
) -> tuple[str, list[bytes]]:
    """Base folder and relative names of one root; says what it found in the log."""
    root = os.path.expanduser(root)
    if not os.path.isdir(root):
        what = 'is no folder' if os.path.exists(root) else 'does not exist'
        raise DenseSSLError(
            f"data folder '{root}' {what}; give the folder that holds the pictures "
            '(unpack an archive first)'
        )
    if list_file is not None:
        base, names = read_list(os.path.expanduser(list_file), root, endings)
        source, passed_over = f"list file '{list_file}'", Counter()
    else:
        base, (names, passed_over) = root, scan_folder(root, endings)
        source = f"data folder '{root}'"
    others = _counted(passed_over)
    if not names:
        raise DenseSSLError(
            f'{source} holds no picture{others}; give one with '
            f'{", ".join(endings[:-1])} or {endings[-1]} files'
        )
    print_log(f'{source}: {len(names)} pictures{others}', logger='current')
    return base, names


def _counted(passed_over: Counter[str]) -> str:
    if not passed_over:
        return ''
    most = ', '.join(f'{n} {end or "bare"}' for end, n in passed_over.most_common(5))
    return f' (passed over by their endings: {passed_over.total()} files, {most})'


def _listed(value: str | Iterable[Any]) -> list[Any]:
    return [value] if isinstance(value, str | os.PathLike) else list(value)


def _check_weights(weights: Sequence[float] | None, num_roots: int) -> None:
    if weights is None:
        return
    if len(weights) != num_roots or not all(0 < w < float('inf') for w in weights):
        raise DenseSSLError(
            f'weights={list(weights)} must be {num_roots} positive numbers, one for '
            'each data_root'
        )
