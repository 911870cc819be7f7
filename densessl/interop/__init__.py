"""Weights in and out."""

from .backbone import load_backbone, load_strictly, read_backbone, save_backbone

__all__ = ['load_backbone', 'load_strictly', 'read_backbone', 'save_backbone']
