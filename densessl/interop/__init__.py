"""Weights in and out."""

from .backbone import (
    load_backbone,
    load_strictly,
    read_backbone,
    read_weights,
    save_backbone,
    save_weights,
)

__all__ = [
    'load_backbone',
    'load_strictly',
    'read_backbone',
    'read_weights',
    'save_backbone',
    'save_weights',
]
