"""What a query attends to in the last block, head by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.evaluation.features import FeatureExtractor
from densessl.models.backbones.window_attention import ShiftWindowMSA

from .panels import Grid, enlarged, framed, heat_over, patch_at, side_by_side


@dataclass(frozen=True)
class QueryAttention:
    """Attention of one query in the last block.

    Attributes:
        weights: ``(heads, h * w)`` float32 on the patches, in raster order. With what
            goes to other tokens and to a window's filling, each head's sum is 1.
            Outside the window of the query (Swin) it is 0.
        grid: ``(h, w)``.
        query: raster index of the query patch; None for the class token.
    """

    weights: Tensor
    grid: Grid
    query: int | None


def query_attention(
    extractor: FeatureExtractor,
    image: np.ndarray,
    point: tuple[float, float] | None = None,
) -> QueryAttention:
    """Attention of a patch, or of the class token, to all patches of a picture.

    ``softmax(q k^T / sqrt(c))`` from the queries and keys that the last block's
    attention has computed, or from the tokens of the query's window (Swin, with its
    position bias and shift mask).

    Args:
        extractor: a frozen ViT or Swin, ours or timm's.
        image: ``(H, W, 3)`` uint8 RGB; the patch divides both sides.
        point: ``(x, y)`` in fractions of the picture, 0..1. None is the class token, or
            the centre of a picture whose backbone has none.

    Raises:
        DenseSSLError: the backbone has no such attention, or the point lies outside.
    """
    last = None
    for module in extractor.backbone.modules():
        last = module if isinstance(module, tuple(_KINDS)) else last
    if last is None:
        kind = type(getattr(extractor.backbone, 'model', extractor.backbone)).__name__
        raise DenseSSLError(
            f'attention: {kind} has no attention of a ViT or a Swin; draw pca or '
            'similarity, which every backbone has'
        )
    parts, row = next(v for kind, v in _KINDS.items() if isinstance(last, kind))
    calls: dict[str, _Call] = {}
    handles = []
    for name in parts:

        def keep(module, args, kwargs, output, name=name) -> None:
            calls[name] = _Call(args, kwargs, output)

        part = last.get_submodule(name)
        handles.append(part.register_forward_hook(keep, with_kwargs=True))
    try:
        tokens = extractor(image[None])
    finally:
        for handle in handles:
            handle.remove()
    if point is None and tokens.cls is not None:
        query = None
    else:
        query = patch_at(point or (0.5, 0.5), tokens.grid)
    with torch.no_grad():
        weights = row(last, calls, query, tokens.grid)
    return QueryAttention(weights.float().cpu(), tokens.grid, query)


def entropies(weights: Tensor) -> Tensor:
    """Entropy in nats of each head's distribution over the patches, ``(heads,)``."""
    weights = weights.double()
    return torch.special.entr(weights / weights.sum(-1, keepdim=True)).sum(-1)


def mass_mask(weights: Tensor, mass: float) -> Tensor:
    """The smallest set of patches that holds a share of the attention to patches.

    Args:
        weights: ``(heads, N)``, 0 or more.
        mass: the share, above 0 and at most 1.

    Returns:
        ``(heads, N)`` bool. Patches of weight 0 are never in it.
    """
    weights = weights.double()
    shares, order = (weights / weights.sum(-1, keepdim=True)).sort(-1, descending=True)
    before = shares.cumsum(-1) - shares
    inside = (before < mass - 1e-9) & (shares > 0)
    return torch.zeros_like(inside).scatter(-1, order, inside)


def attention_sheet(
    image: np.ndarray, attention: QueryAttention, mass: float = 0.6
) -> np.ndarray:
    """The picture and a panel for each head, the most focused one first.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        attention: of that picture.
        mass: share of a head's attention to the patches whose patches are coloured,
            from dark blue to yellow for the head's greatest weight; see `mass_mask`.

    Returns:
        Uint8 RGB; titles tell the heads' entropies in nats.

    Raises:
        DenseSSLError: the share is out of range, or the weights are not finite.
    """
    if not 0 < mass <= 1:
        raise DenseSSLError(
            f'--mass {mass:g}: give a share of the attention, above 0 and at most 1'
        )
    weights, grid, query = attention.weights, attention.grid, attention.query
    if not torch.isfinite(weights).all():
        raise DenseSSLError(
            'attention: weights are not all finite; the backbone has diverged, take an '
            'earlier checkpoint'
        )
    image = enlarged(image)
    picture = image if query is None else framed(image, query, grid)
    panels = [('class token' if query is None else f'patch {query}', picture)]
    shown, nats = mass_mask(weights, mass), entropies(weights)
    for head in nats.argsort(stable=True).tolist():
        values = weights[head] / weights[head].max()
        panel = heat_over(image, values.numpy(), shown[head].numpy(), grid)
        panel = panel if query is None else framed(panel, query, grid)
        panels.append((f'head {head}: {nats[head]:.2f} nats', panel))
    return side_by_side(panels)


