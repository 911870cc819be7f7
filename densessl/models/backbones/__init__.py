"""Backbones: images in, :class:`densessl.models.features.Tokens` out."""

from .swin import SwinTransformer
from .timm_backbone import TimmBackbone
from .vision_transformer import VisionTransformer, resize_pos_embed

__all__ = ['SwinTransformer', 'TimmBackbone', 'VisionTransformer', 'resize_pos_embed']
