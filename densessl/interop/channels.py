"""Weights of another number of input channels: the first convolution, spread anew."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densessl.errors import DenseSSLError


def inflate_channels(weight: Tensor, channels: int) -> Tensor:
    """A convolution for ``channels`` inputs that answers grey pictures as before.

    From ``S`` to ``C >= S`` channels, channel ``c`` gets the weights of channel
    ``c mod S``, divided by how many times these are given out; to ``C < S``, every
    channel gets the sum of all weights divided by ``C``. Hence in both cases
    ``sum_c w'_c = sum_s w_s``: where all (normalised) channels are equal, the response
    is that of the ``S`` channels. This is timm's rule for ``C = 1`` and for multiples
    of ``S``; between them timm multiplies by ``S / C``, which keeps no such sum.

    Args:
        weight: ``(O, S, ...)``.
        channels: ``C`` > 0.

    Returns:
        ``(O, C, ...)`` of the same type; ``weight`` itself for ``C = S``.
    """
    stored = weight.shape[1]
    if channels == stored:
        return weight
    if channels < stored:
        mean = weight.double().sum(1, keepdim=True) / channels
        return mean.repeat_interleave(channels, 1).to(weight.dtype)
    source = torch.arange(channels, device=weight.device) % stored
    shares = torch.bincount(source).view(1, -1, *[1] * (weight.ndim - 2))
    return (weight.double() / shares)[:, source].to(weight.dtype)


def fit_channels(
    module: nn.Module, state: dict[str, Tensor], what: str, *, inflate: bool
) -> dict[str, Tensor]:
    """The weights of a file for a backbone of perhaps another number of channels.

    Args:
        module: the backbone.
        state: weights by the backbone's own names.
        what: the file, for the message.
        inflate: whether the first convolution may be changed, by
            :func:`inflate_channels`.

    Returns:
        ``state`` itself where the channels agree, or where the two differ in more than
        that; else a copy whose first convolution takes the backbone's channels.

    Raises:
        DenseSSLError: the channels differ, and ``inflate`` is not set.
    """
    own = module.state_dict()
    differing = [
        key
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    if len(differing) != 1:
        return state
    (key,) = differing
    there, here = state[key].shape, own[key].shape
    if len(here) < 3 or (there[:1] + there[2:]) != (here[:1] + here[2:]):
        return state
    if not inflate:
        raise DenseSSLError(
            f'{what} was trained on {there[1]} channels and the backbone has '
            f'in_channels={here[1]}; spread its first convolution over them by '
            '--inflate-channels, or start without it'
        )
    return {**state, key: inflate_channels(state[key], here[1])}
