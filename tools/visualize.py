"""Pictures of what a network has learned.

python tools/visualize.py matches CONFIG CHECKPOINT IMAGE... [--between] [--help]
python tools/visualize.py points CONFIG CHECKPOINT IMAGE... [--help]
python tools/visualize.py attention | pca | similarity CHECKPOINT IMAGE... [--help]
"""

import sys

from densessl.visualization.main import main

if __name__ == '__main__':
    sys.exit(main())
