"""Pictures as they are stored: any number of channels, 8 or 16 bits a sample.

What a file may hold, and what becomes of it:

- TIFF, read by tifffile: bands interleaved, in planes, or one a page of equal size. A
  palette counts as RGB;
- ``.npy``: uint8 or uint16 ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)``. Of three axes,
  the last one is the channels' if it has as many as asked for, else the first; where
  no number is asked for, the shorter of the two, the last if they are equal;
- the other kinds, read by OpenCV: grey, RGB or RGBA; a palette counts as RGB, and grey
  with alpha as RGBA. An EXIF orientation is applied to JPEGs.

No sample is changed: 16-bit samples stay what they are, and alpha is a channel.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from densessl.datasets.image_io import (
    ENDINGS,
    TIFF_MARKS,
    UnreadableImageError,
    check_whole,
    parse_jpeg,
    read_bytes,
    turn_upright,
)
from densessl.errors import DenseSSLError
from densessl.registry import TRANSFORMS

_TO_RGB = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}
_MOST_PACKED = 2**12  # to one byte; only a damaged header says more
_NPY_MARK = b'\x93NUMPY'
# What tifffile and the decoders below it raise for a file that is damaged.
_TIFF_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def read_channels(
    path: str | os.PathLike[str], channels: int | None = None, bits: int | None = None
) -> np.ndarray:
    """Read a picture as it is stored, ``(H, W, C)`` uint8 or uint16.

    Args:
        path: the file.
        channels: ``C`` that it must have; None takes any.
        bits: 8 or 16, that its samples must have; None takes either.

    Raises:
        UnreadableImageError: the file is missing, empty, cut off, or no picture.
        DenseSSLError: it is a sound picture of another number of channels or bits, or
            a TIFF without tifffile installed.
    """
    name, data = str(path), read_bytes(path)
    check_whole(data, name)
    if data.startswith(_NPY_MARK):
        image = _read_npy(data, name, channels)
    elif data.startswith(TIFF_MARKS):
        image = _read_tiff(data, name)
    else:
        image = _read_cv2(data, name)
    if image.ndim != 3 or not image.size:
        raise DenseSSLError(
            f"'{name}' holds an array of {image.shape}; give (H, W), (H, W, C) or "
            '(C, H, W), not empty'
        )
    if image.dtype not in (np.uint8, np.uint16):
        raise DenseSSLError(
            f"'{name}' has {image.dtype} samples; 8 or 16 bits unsigned are needed: "
            'scale them to the range of uint16 and save them anew'
        )
    found = image.shape[2], 8 * image.itemsize
    wanted = channels or found[0], bits or found[1]
    if found != wanted:
        raise DenseSSLError(
            f"'{name}' has {_counted(*found)}, and {_counted(*wanted)} are expected; "
            f'set pictures.channels={found[0]} pictures.bits={found[1]} if all are '
            'like this one, else convert it or take it out of the folder'
        )
    return image


@TRANSFORMS.register_module()
class LoadChannels:
    """Read ``results['path']`` into ``results['img']``, as stored: ``(H, W, C)``.

    For pictures that are not to become RGB of 8 bits, as ``LoadImage`` makes them. In
    a config, ``pictures`` puts it in place; see docs/channels.md.

    Args:
        channels: ``C`` of every picture, 1 or more.
        bits: 8 (uint8) or 16 (uint16).

    Attributes:
        endings: of the files that it reads.

    Raises:
        DenseSSLError: an argument is out of range.
    """

    endings = (*ENDINGS, 'npy')

    def __init__(self, channels: int, bits: int = 8) -> None:
        if not isinstance(channels, int) or channels < 1 or bits not in (8, 16):
            raise DenseSSLError(
                f'LoadChannels: channels={channels!r}, bits={bits!r}; give an int > 0, '
                'and 8 or 16'
            )
        self.channels = channels
        self.bits = bits

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add ``img``; raises what :func:`read_channels` does."""
        results['img'] = read_channels(results['path'], self.channels, self.bits)
        return results

    def __repr__(self) -> str:
        return f'LoadChannels(channels={self.channels}, bits={self.bits})'


