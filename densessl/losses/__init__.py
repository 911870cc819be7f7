"""The maths of the objectives as pure functions; no registry, no collectives."""

from .distillation import Distillation, distillation_loss

__all__ = ['Distillation', 'distillation_loss']
