"""Frozen-feature protocols behind one small `FeatureExtractor`."""

from densessl.evaluation.features import FeatureExtractor
from densessl.evaluation.linear_segmentation import (
    LinearSegmentation,
    SegmentationResult,
    linear_segmentation,
)
from densessl.evaluation.metrics import confusion_matrix, mean_iou, pixel_accuracy

__all__ = [
    'FeatureExtractor',
    'LinearSegmentation',
    'SegmentationResult',
    'confusion_matrix',
    'linear_segmentation',
    'mean_iou',
    'pixel_accuracy',
]
