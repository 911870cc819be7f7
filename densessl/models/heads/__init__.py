"""Heads: one pretext task each."""

from .base import DistillationHead, Head
from .projector import DINOProjector
from .region_head import RegionHead
from .selfpatch_head import SelfPatchHead
from .view_head import ViewHead, pair_weights

__all__ = [
    'DINOProjector',
    'DistillationHead',
    'Head',
    'RegionHead',
    'SelfPatchHead',
    'ViewHead',
    'pair_weights',
]
