"""Write lists of few labelled pictures.

python tools/fewshot_lists.py segmentation DIR --out DIR [--help]
python tools/fewshot_lists.py classes DIR --out DIR [--help]
"""

import sys

from densessl.evaluation.fewshot import main

if __name__ == '__main__':
    sys.exit(main())