def resize_channels(
    image: np.ndarray, size: tuple[int, int], interpolation: int
) -> np.ndarray:
    """``cv2.resize`` of ``(H, W, C)`` with any number of channels.

    Args:
        image: uint8 or uint16.
        size: ``(H, W)`` in px.
        interpolation: OpenCV's flag.
    """
    if image.shape[2] == 3:
        return cv2.resize(image, size[::-1], interpolation=interpolation)
    planes = np.moveaxis(image, 2, 0)
    resized = [
        cv2.resize(np.ascontiguousarray(plane), size[::-1], interpolation=interpolation)
        for plane in planes
    ]
    return np.stack(resized, axis=2)


def shown_as_rgb(image: np.ndarray) -> np.ndarray:
    """RGB uint8 ``(..., H, W, 3)`` to look at; RGB of 8 bits is returned as it is.

    The first three channels, or the first one as grey where there are fewer. Samples
    of 16 bits are scaled so that the greatest one is white.

    Args:
        image: ``(..., H, W, C)`` uint8 or uint16.
    """
    image = image[..., :3] if image.shape[-1] >= 3 else image[..., [0, 0, 0]]
    if image.dtype == np.uint8:
        return image
    return (image * (255 / max(1, int(image.max())))).round().astype(np.uint8)


def _counted(channels: int, bits: int) -> str:
    return f'{channels} channel{"s" if channels > 1 else ""} of {bits} bits'


def _read_npy(data: bytes, name: str, channels: int | None) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, OSError) as error:
        raise UnreadableImageError(name, str(error).split('\n')[0]) from error
    if array.ndim == 2:
        return array[..., None]
    if array.ndim == 3:
        first, _, last = array.shape
        if first < last if channels is None else last != channels == first:
            array = np.moveaxis(array, 0, 2)
    # Samples may be stored in the other byte order.
    return np.ascontiguousarray(array, array.dtype.newbyteorder('='))


def _read_tiff(data: bytes, name: str) -> np.ndarray:
    tifffile = _tifffile()
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            series, page = file.series[0], file.pages[0]
            if series.nbytes > _MOST_PACKED * len(data):
                raise ValueError(f'its header speaks of {series.nbytes} bytes')
            axes, array = series.axes, series.asarray()
            colours = page.colormap if page.photometric.name == 'PALETTE' else None
    except _TIFF_ERRORS as error:
        if 'imagecodecs' in str(error):
            raise DenseSSLError(
                f"'{name}' is compressed in a way that needs imagecodecs; pip install "
                "'densessl[tiff]'"
            ) from error
        why = str(error).split('\n')[0] or 'it is no sound TIFF'
        raise UnreadableImageError(name, why) from error
    if colours is not None and array.ndim == 2:
        return np.moveaxis((colours[:, array] >> 8).astype(np.uint8), 0, 2)
    rest = [place for place, axis in enumerate(axes) if axis not in 'YX']
    if len(rest) > 1 or not {'Y', 'X'} <= set(axes):
        raise DenseSSLError(
            f"'{name}' holds an array of {array.shape}, axes {axes}; give pictures "
            'with one axis of channels beside rows and columns'
        )
    array = np.moveaxis(array, rest[0], 2) if rest else array[..., None]
    return np.ascontiguousarray(array, array.dtype.newbyteorder('='))


def _tifffile() -> ModuleType:
    try:
        import tifffile
    except ImportError as error:
        raise DenseSSLError(
            'TIFF pictures as they are stored need tifffile, which is not installed; '
            "pip install 'densessl[tiff]'"
        ) from error
    return tifffile


def _read_cv2(data: bytes, name: str) -> np.ndarray:
    jpeg = parse_jpeg(data, name) if data.startswith(b'\xff\xd8') else None
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None:
        raise UnreadableImageError(name, 'its content is no picture of a known kind')
    if jpeg is not None:
        image = turn_upright(image, jpeg.orientation)
    if image.ndim == 2:
        return image[..., None]
    code = _TO_RGB.get(image.shape[2])
    return image if code is None else cv2.cvtColor(image, code, dst=image)
