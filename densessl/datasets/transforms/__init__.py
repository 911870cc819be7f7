"""Transforms: from a decoded picture to views with their geometry."""

from densessl.datasets.transforms.multi_crop import MultiCrop, ViewRecipe

__all__ = ['MultiCrop', 'ViewRecipe']
