"""Checkpoints of the papers' authors, of timm and of MMPretrain, in our layout."""

from .importing import (
    LAYOUTS,
    Imported,
    export_checkpoint,
    find_layout,
    import_checkpoint,
)

__all__ = [
    'LAYOUTS',
    'Imported',
    'export_checkpoint',
    'find_layout',
    'import_checkpoint',
]
