"""From what a command line calls a checkpoint to a `FeatureExtractor`."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any, Literal

import timm.data
import timm.models
import torch
from mmengine.config import Config
from safetensors import SafetensorError
from torch import Tensor, nn

from densessl.engine.checkpoint import UNREADABLE, load_run
from densessl.engine.pictures import use_pictures
from densessl.errors import DenseSSLError, one_line
from densessl.interop.backbone import (
    BACKBONE_FILE,
    branch,
    load_backbone,
    load_strictly,
)
from densessl.interop.fingerprint import fingerprint
from densessl.registry import MODELS

from .features import FeatureExtractor

# What timm raises without a net, and torch or safetensors for a file of another kind.
_UNREADABLE = (*UNREADABLE, SafetensorError)
KINDS = (
    f'{BACKBONE_FILE} or step_*.pth of a work dir, timm:NAME, timm:NAME@FILE or '
    'untrained:CONFIG'
)
"""What `load_network` takes for a checkpoint."""


def load_extractor(
    checkpoint: str, *, student: bool = False, **options: Any
) -> tuple[FeatureExtractor, dict[str, Any]]:
    """The network of a checkpoint for frozen features; see `load_network`.

    Args:
        checkpoint: as there.
        student: as there.
        **options: further arguments of `FeatureExtractor`.
    """
    backbone, about = load_network(checkpoint, student=student)
    return FeatureExtractor(backbone, backbone.mean, backbone.std, **options), about


def load_network(
    checkpoint: str, *, student: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the backbone that a checkpoint holds.

    Args:
        checkpoint: ``backbone.safetensors``, or a file of imported weights;
            ``step_*.pth`` of a run, whose config is inside; ``timm:NAME`` with timm's
            weights (from its cache, else from the net) or ``timm:NAME@FILE`` with those
            of a file; ``untrained:CONFIG``, the backbone of a training config as it
            starts from seed 0.
        student: the student of a ``step_*.pth`` in place of its teacher.

    Returns:
        The backbone, with ``mean`` and ``std`` of its inputs, the ``config`` it was
        built from and the training ``steps`` it has seen (None where unknown); and what
        tells the weights apart: ``name``, ``role`` (teacher or student, None where
        there is one network only), ``sha256`` of the file (None without one) and
        ``weights_sha256`` of the tensors.

    Raises:
        DenseSSLError: the file is missing or of another kind, the name is unknown, or
            the weights do not fit.
    """
    kind, colon, rest = checkpoint.partition(':')
    role = file = None
    if colon and kind == 'timm':
        backbone, file = _from_timm(rest)
    elif colon and kind == 'untrained':
        backbone = _untrained(rest)
    else:
        file = Path(checkpoint)
        if not file.is_file():
            raise DenseSSLError(f'checkpoint {file}: no such file; give {KINDS}')
        if file.suffix == '.safetensors':
            backbone = load_backbone(file)
            role = 'teacher'
        else:
            role = 'student' if student else 'teacher'
            backbone = _from_run(file, role)
    if student and role != 'student':
        raise DenseSSLError(
            f'--student: {checkpoint} holds one network only; give the step_*.pth of a '
            'work dir, which holds student and teacher'
        )
    return backbone, dict(
        name=checkpoint,
        role=role,
        sha256=None if file is None else hash_file(file),
        weights_sha256=fingerprint(backbone.state_dict()),
    )


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as ``sha256sum`` prints it."""
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_run(path: Path, kinds: str = KINDS) -> dict[str, Any]:
    """State of a run's checkpoint, as :func:`densessl.engine.checkpoint.load_run`.

    Raises:
        DenseSSLError: it is none, or cannot be read; names ``kinds`` of files instead.
    """
    try:
        return load_run(path)
    except DenseSSLError as error:  # which speaks of --resume
        raise DenseSSLError(
            f'checkpoint {path}: not a checkpoint of a run, or a damaged one; give '
            f'{kinds}'
        ) from error


def backbone_weights(
    state: dict[str, Tensor], role: Literal['student', 'teacher']
) -> dict[str, Tensor]:
    """Weights of a branch's backbone, out of the state dict of the algorithm."""
    prefix = 'backbone.' if role == 'student' else 'teacher.backbone.'
    return branch(state, prefix)


