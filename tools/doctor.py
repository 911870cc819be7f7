"""Look at everything before a run: python tools/doctor.py [CONFIG] [--data DIR]."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # as in tools/train.py

# By its place: `import densessl` needs packages that may be what is broken.
FOLDER = Path(__file__).resolve().parents[1] / 'densessl/doctor'
spec = importlib.util.spec_from_file_location(
    'densessl_doctor', FOLDER / '__init__.py', submodule_search_locations=[str(FOLDER)]
)
sys.modules[spec.name] = importlib.util.module_from_spec(spec)

from densessl_doctor.main import main

if __name__ == '__main__':
    sys.exit(main())
