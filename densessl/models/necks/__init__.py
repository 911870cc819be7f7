"""Necks: a view's representation from its tokens."""

from .class_attention import ClassAttentionNeck
from .pooling import AveragePoolNeck, ClassTokenNeck, Neck

__all__ = ['AveragePoolNeck', 'ClassAttentionNeck', 'ClassTokenNeck', 'Neck']
