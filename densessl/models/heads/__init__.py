"""Heads: one pretext task each."""

from .base import DistillationHead, Head
from .projector import DINOProjector
from .selfpatch_head import SelfPatchHead
from .view_head import ViewHead, pair_weights

__all__ = [
    'DINOProjector',
    'DistillationHead',
    'Head',
    'SelfPatchHead',
    'ViewHead',
    'pair_weights',
]
