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


def main() -> int:
    """Write the folder; 2 if SOURCE is not one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', type=Path)
    parser.add_argument('out', type=Path)
    args = parser.parse_args()
    for split in ('train', 'val'):
        pictures = sorted((args.source / split).glob('*.png'))
        if not pictures:
            print(
                f"error: there is no {split}/*.png in '{args.source}'; "
                "name the tutorial's folder CamVid",
                file=sys.stderr,
            )
            return 2
        for kind in ('images', 'annotations'):
            (args.out / kind / split).mkdir(parents=True, exist_ok=True)
        for path in pictures:
            image = cv2.imread(str(path), cv2.IMREAD_COLOR)
            mask = args.source / f'{split}annot' / path.name
            jpeg = args.out / 'images' / split / f'{path.stem}.jpg'
            cv2.imwrite(str(jpeg), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
            (args.out / 'annotations' / split / path.name).write_bytes(
                mask.read_bytes()
            )
        print(f"{len(pictures)} pictures of '{split}' in {args.out}")
    return 0


if __name__ == '__main__':
    sys.exit(main())
