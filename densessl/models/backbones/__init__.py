"""Backbones: images in, :class:`densessl.models.features.Tokens` out."""

from .cvt import CvT
from .position_embedding import resize_pos_embed
from .swin import SwinTransformer
from .timm_backbone import TimmBackbone
from .vil import VisionLongformer
from .vision_transformer import VisionTransformer

__all__ = [
    'CvT',
    'SwinTransformer',
    'TimmBackbone',
    'VisionLongformer',
    'VisionTransformer',
    'resize_pos_embed',
]
