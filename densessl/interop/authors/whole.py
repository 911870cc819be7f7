"""Nothing is loaded in part: what an imported state must have, it has."""

from __future__ import annotations

from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.interop.backbone import branch
from densessl.models.batch_norm import BatchNormMLP
from densessl.models.heads.position_head import PositionHead
from densessl.models.heads.projector import DINOProjector
from densessl.models.necks import ClassAttentionNeck
from densessl.registry import MODELS

from .layout import State

BRANCHES = ('', 'teacher.')


def fill_branches(state: State) -> tuple[State, str | None]:
    """A part that one branch alone has becomes the other's as well, whole.

    Returns:
        The state, and which branch had no backbone: ``'student'``, ``'teacher'`` or
        None.
    """
    student, teacher = _by_part(state), _by_part(branch(state, 'teacher.'))
    out = dict(state)
    for part, weights in teacher.items():
        if part not in student:
            out.update({name: value.clone() for name, value in weights.items()})
    for part, weights in student.items():
        if part not in teacher:
            copies = {f'teacher.{name}': v.clone() for name, v in weights.items()}
            out.update(copies)
    if 'backbone' not in student:
        return out, 'student'
    return out, None if 'backbone' in teacher else 'teacher'


def _by_part(weights: State) -> dict[str, State]:
    """Those that both branches have: backbone, neck, and each projector."""
    parts: dict[str, State] = {}
    for name, value in weights.items():
        first, second, *_ = name.split('.')
        if first in ('backbone', 'neck', 'projectors'):
            part = f'{first}.{second}' if first == 'projectors' else first
            parts.setdefault(part, {})[name] = value
    return parts


def check_whole(state: State, config: dict) -> dict[str, int]:
    """Every part has exactly the names and shapes of the module it is for.

    Args:
        state: an algorithm's, both branches filled.
        config: of the backbone.

    Returns:
        Width of the output of every projector, by head.

    Raises:
        DenseSSLError: a name is missing or beyond, or a shape differs.
    """
    backbone = MODELS.build(config)
    width = backbone.embed_dims
    sizes: dict[str, int] = {}
    for which in BRANCHES:
        _check(f'{which}backbone', backbone, branch(state, f'{which}backbone.'))
        for head in _heads(state, f'{which}projectors.'):
            part = f'{which}projectors.{head}'
            weights = branch(state, f'{part}.')
            projector = _projector(part, width, weights)
            _check(part, projector, weights, optional=('content',))
            last = (
                'last_layer.weight_v' if 'last_layer.weight_v' in weights else '3.bias'
            )
            sizes[head] = len(weights[last])
        neck = branch(state, f'{which}neck.')
        if neck:
            depth = len({k.split('.')[1] for k in neck if k.startswith('blocks.')})
            _check(f'{which}neck', ClassAttentionNeck(width, depth=depth), neck)
    _check_heads(state, width, sizes)
    return sizes


def _check_heads(state: State, width: int, sizes: dict[str, int]) -> None:
    for head in _heads(state, 'heads.'):
        weights = branch(state, f'heads.{head}.')
        if 'center' in weights:
            expected = sizes.get(head, len(weights['center']))
            if len(weights['center']) != expected:
                raise DenseSSLError(
                    f'the centre of head {head} has {len(weights["center"])} values '
                    f'for {expected} prototypes; the file is torn'
                )
        predictor = branch(weights, 'predictor.')
        if head == 'position':
            side = round(len(_get('heads.position', weights, 'predictor.bias')) ** 0.5)
            _check('heads.position', PositionHead(width, grid=side), weights)
        elif predictor:
            hidden = len(_get(f'heads.{head}.predictor', predictor, '0.bias'))
            dims = sizes.get(head, 0)
            module = BatchNormMLP(dims, hidden, dims)
            _check(f'heads.{head}.predictor', module, predictor)


def _projector(part: str, width: int, weights: State) -> nn.Module:
    if 'mlp.0.weight' not in weights:
        hidden = len(_get(part, weights, '0.bias'))
        return BatchNormMLP(width, hidden, len(_get(part, weights, '3.bias')))
    prototypes, bottleneck = _get(part, weights, 'last_layer.weight_v').shape
    return DINOProjector(
        width,
        prototypes,
        hidden_dims=len(weights['mlp.0.weight']),
        bottleneck_dims=bottleneck,
    )


def _heads(state: State, prefix: str) -> list[str]:
    names = (k.removeprefix(prefix) for k in state if k.startswith(prefix))
    return sorted({name.split('.')[0] for name in names})


def _get(part: str, weights: State, name: str) -> Tensor:
    if name not in weights:
        raise DenseSSLError(f'{part} has no weight {name}; the file is incomplete')
    return weights[name]


def _check(
    part: str, module: nn.Module, weights: State, optional: tuple[str, ...] = ()
) -> None:
    own = module.state_dict()
    missing = [name for name in own if name not in weights]
    beyond = [name for name in weights if name not in own and name not in optional]
    shapes = [
        f'{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}'
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    found = [
        f'{len(names)} {what} ({", ".join(names[:3])}{", ..." if names[3:] else ""})'
        for what, names in (
            ('missing', missing),
            ('beyond it', beyond),
            ('of another shape', shapes),
        )
        if names
    ]
    if found:
        raise DenseSSLError(
            f'{part} of {type(module).__name__} is not whole: {"; ".join(found)}; the '
            'file is incomplete, or of a variant that densessl has no model for'
        )
