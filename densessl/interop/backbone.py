"""The teacher's backbone in one file: weights, config and normalisation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from densessl.errors import DenseSSLError

BACKBONE_FILE = 'backbone.safetensors'
_FORMAT = 'densessl-backbone'


def save_backbone(
    path: str | Path,
    backbone: nn.Module,
    config: dict,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    steps: int = 0,
) -> None:
    """Write a backbone with all that is needed to use it again.

    Args:
        path: file to write.
        backbone: the module.
        config: the config it was built from, plain values only.
        mean: per channel in 0..255, for normalising inputs.
        std: likewise.
        steps: training steps it has seen.
    """
    import densessl

    about = dict(
        format=_FORMAT,
        version=densessl.__version__,
        config=json.dumps(dict(config)),
        mean=json.dumps(list(mean)),
        std=json.dumps(list(std)),
        steps=str(steps),
    )
    state = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    Path(path).write_bytes(save(state, metadata=about))


def read_backbone(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """State dict and description (``config``, ``mean``, ``std``, ``steps``) of a file.

    Raises:
        DenseSSLError: no such file, or not one that :func:`save_backbone` wrote.
    """
    try:
        with safe_open(path, 'pt') as file:
            about = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise DenseSSLError(
            f'{path}: no such file; a run leaves {BACKBONE_FILE} in its work dir'
        ) from None
    except (SafetensorError, OSError) as error:
        raise DenseSSLError(
            f'{path}: not a safetensors file ({str(error)[:80]}); give the '
            f'{BACKBONE_FILE} of a work dir'
        ) from error
    if about.get('format') != _FORMAT:
        raise DenseSSLError(
            f'{path}: a safetensors file that densessl did not write, so its '
            f'architecture is unknown; give the {BACKBONE_FILE} of a work dir'
        )
    plain = {key: json.loads(about[key]) for key in ('config', 'mean', 'std')}
    return state, dict(plain, steps=int(about['steps']), version=about['version'])


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Load a state dict; refuse it whole when a key or a shape differs.

    Raises:
        DenseSSLError: names the first missing, unexpected and misshapen keys.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f'{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}'
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if not (missing or unexpected or misshapen):
        module.load_state_dict(state)
        return
    kinds = dict(missing=missing, unexpected=unexpected, misshapen=misshapen)
    found = '; '.join(
        f'{len(keys)} {kind} ({", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""})'
        for kind, keys in kinds.items()
        if keys
    )
    raise DenseSSLError(
        f'{what} is of another architecture: {found}; use the config it was made with'
    )


def load_backbone(path: str | Path) -> nn.Module:
    """The backbone of a ``backbone.safetensors``, in eval mode on the CPU.

    The module gives :class:`densessl.models.Tokens` for ``(B, C, H, W)`` images that
    are normalised with its attributes ``mean`` and ``std`` (lists, in 0..255).

    Raises:
        DenseSSLError: the file is missing, is of another kind, or does not fit.
    """
    from densessl.registry import MODELS

    state, about = read_backbone(path)
    backbone = MODELS.build(about['config'])
    load_strictly(backbone, state, str(path))
    backbone.mean, backbone.std = about['mean'], about['std']
    return backbone.eval()
