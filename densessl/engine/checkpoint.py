"""Checkpoints: plain tensors and numbers, written atomically, told apart by kind."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from mmengine.logging import print_log
from torch import nn

import densessl
from densessl.errors import DenseSSLError
from densessl.interop.backbone import BACKBONE_FILE, load_strictly, save_backbone

from .distributed import unwrap

RUN_KIND = 'densessl-run'
# A torn file can make torch's unpickler fail in any of these ways.
UNREADABLE = (
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in its place.

    Whatever happens, ``path`` is either the old file or the whole new one.

    Raises:
        DenseSSLError: the device is full, or the folder cannot be written.
    """
    partial = path.with_name(f'.{path.name}.partial')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with open(partial, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            partial.unlink()
        there = next(folder for folder in path.parents if folder.exists())
        free = shutil.disk_usage(there).free / 2**20
        cause = os.strerror(error.errno) if getattr(error, 'errno', 0) else str(error)
        if getattr(error, 'errno', 0) == errno.ENOSPC:
            cause = 'no space left on the device'
        cause = ' '.join(cause.split())[:120]
        raise DenseSSLError(
            f'cannot write {path}: {cause} ({free:.0f} MiB free); earlier files are '
            'intact, free some space (a run goes on with --resume)'
        ) from error


def run_state(runner, steps: int) -> dict:
    """Everything a run needs to go on after ``steps`` steps, in plain types."""
    return dict(
        kind=RUN_KIND,
        version=densessl.__version__,
        steps=steps,
        steps_per_epoch=runner.train_loop.steps_per_epoch,
        global_batch=runner.train_dataloader.batch_sampler.global_batch_size,
        seed=runner.seed,
        config=runner.cfg.pretty_text,
        state_dict=unwrap(runner.model).state_dict(),  # MMEngine's word for it
        optim_wrapper=runner.optim_wrapper.state_dict(),
    )


def save_run(runner, steps: int, folder: Path) -> Path:
    """Write ``step_<steps>.pth`` and the teacher's backbone beside it."""
    path = folder / f'step_{steps:08d}.pth'
    _write_state(run_state(runner, steps), path)
    model = unwrap(runner.model)
    write_atomically(
        folder / BACKBONE_FILE,
        lambda partial: save_backbone(
            partial,
            model.teacher.backbone,
            runner.cfg.model.backbone,
            **model.data_preprocessor.normalization,
            steps=steps,
        ),
    )
    return path


def list_runs(folder: Path) -> list[Path]:
    """Checkpoints of a work dir, oldest first."""
    return sorted(folder.glob('step_*.pth'))


def load_run(path: Path) -> dict:
    """State of a run, read with ``weights_only=True``, on the CPU.

    Raises:
        DenseSSLError: the file is no run checkpoint, or cannot be read.
    """
    if path.suffix == '.safetensors':
        raise DenseSSLError(
            f'--resume: {path} holds weights only, not a run; start a new run from it '
            f'with --init-from {path}'
        )
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=False)
    except FileNotFoundError:
        raise DenseSSLError(
            f'--resume: {path} does not exist; name a step_*.pth, or give no name'
        ) from None
    except UNREADABLE as error:
        raise DenseSSLError(
            f'--resume: {path} cannot be read ({type(error).__name__}); it '
            'may be truncated: name an earlier step_*.pth'
        ) from error
    if not isinstance(state, dict) or state.get('kind') != RUN_KIND:
        raise DenseSSLError(
            f'--resume: {path} is no checkpoint of a densessl run; weights start a new '
            f'run with --init-from {path}'
        )
    return state


def load_newest_run(folder: Path) -> tuple[Path, dict]:
    """The newest readable checkpoint; unreadable ones are passed over with a warning.

    Raises:
        DenseSSLError: there is none.
    """
    paths = list_runs(folder)
    for path in reversed(paths):
        try:
            return path, load_run(path)
        except DenseSSLError as error:
            print_log(f'{error}; falling back', logger='current', level=30)
    found = f'none of its {len(paths)} can be read' if paths else 'it has none'
    raise DenseSSLError(
        f'--resume: no checkpoint to go on from in {folder} ({found}); check '
        '--work-dir, or start without --resume'
    )


