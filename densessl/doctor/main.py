"""Command line of ``tools/doctor.py``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import machine, packages
from .check import Report


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments of ``tools/doctor.py``, which are those of ``tools/train.py``."""
    parser = argparse.ArgumentParser(
        prog='tools/doctor.py',
        description='Look at packages, machine, config and pictures before a run. '
        'Exit code 1 with any failure, else 0.',
    )
    parser.add_argument('config', nargs='?', help='a file of configs/; or none')
    parser.add_argument('--preset', help="in place of a config: one, or 'auto'")
    parser.add_argument(
        '--data', nargs='+', metavar='DIR', help='folder(s) of pictures'
    )
    parser.add_argument('--work-dir', help='default: work_dirs/<name of the config>')
    parser.add_argument(
        '--processes', type=int, help='of the run, default: one a GPU, at least one'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override anything'
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Examine what the command line names; returns the exit code."""
    args = parse(argv)
    report = Report(lambda line: print(line, flush=True))
    report.run('packages', packages.check_versions())
    report.run('packages', packages.check_families())
    report.run('transformers', packages.check_transformers())
    sound = report.run('imports', packages.check_imports())
    if sound:
        report.run('GPU', machine.check_gpus())
    if sound and (args.config or args.preset or args.data):
        with _quiet():
            _examine(args, report)
    else:
        _machine(report, None)
        report.run('disk', machine.check_disk(Path('work_dirs'), None))
    print(report.summary())
    return report.exit_code


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MMEngine's log, but for warnings, out of the lines."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _machine(report: Report, loading: machine.Loading | None) -> None:
    torch = sys.modules.get('torch')
    threads = torch.get_num_threads() if hasattr(torch, 'get_num_threads') else 1
    report.run('CPU', machine.check_cores(threads, loading))
    report.run('shared memory', machine.check_shared_memory(loading))
    report.run('open files', machine.check_open_files(loading))


def _examine(args: argparse.Namespace, report: Report) -> None:
    """Config and pictures, each as far as what it needs is sound."""
    import torch

    from densessl.registry import MODELS

    from . import config, data, step

    processes = args.processes or max(1, torch.cuda.device_count())
    cfg = model = loading = need = None

    def read_config():
        nonlocal cfg, model, loading
        cfg = config.load(
            args.config, args.data, args.work_dir, args.cfg_options, args.preset
        )
        model = config.build('model', MODELS, cfg.model)
        yield from config.check_parts(cfg)
        loading = config.loading(cfg, processes)

    def take_steps():
        nonlocal need
        need = step.measure(cfg, model)
        yield from step.check_memory(need, cfg, loading)

    def open_data():
        dataset = data.open_folder(args.data) if cfg is None else config.dataset(cfg)
        if cfg is not None:
            yield from config.check_steps(cfg, dataset, processes)
        if hasattr(dataset, 'picture'):  # not of scenes that are drawn when asked for
            rate = 1 / need.seconds_per_image if need else None
            yield from data.check_pictures(dataset, cfg, loading, rate)

    wanted = args.config or args.preset
    if wanted:
        report.run('config', read_config())
    _machine(report, loading)
    if loading:
        report.run('work dir', config.check_work_dir(cfg))
        report.run('step', take_steps())
    folder = Path(cfg.work_dir if cfg else args.work_dir or 'work_dirs')
    room = config.disk_need(cfg, need.checkpoint_bytes) if need else (None,)
    report.run('disk', machine.check_disk(folder, *room))
    if loading or not wanted:
        report.run('data', open_data())
