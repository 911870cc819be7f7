"""Datasets, the order of a run, and the way from a picture to a batch of views."""

from densessl.datasets.collate import BrokenImageMonitor, collate_views
from densessl.datasets.demo_scenes import DemoScenes
from densessl.datasets.image_io import LoadImage, UnreadableImageError, read_image
from densessl.datasets.samplers import EpochSampler, GlobalBatchSampler, SampleKey
from densessl.datasets.transforms import MultiCrop, ViewRecipe
from densessl.datasets.unlabelled import UnlabelledImages

__all__ = [
    'BrokenImageMonitor',
    'DemoScenes',
    'EpochSampler',
    'GlobalBatchSampler',
    'LoadImage',
    'MultiCrop',
    'SampleKey',
    'UnlabelledImages',
    'UnreadableImageError',
    'ViewRecipe',
    'collate_views',
    'read_image',
]
