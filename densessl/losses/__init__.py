"""The maths of the objectives as pure functions; no registry, no collectives."""

from .distillation import Distillation, LastLayer, Pairs, distillation_loss

__all__ = ['Distillation', 'LastLayer', 'Pairs', 'distillation_loss']
