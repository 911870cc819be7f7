"""Hooks: schedules, checkpoints, health, probes, reports; weights downstream."""

from .checkpoint import CheckpointHook, ResumeHook
from .fingerprint import WeightFingerprintHook
from .health import BrokenImageHook, HealthHook, effective_rank, feature_std
from .probe import ProbeHook
from .progress_bar import ProgressBarHook
from .report import ReportHook
from .schedule import ScheduleHook

__all__ = [
    'BrokenImageHook',
    'CheckpointHook',
    'HealthHook',
    'ProbeHook',
    'ProgressBarHook',
    'ReportHook',
    'ResumeHook',
    'ScheduleHook',
    'WeightFingerprintHook',
    'effective_rank',
    'feature_std',
]
