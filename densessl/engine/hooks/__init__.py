"""Hooks: schedules, checkpoints, health, probes, and the report at the end."""

from .checkpoint import CheckpointHook, ResumeHook
from .health import BrokenImageHook, HealthHook, effective_rank, feature_std
from .probe import ProbeHook
from .report import ReportHook
from .schedule import ScheduleHook

__all__ = [
    'BrokenImageHook',
    'CheckpointHook',
    'HealthHook',
    'ProbeHook',
    'ReportHook',
    'ResumeHook',
    'ScheduleHook',
    'effective_rank',
    'feature_std',
]
