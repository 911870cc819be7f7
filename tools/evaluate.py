"""Evaluate a frozen backbone.

python tools/evaluate.py CONFIG CHECKPOINT [--data DIR] [--help]
"""

import sys

from densessl.evaluation.main import main

if __name__ == '__main__':
    sys.exit(main())
