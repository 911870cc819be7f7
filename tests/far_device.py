"""A make-believe accelerator: what a GPU would refuse or wait for, without a GPU.

Its tensors have a device of their own and are computed on the CPU. An operation that
mixes them with the CPU's fails, as on a GPU, and each time that the CPU would have to
wait for a GPU is noted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = 'far'
_COPIES = {'copy_', '_to_copy'}
_MAY_INDEX = {'index', 'index_put', 'index_put_', '_index_put_impl_', '_unsafe_index'}
# their results' sizes depend on values
_LOOKS = {'_local_scalar_dense', 'nonzero', 'masked_select', 'bincount', 'equal'}


class FarTensor(torch.Tensor):
    """Of the far device; ``near`` holds its values."""

    @staticmethod
    def __new__(cls, near: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, near: torch.Tensor) -> None:
        self.near = near

    def tolist(self) -> list:
        FarDevice.now.note('tolist')
        return self.near.tolist()

    def __repr__(self) -> str:
        return f'FarTensor({self.near})'

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f'{func}: outside of the far device')


class FarDevice(TorchDispatchMode):
    """Within, tensors may be made on and moved to the device ``'far'``.

    Attributes:
        waits: places of our code that would wait for a GPU, and how often.
    """

    def __init__(self) -> None:
        _register()
        super().__init__()
        self.waits: Counter[str] = Counter()
        FarDevice.now = self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix('aten::')
        tensors = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        far = any(_is_far(t) for t in tensors)
        mixed = far and any(not _is_far(t) and t.dim() for t in tensors)
        wanted = kwargs.get('device')
        if wanted is not None:
            kwargs['device'] = torch.device('cpu')
            to_far = torch.device(wanted).type == NAME
        else:
            to_far = far
        index = name in _MAY_INDEX and _is_far(args[0])
        if mixed and not index and name not in _COPIES:
            raise RuntimeError(f'{name}: tensors of two devices, far and cpu')
        if reason := self.reason_to_wait(name, args, kwargs, far, to_far):
            self.note(reason)
        out = func(*tree_map(near, args), **tree_map(near, kwargs))
        return self.wrap(args, kwargs, out, to_far)

    def reason_to_wait(self, name, args, kwargs, far, to_far) -> str:
        """Why a GPU would have to be done before the CPU goes on, or nothing."""
        if far and name in _LOOKS:
            return name
        if far and name in _MAY_INDEX and _bool_index(args[1]):
            return 'boolean index'
        if name == '_to_copy' and far != to_far:
            there = to_far and kwargs.get('non_blocking', False)
            return '' if there else 'copy'
        if name == 'copy_' and len({_is_far(t) for t in args[:2]}) == 2:
            there = _is_far(args[0]) and any(args[2:])
            return '' if there else 'copy'
        return ''

    def wrap(self, args, kwargs, out, to_far):
        """Results as what was given where they were written, new ones where wanted."""
        own = {id(t.near): t for t in tree_leaves((args, kwargs)) if _is_far(t)}

        def of(value):
            if not torch.is_tensor(value) or not to_far:
                return value
            known = own.get(id(value))
            return FarTensor(value) if known is None else known

        return tree_map(of, out)

    def note(self, what: str) -> None:
        """Count a wait at the nearest line of ours."""
        root = str(ROOT / 'densessl')
        ours = [f for f in traceback.extract_stack() if f.filename.startswith(root)]
        place = f'{Path(ours[-1].filename).name} {ours[-1].name}' if ours else 'outside'
        self.waits[f'{place}: {what}'] += 1


def run_apart(script: str, *arguments) -> list[dict]:
    """What a script of ``tests`` prints, lines of JSON; in a process of its own."""
    path = ROOT / 'tests' / script
    folders = path.parent, ROOT / 'tests', ROOT / 'benchmarks/reference'
    ran = subprocess.run(
        [sys.executable, path, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=os.pathsep.join(map(str, folders))),
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def _is_far(value) -> bool:
    return isinstance(value, FarTensor)


def near(value):
    """A far tensor's values on the CPU; anything else as it is."""
    return value.near if _is_far(value) else value


def _bool_index(index) -> bool:
    return any(i is not None and i.dtype == torch.bool for i in index)


class _Module:
    """What torch asks of a device's module."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device=None) -> torch.Tensor:
        return torch.get_rng_state()  # values are drawn on the CPU

    def set_rng_state(self, state: torch.Tensor, device=None) -> None:
        torch.set_rng_state(state)


@cache
def _register() -> torch.library.Library:
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library('aten', 'IMPL')
    library.impl('empty_strided', _empty_strided, 'PrivateUse1')
    library.impl('_copy_from', _copy_from, 'PrivateUse1')
    return library


# What torch calls where it makes a tensor of Python's numbers, past any mode.


def _empty_strided(size, stride, dtype=None, **_) -> FarTensor:
    return FarTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    FarDevice.now.note('copy')
    near(target).copy_(near(source))
    return target
