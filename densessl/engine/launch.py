"""From a command line to a run: ``tools/train.py`` is this module's ``main``."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict, DictAction

from densessl.command import run_command
from densessl.errors import DenseSSLError, one_line

from .checkpoint import list_runs
from .distributed import init_process_group, model_wrapper_cfg
from .loggers import LOGGERS, use_loggers
from .pictures import use_pictures
from .presets import find_preset, fit_preset, print_choice

# What a training config may hold at its top level; names with a leading underscore are
# a config's own variables.
CONFIG_KEYS = (
    'activation_checkpointing',
    'compile',
    'custom_hooks',
    'custom_imports',
    'default_hooks',
    'default_scope',
    'env_cfg',
    'experiment_name',
    'log_level',
    'log_processor',
    'low_memory',
    'model',
    'optim_wrapper',
    'pictures',
    'randomness',
    'runner_type',
    'sync_bn',
    'train_cfg',
    'train_dataloader',
    'vis_backends',
    'visualizer',
    'work_dir',
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of ``tools/train.py``."""
    parser = argparse.ArgumentParser(
        prog='tools/train.py', description='Pretrain a backbone without labels.'
    )
    parser.add_argument('config', nargs='?', help='a file of configs/')
    parser.add_argument(
        '--preset',
        metavar='NAME',
        help='in place of a config: auto, to choose one for pictures and machine, or '
        'a file of configs/presets, such as 10k-pictures_1gpu; see docs/presets.md',
    )
    parser.add_argument(
        '--data',
        nargs='+',
        metavar='DIR',
        help='folder(s) of pictures, nested or flat; no labels needed',
    )
    parser.add_argument('--work-dir', help='default: work_dirs/<name of the config>')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='newest',
        metavar='STEP_PTH',
        help='go on with the run of the work dir, from its newest or this checkpoint',
    )
    parser.add_argument(
        '--init-from',
        metavar='FILE',
        help='start a new run from weights: a backbone.safetensors, or what '
        'tools/convert.py import wrote',
    )
    parser.add_argument(
        '--inflate-channels',
        action='store_true',
        help='with --init-from: spread the first convolution over other channels',
    )
    parser.add_argument(
        '--add-heads',
        action='store_true',
        help='with --resume: heads that the checkpoint lacks start anew and join in',
    )
    parser.add_argument(
        '--low-memory',
        action='store_true',
        help='compute activations twice instead of keeping them',
    )
    parser.add_argument(
        '--compile',
        action='store_true',
        help='let torch.compile make the blocks of a vision transformer, for GPUs',
    )
    parser.add_argument(
        '--log',
        nargs='+',
        choices=LOGGERS,
        default=(),
        help='also to TensorBoard or Weights & Biases; JSON lines are always written',
    )
    parser.add_argument('--seed', type=int, help='default: 0')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override anything, such as model.heads.selfpatch.top_k=8',
    )
    return parser.parse_args(argv)


