"""Weights in one file, with config and normalisation: a backbone, or all of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from densessl.errors import DenseSSLError

BACKBONE_FILE = 'backbone.safetensors'
_BACKBONE, _WEIGHTS = 'densessl-backbone', 'densessl-weights'
_TEACHER = 'teacher.backbone.'


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
        mean: per channel, for normalising inputs, in the pictures' units (0..255 for
            8 bit, 0..65535 for 16).
        std: likewise.
        steps: training steps it has seen.
    """
    _save(path, _BACKBONE, backbone.state_dict(), config, mean, std, steps=steps)


def save_weights(
    path: str | Path,
    state: dict[str, Tensor],
    config: dict,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    source: str,
) -> None:
    """Write weights to start a run from: the backbone, and what else there is.

    Args:
        path: file to write.
        state: names as in the state dict of
            :class:`densessl.models.SelfDistillation`; the teacher's backbone at least.
        config: the config of the backbone, plain values only.
        mean: per channel, for normalising inputs, in the pictures' units (0..255 for
            8 bit, 0..65535 for 16).
        std: likewise.
        source: where they are from, in a line.
    """
    _save(path, _WEIGHTS, state, config, mean, std, source=source)


def _save(path, kind: str, state, config, mean, std, **more) -> None:
    import densessl

    about = dict(
        format=kind,
        version=densessl.__version__,
        config=json.dumps(dict(config)),
        mean=json.dumps(list(mean)),
        std=json.dumps(list(std)),
        **{key: str(value) for key, value in more.items()},
    )
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.data_ptr() in seen:  # one network for two: the format takes no ties
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        tensors[key] = tensor
    Path(path).write_bytes(save(tensors, metadata=about))


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """State dict of an algorithm and description of a file of weights.

    Of a ``backbone.safetensors`` the names are ``teacher.backbone.*`` alone.

    Returns:
        The tensors, and ``config``, ``mean``, ``std``, ``version``, and ``steps`` or
        ``source``.

    Raises:
        DenseSSLError: no such file, or not one that densessl wrote.
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
            f'{BACKBONE_FILE} of a work dir, or what tools/convert.py import wrote'
        ) from error
    if about.get('format') not in (_BACKBONE, _WEIGHTS):
        raise DenseSSLError(
            f'{path}: a safetensors file that densessl did not write, so its '
            f'architecture is unknown; give the {BACKBONE_FILE} of a work dir, or make '
            'one by tools/convert.py import'
        )
    if about['format'] == _BACKBONE:
        state = {f'{_TEACHER}{key}': value for key, value in state.items()}
        about['steps'] = int(about['steps'])
    for key in ('config', 'mean', 'std'):
        about[key] = json.loads(about[key])
    return state, about


def read_backbone(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """State dict of the teacher's backbone alone; see `read_weights`."""
    state, about = read_weights(path)
    return branch(state, _TEACHER), about


def branch(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state dict behind a prefix, which the names lose."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix)
    }


def load_strictly(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
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
    """The backbone of a ``backbone.safetensors``, or of imported weights, on the CPU.

    The module, in eval mode, gives :class:`densessl.models.Tokens` for ``(B, C, H, W)``
    images that are normalised with its attributes ``mean`` and ``std`` (lists, in
    0..255).

    Raises:
        DenseSSLError: the file is missing, is of another kind, or does not fit.
    """
    from densessl.registry import MODELS

    state, about = read_backbone(path)
    backbone = MODELS.build(about['config'])
    load_strictly(backbone, state, str(path))
    backbone.mean, backbone.std = about['mean'], about['std']
    backbone.config, backbone.steps = about['config'], about.get('steps')
    return backbone.eval()
