"""What is to be known of a layout, whosever it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.interop.keymap import KeyMap

State = dict[str, Tensor]

# ImageNet's, in 0..255; all of these authors normalise so
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


class Traits(NamedTuple):
    """What decides between the tables of a layout.

    Attributes:
        kind: of the backbone: vit, swin, cvt, resnet or dinov2.
        cls: whether it has a class token.
        num_heads: of a ViT, where the weights tell.
    """

    kind: str
    cls: bool = True
    num_heads: int | None = None


@dataclass(frozen=True)
class Layout:
    """A layout of checkpoints: how its names become ours, and back.

    Attributes:
        name: what ``--from`` takes.
        gather: a checkpoint as one flat dict of names that the tables know.
        traits: of such a flat dict.
        table: the key map for these traits.
        scatter: the inverse of ``gather``.
        parts: prefixes of ours that a full training state of this layout has besides
            both backbones.
        vit: entries that the config of a ViT of this layout always has.
        options: entries of the backbone's config that come with the method, by kind.
        differs: what the authors' network computes otherwise, by kind; ``''`` for all.
        finish: what the tables cannot say, on the way in.
        unfinish: its inverse, on the way out.
    """

    name: str
    gather: Callable[[Mapping], State]
    traits: Callable[[State], Traits]
    table: Callable[[Traits], KeyMap]
    scatter: Callable[[State], dict[str, Any]]
    parts: tuple[str, ...] = ()
    vit: Mapping[str, bool] = field(default_factory=dict)
    options: Mapping[str, dict] = field(default_factory=dict)
    differs: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[State], State] = lambda state: state
    unfinish: Callable[[State], State] = lambda state: state


def original_kind(names: list[str]) -> str:
    """Kind of backbone in the authors' PyTorch names, whatever stands before them."""
    for kind, sign in (
        ('swin', 'layers.0.blocks.0.'),
        ('cvt', 'stage0.0.proj.'),
        ('resnet', 'layer1.0.conv1.'),
        ('vit', 'blocks.0.attn.qkv.'),
    ):
        if any(f'.{sign}' in f'.{name}' for name in names):
            return kind
    raise DenseSSLError(
        f'no backbone among the names {", ".join(names[:3])}, ...; ViT, Swin, CvT and '
        'ResNet can be imported'
    )


def weights_of(checkpoint: Mapping) -> Mapping:
    """The dict of weights in a file that has nothing else to offer."""
    for key in ('state_dict', 'model', 'teacher'):
        if isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    return checkpoint
