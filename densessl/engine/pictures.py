"""What pictures a config trains on: its reader, its model and its normalisation."""

from __future__ import annotations

from mmengine.config import Config

from densessl.errors import DenseSSLError

_KEYS = ('channels', 'bits', 'mean', 'std')


def use_pictures(cfg: Config) -> None:
    """Follow a training config's ``pictures``, in all parts that depend on it.

    ``pictures = dict(channels='rgb')`` leaves everything as it is: any picture becomes
    RGB of 8 bits. With ``dict(channels=C, bits=8 or 16, mean=[...], std=[...])``
    pictures are read as they are stored (``LoadChannels``), the backbone gets
    ``in_channels=C``, and the data preprocessor the mean and standard deviation, in
    0..255 or 0..65535.

    Raises:
        DenseSSLError: a key is missing, unknown or does not fit.
    """
    pictures = cfg.get('pictures') or dict(channels='rgb')
    unknown = set(pictures) - set(_KEYS)
    if unknown:
        raise DenseSSLError(
            f'pictures: nothing reads the key {min(unknown)!r}; use {", ".join(_KEYS)}'
        )
    channels = pictures.get('channels')
    if channels == 'rgb':
        if set(pictures) != {'channels'}:
            raise DenseSSLError(
                f"pictures: {sorted(pictures)} with channels='rgb', which makes RGB of "
                '8 bits; give a number of channels to read pictures as they are stored'
            )
        return
    mean, std = (pictures.get(key, []) for key in ('mean', 'std'))
    mean, std = (x if isinstance(x, list | tuple) else [x] for x in (mean, std))
    bits = pictures.get('bits', 8)
    if not isinstance(channels, int) or channels < 1 or bits not in (8, 16):
        raise DenseSSLError(
            f"pictures: channels={channels!r}, bits={bits!r}; give 'rgb' or a number "
            'of channels, and 8 or 16'
        )
    most = 2**bits - 1
    if (
        not len(mean) == len(std) == channels
        or not all(0 <= value <= most for value in mean)
        or not all(1 <= value <= most for value in std)
    ):
        raise DenseSSLError(
            f'pictures: mean={list(mean)}, std={list(std)} for {channels} channels of '
            f'{bits} bits; give {channels} numbers in each, mean in 0..{most} and std '
            'from 1 (none is constant): densessl.datasets.channel_statistics finds them'
        )
    probe = cfg.default_hooks.get('probe') or {}
    labelled = [key for key in ('segmentation', 'knn') if probe.get(key)]
    if labelled and (channels, bits) != (3, 8):
        raise DenseSSLError(
            f'default_hooks.probe.{labelled[0]}: labelled pictures are read as RGB of '
            f'8 bits, and the training has {channels} channels of {bits}; take it out'
        )
    dataset = cfg.train_dataloader.dataset
    reader = dict(type='LoadChannels', channels=channels, bits=bits)
    dataset.pipeline = [
        reader if step['type'] == 'LoadImage' else step for step in dataset.pipeline
    ]
    cfg.model.backbone.in_channels = channels
    preprocessor = cfg.model.get('data_preprocessor') or dict(type='ViewPreprocessor')
    normalization = dict(mean=list(mean), std=list(std))
    cfg.model.data_preprocessor = {**preprocessor, **normalization}
