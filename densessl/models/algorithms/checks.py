"""What cannot be trained, or did not go well: each ends in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.geometry import ViewGeometry
from densessl.models.backbones.vision_transformer import VisionTransformer
from densessl.models.heads.base import Head
from densessl.models.patch_drop import PatchDrop
from densessl.schedules import Progress

Heads = Mapping[str, Head]


class NonFiniteLossError(DenseSSLError):
    """A loss term is NaN or infinite; raised before any weight has changed."""


def check_weights(heads: Heads) -> None:
    """Something is trained from the first step on."""
    if not heads:
        raise DenseSSLError('SelfDistillation: no heads; name at least one')
    if not any(head.loss_weight for head in heads.values()):
        raise DenseSSLError(
            f'SelfDistillation: the loss_weight of {", ".join(heads)} is 0 in step 0, '
            'so nothing would be trained; let one of them begin with its full weight'
        )


def check_frozen(freeze_epochs: float, progress: Progress) -> None:
    """The backbone is trained before the run ends."""
    epochs = progress.total_steps / progress.steps_per_epoch
    if not 0 <= freeze_epochs < epochs:
        raise DenseSSLError(
            f'SelfDistillation: freeze_backbone_epochs={freeze_epochs:g} of a run of '
            f'{epochs:g} epochs; give 0 or more, and less than the run has, or the '
            'backbone would never be trained'
        )


def check_neck(neck: nn.Module, heads: Heads) -> None:
    """The neck gives what the heads ask of it."""
    for name, head in heads.items():
        if head.needs_aggregate and not hasattr(neck, 'aggregate'):
            raise DenseSSLError(
                f'SelfDistillation: head {name!r} needs the representation of sets of '
                f'patches, and the neck {type(neck).__name__} has no method aggregate; '
                'use ClassAttentionNeck or AveragePoolNeck'
            )


def check_points(backbone: nn.Module, heads: Heads) -> None:
    """One head at most asks for reference tokens, of a backbone that carries them."""
    pointing = [name for name, head in heads.items() if head.needs_points]
    if len(pointing) > 1:
        raise DenseSSLError(
            f'SelfDistillation: heads {" and ".join(pointing)} both ask for reference '
            'tokens; leave one of them'
        )
    if pointing and not isinstance(backbone, VisionTransformer):
        raise DenseSSLError(
            f'SelfDistillation: head {pointing[0]!r} uses reference tokens, which need '
            f'a ViT, and the backbone is {type(backbone).__name__}; use '
            'VisionTransformer'
        )


def check_drop(
    backbone: nn.Module,
    heads: Heads,
    drop: Mapping[str, PatchDrop],
    no_positions: Sequence[str],
) -> None:
    """Heads and backbone can do without what is taken from the student's views."""
    before = [role for role, one in drop.items() if not one.after_encoder]
    vit = isinstance(backbone, VisionTransformer)
    if not vit and (before or no_positions):
        raise DenseSSLError(
            'SelfDistillation: drop before the encoder and no_positions need a '
            f'VisionTransformer, the backbone is {type(backbone).__name__}; set '
            'after_encoder=True, or leave them out'
        )
    for name, head in heads.items():
        seen = drop if head.student_roles is None else head.student_roles
        lost = [role for role in seen if role in drop]
        if head.whole_views and lost:
            raise DenseSSLError(
                f'SelfDistillation: head {name!r} needs every patch of its views, and '
                f'drop takes some of {", ".join(lost)}; leave one of them out'
            )


def check_views(
    heads: Heads,
    others: Iterable[str],
    inputs: Mapping[str, Tensor],
    geometry: ViewGeometry | None,
) -> None:
    """The views have every role that is named, in order, and places if need be.

    Args:
        heads: all of them, those that rest included.
        others: roles that drop and no_positions name.
        inputs: views by role.
        geometry: where the views lie, or None.
    """
    named = set(others)
    for head in heads.values():
        named.update(head.teacher_roles or (), head.student_roles or ())
        named.update(() if head.target_role is None else (head.target_role,))
    if not named <= inputs.keys():
        raise DenseSSLError(
            'SelfDistillation: heads, drop or no_positions name '
            f'{", ".join(sorted(named - inputs.keys()))}, but the views are '
            f'{", ".join(inputs)}; name roles of the recipe of views'
        )
    for name, head in heads.items():
        if head.target_role not in (None, next(iter(inputs))):
            raise DenseSSLError(
                f'SelfDistillation: head {name!r} predicts the {head.target_role} '
                f'views, and the recipe cuts them after others ({", ".join(inputs)}); '
                'put them first'
            )
        if head.needs_geometry and geometry is None:
            raise DenseSSLError(
                f'SelfDistillation: head {name!r} needs to know where each view lies, '
                'and the batch does not say; use a transform that tracks it '
                '(MultiCrop), or leave the head out'
            )


def check_finite(terms: Mapping[str, Tensor]) -> None:
    """No loss is NaN or infinite.

    Args:
        terms: scalars by name; ``'loss'`` is their total.
    """
    if terms['loss'].isfinite():
        return
    bad = [
        key for key, value in terms.items() if key != 'loss' and not value.isfinite()
    ]
    raise NonFiniteLossError(
        f'the loss is not finite: the first such term is {(bad or ["loss"])[0]}; lower '
        'the learning rate, lengthen its warm-up, or train with precision=bf16 or fp32'
    )
