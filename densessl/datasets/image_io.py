"""Read any picture as RGB uint8: OpenCV for the common kinds, Pillow for the odd ones.

What a file may hold, and what becomes of it:

- grey and palette pictures are expanded to RGB; CMYK is converted;
- an alpha channel is dropped, not composited, as training pipelines commonly do;
- 16-bit samples become 8-bit ones, ``round(value / 257)``;
- an EXIF orientation is applied, so that the picture is upright;
- a missing, empty, cut-off or foreign file raises :class:`UnreadableImageError`;
- a TIFF of bands that are no colours is refused: see :mod:`densessl.datasets.channels`,
  which reads pictures as they are stored.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from densessl.errors import DenseSSLError
from densessl.registry import TRANSFORMS

ENDINGS = ('jpg', 'jpeg', 'png', 'bmp', 'tif', 'tiff', 'webp', 'ppm', 'pgm')
"""Endings of the files that are taken for pictures."""
TIFF_MARKS = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
"""First bytes of a TIFF, little and big endian; then of a BigTIFF."""
_REMEDY = 'replace the file or take it off the list'
_RGB = getattr(cv2, 'IMREAD_COLOR_RGB', 0)  # OpenCV 4.11; others give BGR only
_REDUCED_FLAGS = {
    1: cv2.IMREAD_GRAYSCALE,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
# Start-of-frame markers; three codes in their range mean other things.
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


class UnreadableImageError(DenseSSLError):
    """A picture that cannot be read: ``path`` names it and ``why`` says what is wrong.

    Survives pickling, so that a data-loader worker can pass it on.
    """

    def __init__(self, path: str | os.PathLike[str], why: str = '') -> None:
        self.path = str(path)
        self.why = why
        super().__init__(
            f"cannot read '{path}': {why}; {_REMEDY}" if why else self.path
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.why)


@dataclass(frozen=True)
class JpegImage:
    """A JPEG whose header has been read and whose pixels have not.

    With the size known, crops can be drawn first and the picture then be decoded at a
    half, quarter or eighth of the size, which costs less than half the time.
    ``numpy.asarray`` decodes at full size.

    Attributes:
        data: the file's bytes.
        name: the file, for error messages.
        height: rows in px, upright.
        width: columns in px, upright.
        orientation: EXIF orientation, 1 to 8; 1 is upright.
    """

    data: bytes
    name: str
    height: int
    width: int
    orientation: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(H, W, 3)`` of the upright picture, as of the decoded array."""
        return self.height, self.width, 3

    def reduction(self, factor: float) -> int:
        """The largest reduction of 1, 2, 4, 8 that is at most ``factor``.

        In a reduced picture, pixel i covers ``[i r, (i + 1) r)`` of the stored one. A
        rotation keeps that only if r divides both sides, so other reductions are left
        out for rotated pictures.
        """
        fits = [
            step
            for step in (2, 4, 8)
            if step <= factor
            and (self.orientation == 1 or not (self.height % step or self.width % step))
        ]
        return max(fits, default=1)

    def decode(self, reduction: int = 1) -> np.ndarray:
        """Decode to RGB uint8 ``(ceil(H / reduction), ceil(W / reduction), 3)``.

        Args:
            reduction: 1, 2, 4 or 8.

        Raises:
            UnreadableImageError: the compressed data are damaged.
        """
        colour = _RGB or cv2.IMREAD_COLOR  # the bit that makes a grey flag another
        size = _REDUCED_FLAGS[reduction]
        image = _decode_cv2(self.data, colour | size | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            image = _decode_pillow(self.data, self.name, upright=False)
            image = np.array(Image.fromarray(image).reduce(reduction))
        return turn_upright(image, self.orientation)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.decode().astype(dtype or np.uint8, copy=False)


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a picture of any supported kind as RGB uint8 ``(H, W, 3)``.

    Raises:
        UnreadableImageError: the file is missing, empty, cut off, or no picture.
    """
    return np.asarray(open_image(path))


def open_image(path: str | os.PathLike[str]) -> np.ndarray | JpegImage:
    """Like :func:`read_image`, but leave a plain JPEG undecoded."""
    return open_image_bytes(read_bytes(path), str(path))


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A picture's file.

    Raises:
        UnreadableImageError: the file is missing or may not be read.
    """
    try:
        with open(path, 'rb', buffering=0) as file:
            return file.read()
    except FileNotFoundError:
        raise UnreadableImageError(path, 'there is no such file') from None
    except OSError as error:
        raise UnreadableImageError(path, error.strerror or str(error)) from error


def open_image_bytes(data: bytes, name: str) -> np.ndarray | JpegImage:
    """Like :func:`open_image` for bytes, say of an archive's member called ``name``."""
    check_whole(data, name)
    if data.startswith(b'\xff\xd8'):
        jpeg = parse_jpeg(data, name)
        return _decode_pillow(data, name) if jpeg is None else jpeg
    if data.startswith(TIFF_MARKS):
        _check_colours(data, name)
    image = _decode_cv2(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    return _decode_pillow(data, name) if image is None else _to_uint8(image, name)


def check_whole(data: bytes, name: str) -> None:
    """Raise :class:`UnreadableImageError` for an empty file and for half a PNG."""
    if not data:
        raise UnreadableImageError(name, 'the file is empty')
    if data.startswith(b'\x89PNG') and b'IEND' not in data:
        raise UnreadableImageError(name, 'the file is cut off')


@TRANSFORMS.register_module()
class LoadImage:
    """Read ``results['path']`` into ``results['img']``, RGB uint8 ``(H, W, 3)``.

    Args:
        lazy: leave a plain JPEG as a :class:`JpegImage`, for a transform such as
            ``MultiCrop`` that decodes large pictures at a reduced size. A JPEG whose
            data are damaged then raises in that transform instead of here.

    Attributes:
        endings: of the files that it reads.
    """

    endings = ENDINGS

    def __init__(self, lazy: bool = False) -> None:
        self.lazy = lazy

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add ``img``; raises :class:`UnreadableImageError`."""
        reader = open_image if self.lazy else read_image
        results['img'] = reader(results['path'])
        return results

    def __repr__(self) -> str:
        return f'LoadImage(lazy={self.lazy})'


def _decode_cv2(data: bytes, flags: int) -> np.ndarray | None:
    """RGB ``(H, W, 3)`` of any depth, or None where OpenCV gives up."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    if image is None or flags & _RGB:
        return image
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def _decode_pillow(data: bytes, name: str, upright: bool = True) -> np.ndarray:
    """RGB uint8 ``(H, W, 3)``; raises :class:`UnreadableImageError`."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if upright:
                ImageOps.exif_transpose(picture, in_place=True)
            if picture.mode[0] in 'IF':  # 16 or 32 bits a sample, one channel
                return _to_uint8(np.stack([picture] * 3, axis=-1), name)
            return np.array(picture.convert('RGB'))
    except Image.UnidentifiedImageError:
        why = 'its content is no picture of a known kind'
        raise UnreadableImageError(name, why) from None
    except _PILLOW_ERRORS as error:
        raise UnreadableImageError(name, str(error).split('\n')[0]) from error


def _to_uint8(image: np.ndarray, name: str) -> np.ndarray:
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.uint16:
        return cv2.convertScaleAbs(image, alpha=1 / 257)
    why = f'it has {image.dtype} samples, 8 or 16 bits unsigned are needed'
    raise UnreadableImageError(name, why)


def parse_jpeg(data: bytes, name: str) -> JpegImage | None:
    """Read a JPEG's size and orientation; None for CMYK or an odd header.

    Raises:
        UnreadableImageError: the file ends before the picture does. Decoders differ
            here: some fill up with grey.
    """
    size, channels, orientation, start = None, 0, 1, 2
    while start + 4 <= len(data) and data[start] == 0xFF:
        marker = data[start + 1]
        if marker == 0xFF:  # fill byte
            start += 1
            continue
        if marker == 0xDA:  # start of scan: the pixels follow
            break
        body = start + 4
        start += 2 + int.from_bytes(data[start + 2 : body], 'big')
        if marker in _FRAME_MARKERS and body + 6 <= len(data):
            _, *size, channels = struct.unpack_from('>BHHB', data, body)
        elif marker == 0xE1 and data.startswith(b'Exif\0\0', body):
            orientation = _exif_orientation(data[body + 6 : start])
    # Coded pixels never contain the end marker; a thumbnail in the header may.
    if data.rfind(b'\xff\xd9', start) < 0:
        raise UnreadableImageError(name, 'the file is cut off')
    if size is None or 0 in size or channels not in (1, 3):
        return None
    height, width = size if orientation < 5 else size[::-1]
    return JpegImage(data, name, height, width, orientation)


def _exif_orientation(exif: bytes) -> int:
    """Orientation, 1 to 8, from the TIFF block of an EXIF segment; 1 if absent."""
    value = _tiff_tags(exif).get(0x0112, 1)
    return value if 1 <= value <= 8 else 1


def _tiff_tags(data: bytes) -> dict[int, int]:
    """The first 16-bit value of each tag of a TIFF's (or BigTIFF's) first picture."""
    tags: dict[int, int] = {}
    order = {b'II': '<', b'MM': '>'}.get(data[:2])
    if order is None:
        return tags
    big = data.startswith(TIFF_MARKS[2:])
    first, number, entry = ('8xQ', 'Q', 'HHQH') if big else ('4xI', 'H', 'HHIH')
    step = 20 if big else 12
    try:
        (start,) = struct.unpack_from(order + first, data)
        (count,) = struct.unpack_from(order + number, data, start)
        start += struct.calcsize(order + number)
        for place in range(start, start + step * count, step):
            tag, *_, value = struct.unpack_from(order + entry, data, place)
            tags.setdefault(tag, value)
    except (struct.error, OverflowError):  # a damaged block says no more
        pass
    return tags


def _check_colours(data: bytes, name: str) -> None:
    """Refuse a TIFF of bands: OpenCV makes a grey picture of one of them."""
    tags = _tiff_tags(data)
    bands, grey = tags.get(277, 1), tags.get(262, 1) < 2
    grey_with_alpha = bands == 2 and tags.get(258) == 8
    if (grey and bands > 1 and not grey_with_alpha) or bands > 4:
        raise DenseSSLError(
            f"'{name}' has {bands} channels, which are no colours, and LoadImage makes "
            f'RGB; set pictures.channels={bands} and what else docs/channels.md names, '
            'or take the file out of the folder'
        )


def turn_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: 5 to 8 swap rows and columns, the rest are mirrors."""
    if orientation >= 5:
        image = cv2.transpose(image)
    if orientation in (2, 6):
        return cv2.flip(image, 1)
    if orientation in (4, 8):
        return cv2.flip(image, 0)
    if orientation in (3, 7):
        return cv2.flip(image, -1)
    return image
