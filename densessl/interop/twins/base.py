"""What stands for a backbone in another package, and how the two are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm.data
import torch
from torch import Tensor, nn

from densessl.interop.keymap import KeyMap
from densessl.models.backbones import TimmBackbone


@dataclass(frozen=True)
class Twin:
    """A backbone of another package that holds the same weights.

    Attributes:
        keymap: names of both layouts.
        state: the weights in our layout of their family, which ``keymap`` takes.
        config: how the other package builds it, plain values.
        build: builds it; None for Hugging Face, whose models come from files alone.
        features: its last features for images ``(B, C, H, W)``, ``(B, N, D)``.
        size: side in pixels of the images to compare features on.
        reference: our features of such images, where not the backbone's patch tokens.
        ignore: how names of parts begin that are no part of the backbone.
    """

    keymap: KeyMap
    state: dict[str, Tensor]
    config: dict[str, Any]
    build: Callable[[], nn.Module] | None
    features: Callable[[nn.Module, Tensor], Tensor]
    size: int
    reference: Callable[[Tensor], Tensor] | None = None
    ignore: tuple[str, ...] = ()


def arguments(config: dict) -> dict:
    """What a class takes, of a config that also names it."""
    return {key: value for key, value in config.items() if key != 'type'}


def last_map(module: nn.Module, x: Tensor) -> Tensor:
    """Tokens ``(B, N, D)`` of the last of a tuple of maps."""
    return module(x)[-1].flatten(2).mT


def largest_difference(twin: Twin, module: nn.Module, ours: nn.Module) -> float:
    """Largest difference of features over the largest feature, on random images.

    Args:
        twin: what ``module`` was built from.
        module: the other package's backbone, its weights loaded.
        ours: our backbone.
    """
    channels = next(value for value in twin.state.values() if value.ndim == 4).shape[1]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, twin.size, twin.size, generator=generator)
    reference = twin.reference or (lambda x: ours(x).patches)
    module.eval()
    ours.eval()  # the reference may be a part of it
    with torch.no_grad():
        expected = reference(images)
        found = twin.features(module, images)
    return float((found - expected).abs().max() / expected.abs().max())


def input_size(backbone: TimmBackbone) -> int:
    """Side in pixels of the images a timm model was made for."""
    return timm.data.resolve_model_data_config(backbone.model)['input_size'][-1]
