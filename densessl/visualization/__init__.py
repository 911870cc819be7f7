"""Pictures of what a network has learned: PCA-coloured features, training curves."""

from densessl.visualization.curves import read_scalars, save_comparison, save_curves
from densessl.visualization.pca import (
    pca_colours,
    pca_image,
    principal_components,
    save_pca,
    write_png,
)

__all__ = [
    'pca_colours',
    'pca_image',
    'principal_components',
    'read_scalars',
    'save_comparison',
    'save_curves',
    'save_pca',
    'write_png',
]
