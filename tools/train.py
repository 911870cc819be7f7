"""Pretrain a backbone: python tools/train.py CONFIG [--data DIR] [--help]."""

import os
import sys

# On CPU, threads that spin while they wait starve the workers that load data (steps
# on 2 busy cores took several times as long). Must stand before torch loads.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

from densessl.engine.launch import main

if __name__ == '__main__':
    sys.exit(main())
