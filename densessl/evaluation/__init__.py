"""Frozen-feature protocols behind one small `FeatureExtractor`."""

from densessl.evaluation.correspondence import Correspondence
from densessl.evaluation.depth import DepthEstimation
from densessl.evaluation.features import FeatureExtractor
from densessl.evaluation.kmeans_segmentation import KMeansSegmentation
from densessl.evaluation.knn import KNN
from densessl.evaluation.linear_classification import LinearClassification
from densessl.evaluation.linear_segmentation import (
    LinearSegmentation,
    SegmentationResult,
    linear_segmentation,
)
from densessl.evaluation.linear_suite import LinearSuite
from densessl.evaluation.localisation import Localisation
from densessl.evaluation.metrics import confusion_matrix, mean_iou, pixel_accuracy
from densessl.evaluation.segmentation_protocol import LinearSegmentationProtocol
from densessl.evaluation.video_segmentation import VideoSegmentation

__all__ = [
    'KNN',
    'Correspondence',
    'DepthEstimation',
    'FeatureExtractor',
    'KMeansSegmentation',
    'LinearClassification',
    'LinearSegmentation',
    'LinearSegmentationProtocol',
    'LinearSuite',
    'Localisation',
    'SegmentationResult',
    'VideoSegmentation',
    'confusion_matrix',
    'linear_segmentation',
    'mean_iou',
    'pixel_accuracy',
]