def restore_run(runner, state: dict, path: Path, add_heads: bool = False) -> None:
    """Put a run's state into a runner that is about to train.

    Args:
        runner: its loop has not begun.
        state: what ``load_run`` gave.
        path: of the file, for messages.
        add_heads: let the model have heads that the checkpoint lacks. They stay as they
            were built, everything else goes on from the checkpoint, and the schedules
            stand where its steps put them.

    Raises:
        DenseSSLError: it belongs to another architecture, batch size or data set size.
    """
    loop = runner.train_loop
    sampler = runner.train_dataloader.batch_sampler
    here = (loop.steps_per_epoch, sampler.global_batch_size)
    there = (state['steps_per_epoch'], state['global_batch'])
    if here != there:
        raise DenseSSLError(
            f'--resume: {path} was made with {there[0]} steps an epoch of {there[1]} '
            f'images, this run has {here[0]} of {here[1]}; use the same data and the '
            'same batch_size x processes'
        )
    if state['seed'] != runner.seed:
        raise DenseSSLError(
            f'--resume: {path} was made with seed {state["seed"]}, this run has '
            f'{runner.seed}; give --seed {state["seed"]}'
        )
    model = unwrap(runner.model)
    weights, optimizer = state['state_dict'], state['optim_wrapper']
    added = [
        name
        for name in model.heads
        if not any(key.startswith(_prefixes([name])) for key in weights)
    ]
    if added and not add_heads:
        raise DenseSSLError(
            f'--resume: {path} has no head {", ".join(added)}; use the config it was '
            'made with, or let new heads join its training by --add-heads'
        )
    if added:
        prefixes = _prefixes(added)
        own = model.state_dict()
        weights = {k: v for k, v in own.items() if k.startswith(prefixes)} | weights
    load_strictly(model, weights, f'--resume: {path}')
    groups = runner.optim_wrapper.optimizer.param_groups
    if len(groups) != (before := len(optimizer['optimizer']['param_groups'])):
        raise DenseSSLError(
            f'--resume: the optimiser of {path} has {before} groups of parameters, '
            f'that of this run {len(groups)}; turn optim_wrapper.layer_decay on or '
            'off, as it was there'
        )
    if added:
        optimizer = optimizer | dict(
            optimizer=_widened(optimizer['optimizer'], groups, model, prefixes)
        )
        runner.logger.info(
            f'new heads: {", ".join(added)}; projectors, centres and optimiser state '
            f'of these start anew, all else is from {path} (step {state["steps"]})'
        )
    runner.optim_wrapper.load_state_dict(optimizer)
    loop._iter = state['steps']
    loop._epoch = state['steps'] // loop.steps_per_epoch


def _prefixes(heads: list[str]) -> tuple[str, ...]:
    """How the state-dict keys of heads begin."""
    roots = ('heads', 'projectors', 'teacher.projectors')
    return tuple(f'{root}.{name}.' for root in roots for name in heads)


def _widened(
    old: dict, own_groups: list[dict], model: nn.Module, new: tuple[str, ...]
) -> dict:
    """State of an optimiser that did not know the parameters ``new`` begins.

    An optimiser numbers its parameters in the order of its groups. Those that are not
    new have kept their order.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    number, renamed, groups = 0, {}, []
    for group, old_group in zip(own_groups, old['param_groups'], strict=True):
        known = iter(old_group['params'])
        numbers = range(number, number + len(group['params']))
        for i, parameter in zip(numbers, group['params'], strict=True):
            if not names[id(parameter)].startswith(new):
                renamed[next(known)] = i
        groups.append(old_group | dict(params=list(numbers)))
        number = numbers.stop
    state = {renamed[i]: value for i, value in old['state'].items()}
    return dict(state=state, param_groups=groups)


def save_incident(runner, data_batch: dict, message: str) -> Path:
    """Keep the state and the names of the pictures of a step that went wrong."""
    folder = Path(runner.work_dir) / 'incidents'
    path = folder / f'step_{runner.iter:08d}_rank_{runner.rank}.pth'
    state = run_state(runner, runner.iter)
    state.update(kind='densessl-incident', message=message, paths=data_batch['paths'])
    _write_state(state, path)
    return path


def _write_state(state: dict, path: Path) -> None:
    def write(partial: Path) -> None:
        with open(partial, 'wb') as file:  # a file object: full disks raise OSError
            torch.save(state, file)

    write_atomically(path, write)
