"""Fine-tune in MMSegmentation, MMDetection or MMPretrain, by their own scripts.

python tools/downstream.py mmdet train CONFIG [arguments of the script]
python tools/downstream.py mmseg test CONFIG CHECKPOINT [arguments of the script]
"""

import os
import sys

# As in train.py: threads that spin while they wait starve the loading of data.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

from densessl.interop.downstream import main

if __name__ == '__main__':
    sys.exit(main())
