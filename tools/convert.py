"""Weights out to other packages, and in.

python tools/convert.py export CHECKPOINT OUT --to mmseg
python tools/convert.py import FILE OUT --from dino
"""

import sys

from densessl.interop.convert import main

if __name__ == '__main__':
    sys.exit(main())
