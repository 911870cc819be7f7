"""Samples to batches, and the account of the pictures that could not be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.utils.data import default_collate

from densessl.errors import DenseSSLError
from densessl.geometry import ViewGeometry
from densessl.registry import FUNCTIONS


@FUNCTIONS.register_module()
def collate_views(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack the views of samples, once; in a worker straight into shared memory.

    Args:
        samples: ``B`` samples with ``inputs`` (per role ``(v, C, H, W)``, uint8 or
            uint16), ``path``, and perhaps ``geometry`` of leading shape ``(V,)``,
            ``changes`` (per role ``(v, 11)``) and ``broken``.

    Returns:
        ``inputs``, per role ``(B, v, C, H, W)``; ``geometry`` of leading shape
        ``(B, V)``, or None of transforms that do not track it; ``changes``, per role
        ``(B, v, 11)``, where samples have them; ``paths``, B of them; ``broken``, the
        unreadable paths that were replaced, in one list.

    Raises:
        DenseSSLError: the samples disagree in their roles, sizes or number of views.
    """
    first = samples[0]
    layout = _layout(first)
    for sample in samples:
        if _layout(sample) != layout:
            raise DenseSSLError(
                f"collate_views: '{first['path']}' gives {layout} and "
                f"'{sample['path']}' gives {_layout(sample)}; a pipeline must cut the "
                'same roles and sizes from every picture'
            )
    stacked = [name for name in ('inputs', 'changes') if name in first]
    return {
        **{
            name: default_collate([sample[name] for sample in samples])
            for name in stacked
        },
        'geometry': ViewGeometry.stack([sample['geometry'] for sample in samples])
        if 'geometry' in first
        else None,
        'paths': [sample['path'] for sample in samples],
        'broken': [path for sample in samples for path in sample.get('broken', ())],
    }


def _layout(sample: dict[str, Any]) -> str:
    roles = [f'{role} {tuple(v.shape)}' for role, v in sample['inputs'].items()]
    return f'{", ".join(roles)} and {len(sample.get("geometry", ()))} geometries'


class BrokenImageMonitor:
    """Counts the pictures that cannot be read, and stops a run that has too many.

    Two rules, whichever holds first:

    - Of ``num_images`` pictures more than the share ``max_share`` was found broken,
      each counted once: exact, whatever the order.
    - Of ``n`` reads more than ``p n + 3 sqrt(p n)`` failed, with ``p = max_share`` and
      ``n`` at least 100: three standard deviations above what the greatest share that
      is allowed would give. Hence with 1 % up to 4 failures pass at the start, a
      folder with 5 % broken pictures stops after a hundred or two hundred reads, and
      one with 0.5 % runs on.

    Args:
        max_share: greatest share of broken pictures, in [0, 1].
        num_images: pictures of the dataset; None leaves out the first rule.

    Attributes:
        reads: pictures that were tried so far.
        failures: how many of these reads failed.
        paths: the broken paths, each once, in the order they were found.

    Raises:
        DenseSSLError: ``max_share`` is out of range.
    """

    def __init__(self, max_share: float = 0.01, num_images: int | None = None) -> None:
        if not 0 <= max_share <= 1:
            raise DenseSSLError(
                f'max_broken={max_share} is not in [0, 1]; 1 % is max_broken=0.01'
            )
        self.max_share = max_share
        self.num_images = num_images
        self.reads = 0
        self.failures = 0
        self.paths: dict[str, None] = {}

    def update(self, num_samples: int, broken_paths: Sequence[str]) -> list[str]:
        """Take in a batch, or the joined batches of all ranks.

        Args:
            num_samples: samples that were made, so many reads went well.
            broken_paths: paths that failed and were replaced.

        Returns:
            The paths that were not known to be broken, to be named in the log.

        Raises:
            DenseSSLError: too many pictures are broken.
        """
        self.reads += num_samples + len(broken_paths)
        self.failures += len(broken_paths)
        new = [path for path in dict.fromkeys(broken_paths) if path not in self.paths]
        self.paths.update(dict.fromkeys(new))
        known, images = len(self.paths), self.num_images
        if images is not None and known > self.max_share * images:
            self._stop(f'{known} of {images} pictures', known / images)
        expected = self.max_share * max(self.reads, 100)
        if self.failures > expected + 3 * math.sqrt(expected):
            what = f'{self.failures} of the first {self.reads} pictures read'
            self._stop(what, self.failures / self.reads)
        return new

    def _stop(self, what: str, share: float) -> None:
        examples = ', '.join(f"'{path}'" for path in list(self.paths)[:3])
        raise DenseSSLError(
            f'{what} are broken ({share:.2%}, max_broken is {self.max_share:.2%}), '
            f'such as {examples}; mend or delete them, or raise max_broken'
        )
