"""Algorithms: how branches, heads and the optimiser make a step."""

from .checks import NonFiniteLossError
from .self_distillation import SelfDistillation

__all__ = ['NonFiniteLossError', 'SelfDistillation']
