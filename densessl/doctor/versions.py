"""Which versions were run, and which are needed: the one place for both."""

from __future__ import annotations

import re

# Each row is an environment that the tests were run in, the newest last; README.md
# shows them.
TESTED = (
    {
        'Python': '3.11.7',
        'torch': '2.14.1',
        'torchvision': '0.29.1',
        'mmengine': '0.10.7',
        'mmcv-lite': '2.1.0',
        'mmpretrain': '1.2.0',
        'timm': '1.0.31',
    },
    {
        'Python': '3.11.7',
        'torch': '2.15.0',
        'torchvision': '0.29.2',
        'mmengine': '0.10.7',
        'mmcv-lite': '2.1.0',
        'mmpretrain': '1.2.0',
        'timm': '1.0.31',
    },
)
# What setup.py asks for.
PYTHON = '>=3.10,<3.14'
NEEDED = {
    'setuptools': '>=77.0.3,<82',
    'torch': '>=2.11',
    'torchvision': '',
    'timm': '>=1.0.20',
    'numpy': '',
    'scipy': '',
    'pillow': '',
    'safetensors': '',
    'mmengine': '>=0.10.7,<1.0',
    'mmcv-lite': '>=2.0.0,<2.2.0',
    'mmpretrain': '>=1.2.0,<2.0',
}
OPTIONAL = {'mmsegmentation': '>=1.2.2,<2.0', 'mmdet': '>=3.3.0,<4.0'}
# Distributions that write into one folder: only one of them can be there. The first
# name is the one that setup.py asks for; forks are used as they are.
FAMILIES = {
    'mmengine': ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
    'mmcv': ('mmcv-lite', 'mmcv', 'mmcv-full', 'onedl-mmcv'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
}
WHY = {
    'setuptools': ' (82 has no pkg_resources, which mmengine imports)',
    'Python': ' (mmengine uses what 3.14 removed)',
    'mmcv': ' (mmsegmentation and mmdet refuse 2.2)',
}


def fits(version: str, needed: str) -> bool:
    """Whether a version lies in a range such as ``'>=2.0.0,<2.2.0'``; '' takes all."""
    for bound in filter(None, needed.split(',')):
        sign, edge = re.fullmatch(r'(>=|<)(.+)', bound).groups()
        if (_numbers(version) < _numbers(edge)) == (sign == '>='):
            return False
    return True


def tested(package: str) -> list[str]:
    """Versions of a package that were run; none of packages not in the table."""
    return list(dict.fromkeys(row[package] for row in TESTED if package in row))


def as_tested(package: str, version: str) -> bool:
    """Whether a version with the same first two numbers was run, or none was."""
    rows = tested(package)
    return not rows or any(_numbers(v)[:2] == _numbers(version)[:2] for v in rows)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r'\d+(\.\d+)*', version)
    numbers = [int(n) for n in found[0].split('.')] if found else []
    return (*numbers, 0, 0, 0, 0)[:4]