def build_part(part: dict, what: str) -> nn.Module:
    """A module of a config's model; a wrong option ends in one line about ``what``."""
    try:
        return MODELS.build(part)
    except (KeyError, TypeError) as error:
        raise DenseSSLError(f'{what}: {one_line(error)}') from error


def normalization_of(cfg: Config, what: str) -> dict[str, Any]:
    """``mean`` and ``std``, in 0..255, that a training config normalises with."""
    preprocessor = cfg.model.get('data_preprocessor') or dict(type='ViewPreprocessor')
    return build_part(preprocessor, what).normalization


def _from_run(path: Path, role: str) -> nn.Module:
    state = read_run(path)
    cfg = Config.fromstring(state['config'], '.py')
    backbone = _build(cfg, f'checkpoint {path}')
    weights = backbone_weights(state['state_dict'], role)
    load_strictly(backbone, weights, f'checkpoint {path}')
    backbone.steps = state['steps']
    return backbone


def _untrained(config: str) -> nn.Module:
    if not Path(config).is_file():
        raise DenseSSLError(
            f'checkpoint untrained:{config}: no such config; give one of configs/'
            'methods or configs/quickstart'
        )
    torch.manual_seed(0)
    cfg = Config.fromfile(config)
    use_pictures(cfg)
    return _build(cfg, f'checkpoint untrained:{config}')


def _build(cfg: Config, what: str) -> nn.Module:
    """The backbone of a training config, with its normalisation."""
    if 'backbone' not in cfg.get('model', {}):
        raise DenseSSLError(
            f'{what}: its config has no model.backbone; give the config of a training'
        )
    backbone = build_part(cfg.model.backbone, what)
    normalization = normalization_of(cfg, what)
    backbone.mean, backbone.std = normalization['mean'], normalization['std']
    backbone.config, backbone.steps = cfg.model.backbone.to_dict(), None
    return backbone


def _from_timm(words: str) -> tuple[nn.Module, Path | None]:
    name, at, path = words.partition('@')
    file = Path(path) if at else None
    what = f'checkpoint timm:{words}'
    if file is not None and not file.is_file():
        raise DenseSSLError(f'{what}: no such file {file}; mend the path')
    try:
        backbone = MODELS.build(
            dict(type='TimmBackbone', name=name, pretrained=file is None)
        )
        state = None if file is None else _timm_state(backbone.model, file)
    except _UNREADABLE as error:
        remedy = (
            f'timm cannot get weights for {name}; download them elsewhere and give '
            f'timm:{name}@FILE'
            if file is None
            else f'{file} holds no weights that timm can read; give another file'
        )
        line = f'{type(error).__name__}: {" ".join(str(error).split())[:120]}'
        raise DenseSSLError(f'{what}: {remedy} ({line})') from error
    if state is not None:
        load_strictly(backbone.model, state, what)
    data = timm.data.resolve_model_data_config(backbone.model)
    for key in ('mean', 'std'):
        setattr(backbone, key, [255 * value for value in data[key]])
    backbone.config, backbone.steps = dict(type='TimmBackbone', name=name), None
    return backbone, file


def _timm_state(model: nn.Module, file: Path) -> dict[str, Tensor]:
    """Weights of a file in timm's names, without a classifier.

    timm itself would load them through ``create_model`` and, without a classifier, be
    silent about those that are missing.
    """
    state = timm.models.load_state_dict(str(file), weights_only=True)
    convert = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    if convert is not None:  # names and table sizes of the authors' own files
        state = convert(state, model)
    heads = model.default_cfg.get('classifier') or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    classifier = tuple(f'{head}.' for head in heads)
    own = model.state_dict()
    return {k: v for k, v in state.items() if k in own or not k.startswith(classifier)}
