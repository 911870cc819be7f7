"""CamVid of the SegNet tutorial as a folder for densessl and MMSegmentation.

python examples/camvid_folder.py SOURCE OUT

SOURCE holds train/*.png, trainannot/*.png, val/*.png and valannot/*.png; OUT gets
images/{train,val}/*.jpg and annotations/{train,val}/*.png. Labels stay as they are:
0 to 10 for the classes, 11 for void.
"""

import argparse
import sys
from pathlib import Path

import cv2

from densessl.command import run_command
from densessl.errors import DenseSSLError


def main() -> int:
    """Write the folder; users' errors end in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', type=Path)
    parser.add_argument('out', type=Path)
    args = parser.parse_args()
    return run_command(convert, args.source, args.out)


def convert(source: Path, out: Path) -> None:
    """Write the folder.

    Raises:
        DenseSSLError: a split has no picture, or a picture or its mask cannot be read.
    """
    for split in ('train', 'val'):
        pictures = sorted((source / split).glob('*.png'))
        if not pictures:
            raise DenseSSLError(
                f"there is no {split}/*.png in '{source}'; name the tutorial's folder "
                'CamVid'
            )
        for kind in ('images', 'annotations'):
            (out / kind / split).mkdir(parents=True, exist_ok=True)
        for path in pictures:
            image = cv2.imread(str(path), cv2.IMREAD_COLOR)
            mask = source / f'{split}annot' / path.name
            if image is None or not mask.is_file():
                raise DenseSSLError(
                    f'{path}: it or its mask {mask} cannot be read; clone the tutorial '
                    'again'
                )
            jpeg = out / 'images' / split / f'{path.stem}.jpg'
            cv2.imwrite(str(jpeg), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
            copy = out / 'annotations' / split / path.name
            copy.write_bytes(mask.read_bytes())
        print(f"{len(pictures)} pictures of '{split}' in {out}")


if __name__ == '__main__':
    sys.exit(main())
