"""Measure a training step or the input pipeline of a config.

python tools/benchmark.py step CONFIG --batch-size N [--reference] [--low-memory]
python tools/benchmark.py growth CONFIG
python tools/benchmark.py data CONFIG [--data DIR] [--reference | --workers 1 2]
"""

import sys

from densessl.benchmark.main import main

if __name__ == '__main__':
    sys.exit(main())
