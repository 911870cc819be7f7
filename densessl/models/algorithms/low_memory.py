"""Low-memory mode: the student's activations are computed twice instead of kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

_BLOCK = re.compile(r'(.*\.)?(blocks|layer\d+)\.\d+')  # of transformers, of ResNets


@contextmanager
def recomputed(*modules: nn.Module) -> Iterator[None]:
    """Within, each block of modules is called by :func:`recompute`.

    Blocks are named ``blocks.<i>`` or, in a ResNet, ``layer<n>.<i>``, in any number of
    stages. A module without such names is one block.
    """
    changed = []
    for module in modules:
        named = module.named_modules()
        blocks = [block for name, block in named if _BLOCK.fullmatch(name)]
        for block in blocks or [module]:
            block.forward = partial(recompute, block, block.forward)
            changed.append(block)
    try:
        yield
    finally:
        for block in changed:
            del block.forward  # the class's own shows again


def recompute(block: nn.Module, call: Callable, *args, **kwargs) -> Any:
    """``call(*args, **kwargs)``, of which only the arguments are kept for backward.

    There it is called again, and what that gives is gone back through at once
    (arXiv:1604.06174). The heads' losses are gone back through first, then call after
    call, from the last of the last views to the first of the first: each with the whole
    gradient at its output, as in gradient caching (arXiv:2101.06983), and with its own
    activations alone in memory. The second call sees the random numbers and the
    autocast of the first. What it writes into buffers is forgotten, so that batch norm
    counts a batch once.

    Args:
        block: whose buffers the call may write.
        call: one of its methods.
        *args: tensors and others; random numbers are those of the CPU and of the
            devices found here.
        **kwargs: likewise, but for devices.
    """
    return checkpoint(
        call,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _spare_buffers(block)),
        **kwargs,
    )


@contextmanager
def _spare_buffers(module: nn.Module) -> Iterator[None]:
    """Within, buffers are copies."""
    kept = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    for owner, name, buffer in kept:
        setattr(owner, name, buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in kept:
            setattr(owner, name, buffer)
