"""Heads: one pretext task each."""

from .base import DistillationHead, Head
from .cluster_head import ClusterHead
from .contrastive_head import ContrastiveHead, PredictionHead
from .contrastive_selfpatch_head import ContrastiveSelfPatchHead
from .point_head import PointHead
from .position_head import PositionHead
from .projector import DINOProjector
from .query_head import QueryHead
from .region_head import RegionHead
from .selfpatch_head import SelfPatchHead
from .view_head import ViewHead, pair_weights

__all__ = [
    'ClusterHead',
    'ContrastiveHead',
    'ContrastiveSelfPatchHead',
    'DINOProjector',
    'DistillationHead',
    'Head',
    'PointHead',
    'PositionHead',
    'PredictionHead',
    'QueryHead',
    'RegionHead',
    'SelfPatchHead',
    'ViewHead',
    'pair_weights',
]
