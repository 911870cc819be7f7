"""Necks: a view's representation from its tokens; a pyramid for other packages."""

from .class_attention import ClassAttentionNeck
from .pooling import AveragePoolNeck, ClassTokenNeck, Neck
from .vit_feature_pyramid import ViTFeaturePyramid

__all__ = [
    'AveragePoolNeck',
    'ClassAttentionNeck',
    'ClassTokenNeck',
    'Neck',
    'ViTFeaturePyramid',
]