class _Call(NamedTuple):
    args: tuple
    kwargs: dict
    output: Any


def _vit_row(
    attn: nn.Module, calls: dict[str, _Call], query: int | None, grid: Grid
) -> Tensor:
    q, k = (calls[name].output[0] for name in ('q_norm', 'k_norm'))  # (heads, T, c)
    others = q.shape[1] - grid[0] * grid[1]  # class and register tokens come first
    token = 0 if query is None else others + query
    row = (q[:, token, None] * attn.scale @ k.mT).softmax(-1)[:, 0]
    return row[:, others:]


def _swin_row(
    attn: nn.Module, calls: dict[str, _Call], query: int, grid: Grid
) -> Tensor:
    x, side, shift = calls[''].args[0][0], attn.window_size, attn.shift_size
    if min(grid) == side and not attn.pad_small_map:
        shift = 0
    fill = (0, -grid[1] % side, 0, -grid[0] % side)
    places = F.pad(_raster(grid, x.device), fill, value=-1)
    places = places.roll((-shift, -shift), (0, 1))
    window, at, members = _find(places, (side, side), query)
    tokens = torch.where(members[:, None] < 0, 0.0, x[members])  # filled with zeros
    mask = None
    if shift:
        mask = ShiftWindowMSA.get_attn_mask(
            tuple(places.shape), side, shift, device=x.device
        )[window, at]
    return _window_row(attn.w_msa, tokens, at, mask, members, grid)


def _timm_swin_row(
    block: nn.Module, calls: dict[str, _Call], query: int, grid: Grid
) -> Tensor:
    windows, mask = calls['attn'].args[0], calls['attn'].kwargs.get('mask')
    side, shift = block.window_size, block.shift_size
    fill = (0, -grid[1] % side[1], 0, -grid[0] % side[0])
    places = _raster(grid, windows.device).roll((-shift[0], -shift[1]), (0, 1))
    window, at, members = _find(F.pad(places, fill, value=-1), side, query)
    mask = None if mask is None else mask[window, at]
    return _window_row(block.attn, windows[window], at, mask, members, grid)


def _raster(grid: Grid, device: torch.device) -> Tensor:
    return torch.arange(grid[0] * grid[1], device=device).view(grid)


def _find(places: Tensor, side: tuple[int, int], query: int) -> tuple[int, int, Tensor]:
    """The query's window, its place in it, and the patches there, -1 for filling."""
    rows, columns = (n // s for n, s in zip(places.shape, side, strict=True))
    windows = places.view(rows, side[0], columns, side[1]).transpose(1, 2)
    windows = windows.reshape(rows * columns, -1)
    ((window, at),) = (windows == query).nonzero().tolist()
    return window, at, windows[window]


def _window_row(
    msa: nn.Module,
    tokens: Tensor,
    at: int,
    mask: Tensor | None,
    members: Tensor,
    grid: Grid,
) -> Tensor:
    """Weights of one token of a window ``(n, C)``, put where its patches lie."""
    qkv = msa.qkv(tokens).view(len(tokens), 3, msa.num_heads, -1)
    q, k = qkv.permute(1, 2, 0, 3)[:2]  # (heads, n, c)
    bias = msa.relative_position_bias_table[
        msa.relative_position_index.view(len(tokens), -1)[at]
    ]
    logits = (q[:, at, None] * msa.scale @ k.mT)[:, 0] + bias.mT
    if mask is not None:
        logits = logits + mask
    row = logits.softmax(-1)
    weights = row.new_zeros(len(row), grid[0] * grid[1])
    weights[:, members[members >= 0]] = row[:, members >= 0]
    return weights


# For each kind of attention, the parts whose calls are kept and who reads them.
_KINDS = {
    Attention: (('q_norm', 'k_norm'), _vit_row),
    ShiftWindowMSA: (('',), _swin_row),
    SwinTransformerBlock: (('attn',), _timm_swin_row),
}
