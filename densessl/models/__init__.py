"""Networks: backbones, necks, heads and the algorithm that joins them."""

from . import backbones, heads, necks
from .algorithms import NonFiniteLossError, SelfDistillation
from .features import Tokens, ViewFeatures
from .matchers import GeometricMatcher, Matcher, Matches, SimilarityMatcher, ViewTokens
from .patch_drop import PatchDrop
from .preprocessor import ViewPreprocessor

__all__ = [
    'GeometricMatcher',
    'Matcher',
    'Matches',
    'NonFiniteLossError',
    'PatchDrop',
    'SelfDistillation',
    'SimilarityMatcher',
    'Tokens',
    'ViewFeatures',
    'ViewPreprocessor',
    'ViewTokens',
    'backbones',
    'heads',
    'necks',
]
