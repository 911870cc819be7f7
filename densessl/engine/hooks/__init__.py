"""Hooks: schedules, checkpoints, health, and the report at the end."""

from .checkpoint import CheckpointHook, ResumeHook
from .health import BrokenImageHook, HealthHook, effective_rank, feature_std
from .report import ReportHook
from .schedule import ScheduleHook

__all__ = [
    'BrokenImageHook',
    'CheckpointHook',
    'HealthHook',
    'ReportHook',
    'ResumeHook',
    'ScheduleHook',
    'effective_rank',
    'feature_std',
]
