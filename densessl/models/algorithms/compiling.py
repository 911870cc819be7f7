"""``torch.compile`` as a switch: the blocks of a vision transformer."""

from __future__ import annotations

import torch
from torch import nn

from densessl.errors import DenseSSLError

_GRAPHS = 64  # of one piece of code; torch goes on without compiling at 8


def compile_blocks(*backbones: nn.Module) -> None:
    """Have the blocks of backbones compiled where they are called in training mode.

    All blocks are one piece of code, made once for each set of shapes: for a size of
    views, with gradients or without, for all tokens or the first alone. So the first
    step takes long and no later one does. Names and weights stay as they are.

    Raises:
        DenseSSLError: a backbone whose blocks cannot be compiled.
    """
    for backbone in backbones:
        blocks = [block for block in backbone.modules() if hasattr(block, 'compiled')]
        if not blocks:
            raise DenseSSLError(
                f'compile=True: {type(backbone).__name__} has no blocks to compile, '
                'VisionTransformer has; leave compile out'
            )
        for block in blocks:
            block.compiled = True
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
