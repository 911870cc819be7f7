"""Networks: backbones, necks, heads and the algorithm that joins them."""

from . import backbones, heads, necks
from .algorithms import NonFiniteLossError, SelfDistillation
from .features import Tokens, ViewFeatures
from .preprocessor import ViewPreprocessor

__all__ = [
    'NonFiniteLossError',
    'SelfDistillation',
    'Tokens',
    'ViewFeatures',
    'ViewPreprocessor',
    'backbones',
    'heads',
    'necks',
]
