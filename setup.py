"""Installation of densessl; what else is installed decides what is asked for.

mmcv and mmcv-lite, and the forks of the OpenMMLab packages, are distributions that
write into the same folders. One that is there already is used and never replaced. Set
``DENSESSL_BARE=1`` to leave out all OpenMMLab requirements, for builds of wheels and
for installers that build elsewhere (uv).
"""

import os
import re
import site
import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r"__version__ = '(.+)'", (HERE / 'densessl/__init__.py').read_text()
).group(1)


def installed() -> set[str]:
    """Names of the distributions beside which this package will be installed."""
    paths = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}
    paths.update(site.getsitepackages())  # not those of pip's isolated build
    return {
        (dist.metadata['Name'] or '').lower().replace('_', '-')
        for dist in metadata.distributions(path=sorted(paths))
    }


def requirements() -> list[str]:
    """What pip is asked for."""
    needed = [
        'setuptools>=77.0.3,<82',  # mmengine imports pkg_resources, gone in 82
        'torch>=2.11',
        'torchvision',
        'timm>=1.0.20',
        'numpy',
        'scipy',
        'pillow',
        'safetensors',
    ]
    if os.environ.get('DENSESSL_BARE'):
        return needed
    have = installed()
    families = {  # asked for unless one of the family is there
        'mmengine>=0.10.7,<1.0': {'mmengine', 'mmengine-lite', 'onedl-mmengine'},
        'mmcv-lite>=2.0.0,<2.2.0': {'mmcv', 'mmcv-full', 'mmcv-lite', 'onedl-mmcv'},
        'mmpretrain>=1.2.0,<2.0': {'mmpretrain', 'onedl-mmpretrain'},
    }
    return needed + [need for need, family in families.items() if not have & family]


setup(
    name='densessl',
    version=VERSION,
    description='Dense self-supervised pretraining of vision backbones',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['densessl', 'densessl.*']),
    python_requires='>=3.10,<3.14',
    install_requires=requirements(),
    extras_require={
        'tests': [
            'pytest',
            'hypothesis',
            'codespell',
            'ruff>=0.15',
            'scikit-learn',
            'tifffile',
            'imagecodecs',
            'tensorboard',
        ],
        'tiff': ['tifffile', 'imagecodecs'],
        'tensorboard': ['tensorboard'],
        'docs': ['sphinx', 'myst-parser', 'furo'],
        'mmseg': ['mmsegmentation>=1.2.2,<2.0', 'ftfy', 'regex'],
        'mmdet': ['mmdet>=3.3.0,<4.0'],
        'hf': ['transformers'],
        'interop': ['msgpack'],
    },
)
