"""Command line of ``tools/evaluate.py``."""

from __future__ import annotations

import argparse
import json
import math
import platform
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import get_dist_info

import densessl
from densessl.command import run_command
from densessl.engine.distributed import init_process_group
from densessl.engine.launch import read_config
from densessl.errors import DenseSSLError, one_line
from densessl.registry import EVALUATORS

from .loading import KINDS, load_extractor
from .protocol import EvaluationProtocol, Scores

CONFIG_KEYS = ('custom_imports', 'data_root', 'extractor', 'protocol')
_PACKAGES = ('torch', 'torchvision', 'timm', 'numpy', 'cv2', 'PIL')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of ``tools/evaluate.py``."""
    parser = argparse.ArgumentParser(
        prog='tools/evaluate.py', description='Evaluate a frozen backbone.'
    )
    parser.add_argument('config', help='a file of configs/evaluation')
    parser.add_argument('checkpoint', help=KINDS)
    parser.add_argument('--data', metavar='DIR', help="default: the config's data_root")
    parser.add_argument(
        '--out',
        metavar='DIR',
        help='for metrics.json and pictures; default: evaluation/ beside the '
        'checkpoint, or in work_dirs',
    )
    parser.add_argument('--device', help='such as cpu or cuda; default: a GPU if any')
    parser.add_argument(
        '--precision',
        choices=('fp32', 'bf16', 'fp16'),
        help='of the forward pass; default: fp32',
    )
    parser.add_argument(
        '--batch-size', type=int, default=64, help='pictures in one forward pass'
    )
    parser.add_argument(
        '--student', action='store_true', help='of a step_*.pth; default: its teacher'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override anything, such as protocol.ks=[10,20]',
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; users' errors end in one line and exit code 2."""
    try:
        return run_command(_evaluate, parse_args(argv))
    except KeyboardInterrupt:
        return 130


def _evaluate(args: argparse.Namespace) -> None:
    try:
        evaluate(args)
    except torch.OutOfMemoryError as error:
        raise DenseSSLError(
            f'the GPU is full; lower --batch-size {args.batch_size}'
        ) from error


def evaluate(args: argparse.Namespace) -> Scores:
    """Run what the command line asks for, print the scores and write them.

    Raises:
        DenseSSLError: something of it is wrong.
    """
    if args.batch_size < 1:
        raise DenseSSLError(f'--batch-size {args.batch_size}: give 1 or more')
    cfg = read_config(args.config, args.cfg_options, CONFIG_KEYS)
    protocol = _build_protocol(cfg)
    data = _data_folder(args, cfg)
    ranks = init_process_group()
    if ranks and get_dist_info()[1] > 1 and not getattr(protocol, 'distributed', False):
        raise DenseSSLError(
            f'{type(protocol).__name__} runs in one process; start it without torchrun'
        )
    options = dict(cfg.get('extractor', {}))
    if args.precision:
        options['precision'] = args.precision
    try:
        extractor, checkpoint = load_extractor(
            args.checkpoint,
            student=args.student,
            device=_device(args.device),
            batch_size=args.batch_size,
            **options,
        )
    except TypeError as error:  # a name in the config's extractor
        raise DenseSSLError(
            f'config {args.config}: extractor: {one_line(error)}'
        ) from error
    out = Path(args.out) if args.out else _default_out(args)
    _make(out)
    scores = protocol.run(extractor, data, out)
    if get_dist_info()[0] == 0:
        about = dict(
            protocol=type(protocol).__name__,
            metrics=scores.metrics,
            settings=scores.settings,
            extractor=extractor.settings,
            checkpoint=checkpoint,
            data=str(data),
            versions=_versions(extractor.device),
        )
        text = json.dumps(_plain(about), indent=2, allow_nan=False)
        (out / 'metrics.json').write_text(f'{text}\n')
        print(table(scores.metrics))
        for path in (*scores.pictures, out / 'metrics.json'):
            print(path)
    return scores


def table(metrics: dict[str, float]) -> str:
    """A line for each metric, its value with 4 digits behind the point."""
    width = max(map(len, metrics), default=0)
    return '\n'.join(
        f'{name:<{width}}  {value:10.4f}' for name, value in metrics.items()
    )


def _build_protocol(cfg: Config) -> EvaluationProtocol:
    if 'type' not in cfg.get('protocol', {}):
        raise DenseSSLError(
            f'config {cfg.filename}: no protocol.type; give one of configs/evaluation'
        )
    try:
        return EVALUATORS.build(cfg.protocol)
    except (KeyError, TypeError) as error:
        raise DenseSSLError(f'config {cfg.filename}: {one_line(error)}') from error


def _data_folder(args: argparse.Namespace, cfg: Config) -> Path:
    folder = args.data or cfg.get('data_root')
    if not folder:
        raise DenseSSLError(
            f'config {args.config}: no data_root; name the folder by --data'
        )
    if not Path(folder).is_dir():
        raise DenseSSLError(
            f'data folder {folder}: no such folder; name another by --data'
        )
    return Path(folder)


def _device(name: str | None) -> torch.device:
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise DenseSSLError(
            f'--device {name}: {str(error).splitlines()[0][:100]}; give cpu, or cuda '
            'where torch sees a GPU'
        ) from error
    return device


def _default_out(args: argparse.Namespace) -> Path:
    """``FOLDER/evaluation/PROTOCOL/CHECKPOINT``, of the checkpoint's own folder."""
    kind, colon, rest = args.checkpoint.partition(':')
    protocol = Path(args.config).stem
    if colon and kind in ('timm', 'untrained'):
        name = Path(rest.partition('@')[0]).name.removesuffix('.py')
        return Path('work_dirs', 'evaluation', protocol, f'{kind}_{name}')
    path = Path(args.checkpoint)
    name = path.stem + ('_student' if args.student else '')
    return path.parent / 'evaluation' / protocol / name


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / 'metrics.json').unlink(missing_ok=True)
    except OSError as error:
        raise DenseSSLError(
            f'--out {out}: {error.strerror}; choose another folder'
        ) from error


def _versions(device: torch.device) -> dict[str, str]:
    packages = {name: import_module(name).__version__ for name in _PACKAGES}
    gpu = torch.cuda.get_device_name(device) if device.type == 'cuda' else None
    return dict(
        densessl=densessl.__version__,
        python=platform.python_version(),
        **packages,
        device=gpu or device.type,
    )


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN becomes null, a path its name, a tuple a list."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
