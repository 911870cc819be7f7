"""Write demo scenes as a COCO data set: python tools/demo_coco.py [--help]."""

import sys

from densessl.datasets.demo_coco import main

if __name__ == '__main__':
    sys.exit(main())
