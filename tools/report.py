"""Compare runs on one HTML page that needs no network.

python tools/report.py WORK_DIR... [--out HTML]
"""

import sys

from densessl.visualization.report_page import main

if __name__ == '__main__':
    sys.exit(main())
