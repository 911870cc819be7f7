"""Measure a training step or the input pipeline of a config.

python tools/benchmark.py step CONFIG --batch-size N [--reference]
python tools/benchmark.py data CONFIG [--data DIR] [--reference]
"""

import sys

from densessl.benchmark.main import main

if __name__ == '__main__':
    sys.exit(main())
