"""Algorithms: how branches, heads and the optimiser make a step."""

from .self_distillation import NonFiniteLossError, SelfDistillation

__all__ = ['NonFiniteLossError', 'SelfDistillation']
