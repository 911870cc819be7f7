"""Command line of ``tools/downstream.py``: fine-tuning in the OpenMMLab packages."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import pickle
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from densessl.command import run_command
from densessl.errors import DenseSSLError

from . import mmcv_ops

PACKAGES = dict(  # by the name that is imported: what pip calls it
    mmseg='mmsegmentation', mmdet='mmdet', mmpretrain='mmpretrain'
)


def find_script(package: str, script: str) -> Path:
    """A tool that a package brings along, such as ``train``.

    Args:
        package: a key of ``PACKAGES``.
        script: its name without ``.py``, with the folder where it is in one.

    Raises:
        DenseSSLError: the package is not installed, or has no such script.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DenseSSLError(
            f'{package} is not installed; pip install {PACKAGES[package]}'
        )
    tools = Path(next(iter(spec.submodule_search_locations))) / '.mim/tools'
    path = tools / f'{script}.py'
    if not path.is_file():
        known = ', '.join(sorted(path.stem for path in tools.glob('*.py')))
        raise DenseSSLError(
            f'{package} has no script {script!r}: {path} is not there; give one of '
            f'{known or "(none)"}, or install the package from PyPI, not from its '
            'sources'
        )
    return path


def allow_checkpoints() -> None:
    """Let PyTorch read checkpoints that a run of mmengine wrote, and no more.

    Since 2.6, ``torch.load`` refuses what is not a tensor or a plain value. Such a
    checkpoint also holds logged values: arrays in buffers, whose statistics are found
    by ``getattr``. Only those four are allowed for.
    """
    core = '_core' if np.lib.NumpyVersion(np.__version__) >= '2.0.0' else 'core'
    multiarray: Any = importlib.import_module(f'numpy.{core}.multiarray')
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            np.ndarray,
            np.dtype,
            *{type(np.dtype(code)) for code in ('f4', 'f8', 'i4', 'i8', '?')},
            *(
                (getattr(multiarray, name), f'numpy.{spelling}.multiarray.{name}')
                for name in ('_reconstruct', 'scalar')
                for spelling in ('_core', 'core')  # of new and of old files
            ),
            (_statistic, 'builtins.getattr'),
        ]
    )


def _statistic(owner: object, name: str) -> object:
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return vars(HistoryBuffer)[name]
    raise pickle.UnpicklingError(f'refused to look up {name!r} of {owner!r}')


def run(package: str, script: str, args: list[str]) -> None:
    """Run a package's own script, as ``python SCRIPT ARGS`` would.

    Raises:
        DenseSSLError: no such package or script, or a hook or an op of ours stops it.
    """
    path = find_script(package, script)
    if mmcv_ops.install() and os.environ.get('RANK', '0') == '0':
        print(
            "mmcv has no compiled ops: torchvision's nms and roi_align stand in",
            flush=True,
        )
    allow_checkpoints()
    sys.argv = [str(path), *args]
    runpy.run_path(str(path), run_name='__main__')


def main(argv: list[str] | None = None) -> int:
    """Entry point; users' errors end in one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog='tools/downstream.py',
        description='Run train, test and other scripts of an OpenMMLab package.',
    )
    parser.add_argument('package', choices=list(PACKAGES))
    parser.add_argument('script', help='such as train or test')
    parser.add_argument(
        'args', nargs=argparse.REMAINDER, help="the script's own; --help shows them"
    )
    args = parser.parse_args(argv)
    return run_command(run, args.package, args.script, args.args)
