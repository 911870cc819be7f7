"""The maths of the objectives as pure functions; no registry, no collectives."""

from .boxes import box_loss
from .contrastive import Contrast, info_nce
from .distillation import Distillation, LastLayer, Pairs, distillation_loss
from .sinkhorn import assigned_counts, entropy, mean_prediction, sinkhorn_center

__all__ = [
    'Contrast',
    'Distillation',
    'LastLayer',
    'Pairs',
    'assigned_counts',
    'box_loss',
    'distillation_loss',
    'entropy',
    'info_nce',
    'mean_prediction',
    'sinkhorn_center',
]
