"""What every evaluation protocol is: a frozen backbone and a folder in, scores out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .features import FeatureExtractor


@dataclass(frozen=True)
class Scores:
    """What a protocol found.

    Attributes:
        metrics: by name, the one that counts first; shares in 0..1, distances with
            their unit in the name.
        settings: everything that the scores depend on beside the backbone; plain
            values, as they go into ``metrics.json``.
        pictures: files that were drawn.
    """

    metrics: dict[str, float]
    settings: dict[str, Any]
    pictures: list[Path] = field(default_factory=list)


def score_settings(protocol: Any) -> dict[str, Any]:
    """Arguments of a protocol that is a dataclass, less what no score depends on."""
    return {k: v for k, v in asdict(protocol).items() if k != 'num_workers'}


class EvaluationProtocol(Protocol):
    """A class of the registry ``EVALUATORS``; its arguments are a protocol's settings.

    ``configs/evaluation/NAME.py`` holds ``protocol = dict(type=..., ...)`` and, as
    ``data_root``, the folder that ``--data`` replaces. ``extractor = dict(layers=4)``
    there sets arguments of `FeatureExtractor`: with it, ``extractor(images)`` has the
    tokens of the last 4 blocks side by side, and the protocol need not know.

    A class with ``distributed = True`` shares its work over the ranks of torchrun; any
    other is refused there. Long loops go through `progress.progress`.
    """

    def run(self, extractor: FeatureExtractor, data: Path, out: Path) -> Scores:
        """Evaluate.

        Args:
            extractor: the frozen backbone.
            data: folder of the data set.
            out: folder for pictures and predictions; it exists.

        Raises:
            DenseSSLError: the data is not as the protocol needs it; one line.
        """