def read_config(path: str, options: dict | None, keys: Sequence[str]) -> Config:
    """A config file with the overrides of a command line.

    Args:
        path: the file.
        options: what ``--cfg-options`` gave, by dotted key.
        keys: what the config may hold at its top level, beside names that begin with
            an underscore.

    Raises:
        DenseSSLError: no such file, or a key that nothing reads.
    """
    if not Path(path).is_file():
        raise DenseSSLError(
            f'config {path}: no such file; see configs/quickstart, configs/methods '
            'and configs/evaluation'
        )
    try:
        cfg = Config.fromfile(path)
        if options:
            _check_overrides(cfg, options)
            cfg.merge_from_dict(options)
    except (
        ImportError,
        LookupError,
        NameError,
        OSError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        raise DenseSSLError(f'config {path}: {one_line(error)}') from error
    for key in cfg:
        if key not in keys and not key.startswith('_'):
            raise DenseSSLError(
                f'config {path}: nothing reads the key {key!r}'
                f'{_did_you_mean(key, keys)}; start your own variables with an '
                'underscore'
            )
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """The config file with the command line's overrides, checked.

    Raises:
        DenseSSLError: no such file, or a key that nothing reads.
    """
    if bool(args.config) == bool(args.preset):
        raise DenseSSLError(
            f'found the config {args.config} and --preset {args.preset}; give one of '
            'them, such as --preset auto --data DIR'
        )
    config, options = args.config, args.cfg_options or {}
    if args.preset:
        config, pictures, machine = find_preset(args.preset, args.data, options)
    cfg = read_config(config, options, CONFIG_KEYS)
    if args.preset:
        print_choice(fit_preset(cfg, pictures, machine, options))
    if args.data:
        use_folders(cfg.train_dataloader.dataset, args.data)
    use_pictures(cfg)
    use_low_memory(cfg, args.low_memory)
    use_compile(cfg, args.compile)
    if args.seed is not None:
        cfg.randomness = dict(seed=args.seed)
    cfg.work_dir = args.work_dir or cfg.get(
        'work_dir', str(Path('work_dirs') / Path(config).stem)
    )
    use_loggers(cfg, args.log)
    cfg.default_hooks.resume = dict(
        type='ResumeHook',
        resume=args.resume,
        init_from=args.init_from,
        add_heads=args.add_heads,
        inflate_channels=args.inflate_channels,
    )
    adapt_to_machine(cfg)
    return cfg


def use_folders(dataset: ConfigDict, folders: list[str]) -> None:
    """Let a data set config read folders of pictures, with the transforms it has."""
    pipeline = [t for t in dataset.pipeline if t['type'] != 'LoadImage']
    keep = dict(fraction=dataset['fraction']) if 'fraction' in dataset else {}
    dataset.clear()
    dataset.update(
        type='UnlabelledImages',
        data_root=folders,
        pipeline=[dict(type='LoadImage', lazy=True), *pipeline],
        **keep,
    )


def use_low_memory(cfg: Config, wanted: bool) -> None:
    """Hand a training config's ``low_memory``, or a command line's, to its model."""
    if not (_switch(cfg, 'low_memory') or wanted):
        return
    if cfg.get('activation_checkpointing'):
        raise DenseSSLError(
            'low_memory=True with activation_checkpointing, which it does for all '
            'blocks itself; leave out activation_checkpointing'
        )
    cfg.low_memory = cfg.model.low_memory = True


def use_compile(cfg: Config, wanted: bool) -> None:
    """Hand a training config's ``compile``, or a command line's, to its model.

    The key does not stay: MMEngine's runner would compile the whole step by it.
    """
    if _switch(cfg, 'compile') or wanted:
        cfg.model.compile = True
    cfg.pop('compile', None)


def _switch(cfg: Config, key: str) -> bool:
    value = cfg.get(key, False)
    if not isinstance(value, bool):
        raise DenseSSLError(f'{key}={value!r} is no switch; give True or False')
    return value


def adapt_to_machine(cfg: Config) -> None:
    """Settings that follow from the machine and the launcher, not from the method."""
    loader = cfg.train_dataloader
    loader.setdefault('pin_memory', torch.cuda.is_available())
    loader.persistent_workers = loader.num_workers > 0
    # Samples depend on the run's seed, so another seed sees other crops.
    loader.dataset.setdefault('seed', cfg.randomness.seed)
    if init_process_group():
        cfg.launcher = 'pytorch'
        cfg.model_wrapper_cfg = model_wrapper_cfg()


def build_runner(cfg: Config):
    """The runner of a config.

    Raises:
        DenseSSLError: a part of the config names no known type, or does not fit it.
    """
    from densessl.registry import RUNNERS

    try:
        return RUNNERS.get(cfg.get('runner_type', 'Runner')).from_cfg(cfg)
    except (KeyError, TypeError) as error:
        raise DenseSSLError(f'config {cfg.filename}: {one_line(error)}') from error


def train(args: argparse.Namespace) -> None:
    """Run what the command line asks for."""
    cfg = load_config(args)
    existing = list_runs(Path(cfg.work_dir))
    if existing and not args.resume:
        raise DenseSSLError(
            f'work dir {cfg.work_dir} holds a run ({existing[-1].name}); go on with it '
            'by --resume, or choose another --work-dir'
        )
    try:
        Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DenseSSLError(
            f'work dir {cfg.work_dir} cannot be made ({error.strerror}); choose '
            'another by --work-dir'
        ) from error
    runner = build_runner(cfg)
    try:
        runner.train()
    except (KeyError, TypeError) as error:
        if 'registry' in str(error) or 'class `' in str(error):
            raise DenseSSLError(f'config {cfg.filename}: {one_line(error)}') from error
        raise
    except RuntimeError as error:
        if type(error).__module__.startswith(('torch._dynamo', 'torch._inductor')):
            raise DenseSSLError(
                f'compile=True: {str(error).splitlines()[0]}; leave compile out, or '
                'install what torch.compile needs, such as g++'
            ) from error
        raise


def main(argv: list[str] | None = None) -> int:
    """Entry point; users' errors end in one line and exit code 2."""
    try:
        return run_command(train, parse_args(argv))
    except KeyboardInterrupt:
        print('stopped; go on with --resume', file=sys.stderr)
        return 130


def _check_overrides(cfg: Config, options: dict) -> None:
    for dotted in options:
        node = cfg
        for key in dotted.split('.')[:-1]:
            if isinstance(node, dict | Config) and key not in node:
                raise DenseSSLError(
                    f'--cfg-options {dotted}: the config has no {key!r}'
                    f'{_did_you_mean(key, node)}'
                )
            node = node[int(key)] if isinstance(node, list | tuple) else node[key]


def _did_you_mean(word: str, known) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f', did you mean {near[0]!r}?' if near else ''
