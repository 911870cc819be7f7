"""MoBY's checkpoints: a dict whose ``model`` holds both encoders and the queues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from densessl.interop.keymap import KeyMap, Rule

from .layout import Layout, State, Traits, original_kind, weights_of
from .reading import flatten
from .tables import BACKBONES, BATCH_NORM_MLP, Line, behind

_PARTS = ('encoder.', 'encoder_k.', 'projector.', 'projector_k.', 'predictor.', 'queue')


def _gather(checkpoint: Mapping) -> State:
    weights = {
        name.removeprefix('module.'): value
        for name, value in flatten(weights_of(checkpoint)).items()
    }
    if not any(name.startswith(_PARTS) for name in weights):  # a backbone alone
        weights = {f'encoder_k.{name}': value for name, value in weights.items()}
    return weights


def _table(traits: Traits) -> KeyMap:
    backbone = BACKBONES[traits.kind]
    lines: list[Line] = [
        *behind(backbone, 'backbone.', 'encoder.'),
        *behind(backbone, 'teacher.backbone.', 'encoder_k.'),
        *behind(BATCH_NORM_MLP, 'projectors.view.', 'projector.'),
        *behind(BATCH_NORM_MLP, 'teacher.projectors.view.', 'projector_k.'),
        *behind(BATCH_NORM_MLP, 'heads.view.predictor.', 'predictor.'),
        Rule(
            'heads.view.queue',
            ('queue1', 'queue2'),  # a key a column
            lambda queue: (queue[0].T, queue[1].T),
            lambda first, second: torch.stack([first.T, second.T]),
        ),
        Rule(
            'heads.view.enqueued',
            'queue_ptr',
            lambda place: place.reshape(1),
            lambda place: place.reshape(()),
        ),
    ]
    return KeyMap('moby', *lines)


def _finish(state: State) -> State:
    """Keys are counted from the first on; the queues have been filled once at least."""
    if 'heads.view.enqueued' not in state:
        return state
    length = state['heads.view.queue'].shape[1]
    return state | {'heads.view.enqueued': state['heads.view.enqueued'] + length}


def _unfinish(state: State) -> State:
    if 'heads.view.enqueued' not in state:
        return state
    length = state['heads.view.queue'].shape[1]
    return state | {'heads.view.enqueued': state['heads.view.enqueued'] % length}


def _scatter(flat: State) -> dict[str, Any]:
    return dict(model=dict(flat))


LAYOUTS = [
    Layout(
        'moby',
        _gather,
        lambda flat: Traits(original_kind(list(flat))),
        _table,
        _scatter,
        ('projectors.view.', 'heads.view.predictor.', 'heads.view.queue'),
        vit=dict(cls_token=True, final_norm=True),
        finish=_finish,
        unfinish=_unfinish,
    )
]
