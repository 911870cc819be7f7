"""Checkpoints of others as plain dicts of tensors, whatever wrote the file."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from densessl.engine.checkpoint import UNREADABLE
from densessl.errors import DenseSSLError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU: nested dicts, tensors, plain values.

    Reads files of ``torch.save`` (with ``weights_only=True``; settings kept as an
    ``argparse.Namespace`` or yacs ``CfgNode`` do no harm), safetensors, npz, and the
    msgpack files of Flax.

    Raises:
        DenseSSLError: no such file, a torn one, one with objects of other classes, one
            that densessl wrote itself, or no dict of weights; msgpack is not installed.
    """
    path = Path(path)
    if not path.is_file():
        what = 'a folder' if path.is_dir() else 'no such file'
        raise DenseSSLError(f'{path}: {what}; give the checkpoint file')
    with open(path, 'rb') as file:
        start = file.read(16)
    if start[:2] == b'PK':
        checkpoint = _read_zip(path)
    elif start[8:9] == b'{':
        checkpoint = _read_safetensors(path)
    elif start[:1] == b'\x80':
        checkpoint = _read_torch(path)
    else:
        checkpoint = _read_msgpack(path)
    if not isinstance(checkpoint, Mapping):
        raise DenseSSLError(
            f'{path}: holds a {type(checkpoint).__name__} instead of a dict of '
            'weights; save its state_dict() and give that file'
        )
    if str(checkpoint.get('kind', '')).startswith('densessl'):
        raise DenseSSLError(
            f"{path}: densessl's own checkpoint needs no import; give it to --resume, "
            'or the backbone.safetensors beside it to --init-from'
        )
    if not flatten(checkpoint):
        raise DenseSSLError(f'{path}: no tensors in it; give the file with the weights')
    return dict(checkpoint)


def flatten(tree: Mapping, prefix: str = '') -> dict[str, Tensor]:
    """Tensors of nested dicts by dotted name; all else is left out."""
    out: dict[str, Tensor] = {}
    for key, value in tree.items():
        name = f'{prefix}{key}'
        if isinstance(value, Tensor):
            out[name] = value
        elif isinstance(value, np.ndarray):
            out[name] = torch.from_numpy(np.ascontiguousarray(value))
        elif isinstance(value, Mapping):
            out.update(flatten(value, f'{name}.'))
    return out


def _read_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = any(name.endswith('.npy') for name in archive.namelist())
    except zipfile.BadZipFile:
        raise _torn(path) from None
    if not arrays:
        return _read_torch(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name.replace('/', '.'): arrays[name] for name in arrays.files}
    except (*UNREADABLE, zipfile.BadZipFile) as error:
        raise _torn(path, error) from error


def _read_torch(path: Path) -> Any:
    # settings, of which nothing is read; yacs's is a dict
    allowed = [argparse.Namespace, (OrderedDict, 'yacs.config.CfgNode')]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location='cpu', weights_only=True)
    except UNREADABLE as error:
        found = re.search(r'GLOBAL ([\w.]+)', str(error))
        if found is None:
            raise _torn(path, error) from error
        raise DenseSSLError(
            f'{path}: holds an object of class {found[1]}, which could run any code '
            'when loaded; if you trust the file, load it in the code it comes from '
            'and save its state dicts alone'
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, 'pt') as file:
            about = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _torn(path, error) from error
    if about.get('format', '').startswith('densessl'):
        raise DenseSSLError(
            f"{path}: densessl's own weights need no import; give them to --init-from"
        )
    return state


def _read_msgpack(path: Path) -> Any:
    try:
        import msgpack
    except ImportError:
        raise DenseSSLError(
            f'{path}: neither of torch nor safetensors nor npz; if it is a Flax '
            'checkpoint, the package msgpack is missing: pip install msgpack'
        ) from None
    try:
        with open(path, 'rb') as file:
            tree = msgpack.unpack(file, ext_hook=_flax_array, strict_map_key=False)
    except (*UNREADABLE, msgpack.UnpackException) as error:
        raise DenseSSLError(
            f'{path}: no checkpoint of torch, safetensors, npz or Flax, or a torn one '
            f'({_brief(error)}); get the file again'
        ) from error
    return _join_chunks(tree)


def _flax_array(code: int, data: bytes) -> Any:
    """Arrays (1) and scalars (3) as Flax packs them: shape, name of dtype, bytes."""
    import msgpack

    if code not in (1, 3):
        return None
    shape, name, buffer = msgpack.unpackb(data, raw=False)
    if name == 'bfloat16':  # the upper half of a float32
        bits = np.frombuffer(buffer, '<u2').astype('<u4') << 16
        return bits.view('<f4').reshape(shape)
    return np.frombuffer(buffer, name).reshape(shape).copy()


def _join_chunks(tree: Any) -> Any:
    """Flax cuts arrays beyond 1 GiB into flat pieces."""
    if not isinstance(tree, dict):
        return tree
    if '__msgpack_chunked_array__' in tree:
        shape, chunks = tree['shape'], tree['chunks']
        flat = np.concatenate([chunks[str(i)] for i in range(len(chunks))])
        return flat.reshape([int(shape[str(i)]) for i in range(len(shape))])
    return {key: _join_chunks(value) for key, value in tree.items()}


def _torn(path: Path, error: BaseException | None = None) -> DenseSSLError:
    cause = '' if error is None else f' ({_brief(error)})'
    return DenseSSLError(
        f'{path}: the file is torn or no checkpoint{cause}; get it again'
    )


def _brief(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:80]
