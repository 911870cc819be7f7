"""Datasets, the order of a run, and the way from a picture to a batch of views."""

from densessl.datasets.channels import LoadChannels, read_channels
from densessl.datasets.collate import BrokenImageMonitor, collate_views
from densessl.datasets.demo_scenes import DemoScenes
from densessl.datasets.image_io import LoadImage, UnreadableImageError, read_image
from densessl.datasets.samplers import EpochSampler, GlobalBatchSampler, SampleKey
from densessl.datasets.statistics import ChannelStatistics, channel_statistics
from densessl.datasets.transforms import MultiCrop, ViewRecipe
from densessl.datasets.unlabelled import UnlabelledImages

__all__ = [
    'BrokenImageMonitor',
    'ChannelStatistics',
    'DemoScenes',
    'EpochSampler',
    'GlobalBatchSampler',
    'LoadChannels',
    'LoadImage',
    'MultiCrop',
    'SampleKey',
    'UnlabelledImages',
    'UnreadableImageError',
    'ViewRecipe',
    'channel_statistics',
    'collate_views',
    'read_channels',
    'read_image',
]
