"""Any timm backbone by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence

import timm
from mmengine.model import BaseModule
from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.models.features import Tokens
from densessl.registry import MODELS

from .vision_transformer import block_numbers


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """A timm model as a backbone: ViTs, hierarchical transformers and CNNs.

    Args:
        name: timm's name of the model, such as ``'vit_small_patch16_224'``.
        pretrained: whether timm may load (and so download) its weights; timm fits them
            to other channels than 3 by its own rule.
        in_channels: channels of the input.
        **options: handed to ``timm.create_model``. Where the model takes them,
            ``dynamic_img_size=True`` (ViT) or ``strict_img_size=False`` (Swin) are set
            so that views of several sizes work.

    Raises:
        DenseSSLError: timm has no such model, or it has no patch tokens.
    """

    def __init__(
        self, name: str, *, pretrained: bool = False, in_channels: int = 3, **options
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), 3, cutoff=0)
            raise DenseSSLError(
                f'TimmBackbone: timm {timm.__version__} has no model {name!r}; name '
                f'one of timm.list_models(), such as {", ".join(near)}'
            )
        options = {'in_chans': in_channels} | options
        self.name, self.options = name, options
        self.model = _create(name, pretrained, options)
        self.embed_dims = self.model.num_features
        self.patch_size = _patch_size(self.model)

    def forward(self, images: Tensor) -> Tokens:
        """Tokens of ``images`` ``(B, C, H, W)``."""
        x = self.model.forward_features(images)
        if x.ndim == 4:  # a map: channels first, or last as timm's Swin gives it
            if x.shape[-1] != self.embed_dims:
                x = x.permute(0, 2, 3, 1)
            return Tokens(x.flatten(1, 2), tuple(x.shape[1:3]))
        prefix = getattr(self.model, 'num_prefix_tokens', 0)
        grid = tuple(side // self.patch_size for side in images.shape[-2:])
        return Tokens(x[:, prefix:], grid, x[:, 0] if self._has_cls else None)

    def forward_layers(
        self, images: Tensor, layers: Sequence[int], *, norm: bool = True
    ) -> list[Tokens]:
        """Tokens after chosen blocks of a plain ViT.

        Args:
            images: as in ``forward``.
            layers: blocks counted from 0; negative ones count from the end.
            norm: whether each goes through the final norm.

        Raises:
            DenseSSLError: the model is no plain ViT, or has fewer blocks.
        """
        method = getattr(self.model, 'forward_intermediates', None)
        if 'return_prefix_tokens' not in inspect.signature(method or len).parameters:
            raise DenseSSLError(
                f'TimmBackbone: layers {list(layers)} of {type(self.model).__name__}; '
                'it gives its last, normed layer only: set layers=1 and norm=True'
            )
        wanted = block_numbers(layers, len(self.model.blocks), 'TimmBackbone')
        outputs = method(
            images,
            sorted(set(wanted)),
            return_prefix_tokens=True,
            norm=norm,
            output_fmt='NLC',
            intermediates_only=True,
        )
        grid = tuple(side // self.patch_size for side in images.shape[-2:])
        tokens = {}
        for layer, output in zip(sorted(set(wanted)), outputs, strict=True):
            patches, prefix = output if isinstance(output, tuple) else (output, None)
            tokens[layer] = Tokens(
                patches, grid, prefix[:, 0] if self._has_cls else None
            )
        return [tokens[layer] for layer in wanted]

    @property
    def _has_cls(self) -> bool:
        return getattr(self.model, 'cls_token', None) is not None


def _create(name: str, pretrained: bool, options: dict):
    for sizes in ({'dynamic_img_size': True}, {'strict_img_size': False}, {}):
        try:
            return timm.create_model(
                name, pretrained=pretrained, num_classes=0, **(sizes | options)
            )
        except TypeError as error:  # the model has no such argument
            if not sizes or not any(key in str(error) for key in sizes):
                raise
    raise AssertionError


def _patch_size(model) -> int:
    patch_embed = getattr(model, 'patch_embed', None)
    if hasattr(patch_embed, 'feat_ratio'):  # of a hybrid, its CNN included
        return patch_embed.feat_ratio(as_scalar=True)
    return model.feature_info[-1]['reduction']
