"""densessl: dense self-supervised pretraining of vision backbones.

Importing the package registers its parts and does nothing else.
"""

__version__ = '0.1.0'

from . import datasets, engine, models
from .errors import DenseSSLError
from .interop import load_backbone

__all__ = [
    'DenseSSLError',
    '__version__',
    'datasets',
    'engine',
    'load_backbone',
    'models',
]
