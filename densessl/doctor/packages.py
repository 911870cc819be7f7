"""What is installed: versions, packages that write into one folder, imports."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from .check import Check
from .versions import (
    FAMILIES,
    NEEDED,
    OPTIONAL,
    PYTHON,
    WHY,
    as_tested,
    fits,
    tested,
)

# Imported one after the other; the name to install where it is not the import's.
IMPORTS = {
    'numpy': 'numpy',
    'scipy': 'scipy',
    'PIL': 'pillow',
    'cv2': 'opencv-python',
    'safetensors': 'safetensors',
    'torch': 'torch',
    'torchvision': 'torchvision',
    'timm': 'timm',
    'mmengine': 'mmengine',
    'mmcv': 'mmcv-lite',
    'mmpretrain': 'mmpretrain',
}
_MMPRETRAIN_WANTS = 'apply_chunking_to_forward'  # of transformers.modeling_utils


def installed() -> dict[str, metadata.Distribution]:
    """Distributions on the path, by name in lower case with dashes."""
    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata['Name'] or '').lower().replace('_', '-')
        found.setdefault(name, distribution)
    return found


def check_versions() -> Iterator[Check]:
    """Python and the packages against what is needed and what was run."""
    yield _version('Python', platform.python_version(), PYTHON, 'another Python')
    have = installed()
    families = {
        name: (key, members)
        for key, members in FAMILIES.items()
        for name in members[:1]
    }
    for package, needed in (NEEDED | OPTIONAL).items():
        key, members = families.get(package, (package, (package,)))
        there = [name for name in members if name in have]
        if len(there) > 1 or (not there and package in OPTIONAL):
            continue  # the former is for check_families to say
        if not there:
            yield Check('fail', key, 'is not installed', _pip(package, needed))
            continue
        (name,) = there
        version = have[name].version
        if name.startswith('onedl-'):
            yield Check('ok', name, f'{version} (a fork, used as it is)')
            continue
        yield _version(name, version, needed, _pip(name, needed), key)


def _version(
    name: str, version: str | None, needed: str, remedy: str, key: str = ''
) -> Check:
    why = WHY.get(key or name, '')
    if version is None:
        return Check('fail', name, 'has no version: a broken install', remedy)
    if not fits(version, needed):
        if name == 'Python':
            remedy = f'make an environment of Python {needed}'
        return Check('fail', name, f'{version}, needed {needed}{why}', remedy)
    rows = tested(name)
    about = f'{version} (tested: {", ".join(rows)})' if rows else version
    if as_tested(name, version):
        return Check('ok', name, about)
    return Check(
        'warn', name, about, f'if something fails, try {rows[-1]}, which was run'
    )


def check_families() -> Iterator[Check]:
    """Packages that overwrite each other's files, and what that leaves behind."""
    have = installed()
    sound = True
    for folder, members in FAMILIES.items():
        there = [name for name in members if name in have]
        if len(there) > 1:
            sound = False
            yield Check(
                'fail',
                folder,
                f'is written by {" and ".join(there)} at once',
                f'pip uninstall -y {" ".join(there)}, then pip install one of them',
            )
        elif lost := _lost_files(folder, have[there[0]] if there else None):
            sound = False
            again = there[0] if there else members[0]
            yield Check(
                'fail',
                folder,
                lost,
                f'pip uninstall -y {again}, delete the folder, then pip install '
                f'{again}',
            )
    there = [name for names in FAMILIES.values() for name in names if name in have]
    forks = [name for name in there if name.startswith('onedl-')]
    stock = [name for name in there if name not in forks]
    if sound and forks and stock:
        yield Check(
            'warn',
            'forks',
            f'{", ".join(forks)} beside {", ".join(stock)}, which was not tested',
            'install either the forks or the stock packages throughout',
        )
    elif sound:
        yield Check('ok', 'OpenMMLab packages', 'none overwrites another')


def _lost_files(folder: str, owner: metadata.Distribution | None) -> str:
    """What is wrong with a package's folder, by its list of files; '' for nothing."""
    spec = importlib.util.find_spec(folder)
    places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    places = [place for place in places if place.is_dir()]
    if owner is None:
        return f'lies in {places[0]} and no package owns it' if places else ''
    if spec is None or spec.origin is None:
        return f'has lost its files, as {owner.metadata["Name"]} lists them'
    listed = {str(owner.locate_file(file)) for file in owner.files or ()}
    if str(places[0] / '__init__.py') not in listed:
        return ''  # an editable install lists other files
    strays = [p for p in places[0].glob('_ext*.so') if str(p) not in listed]
    return f'has {strays[0]}, which another package left behind' if strays else ''


def check_transformers() -> Iterator[Check]:
    """Whether transformers is too new for MMPretrain, which densessl works around."""
    have = installed()
    spec = importlib.util.find_spec('transformers') if 'transformers' in have else None
    if spec is None or spec.origin is None:
        return
    version = have['transformers'].version
    source = Path(spec.origin).with_name('modeling_utils.py')
    if source.exists() and _MMPRETRAIN_WANTS in source.read_text():
        yield Check('ok', 'transformers', version)
    else:
        yield Check(
            'ok',
            'transformers',
            f"{version}, too new for MMPretrain's multimodal models; densessl leaves "
            'these out (import densessl before mmpretrain.models in code of your own)',
        )


def check_imports() -> Iterator[Check]:
    """Each package can be imported, and densessl last."""
    done = []
    for module, package in {**IMPORTS, 'densessl': ''}.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken package raises
            why = str(error).strip().split('\n')[0]
            remedy = f'pip install --force-reinstall --no-deps {package}'
            if 'libGL' in why:
                remedy = (
                    'install libGL (libgl1), or opencv-python-headless in its place'
                )
            elif not package:
                remedy = 'mend the packages above; then pip install -e .'
            yield Check(
                'fail', f'import {module}', f'{type(error).__name__}: {why}', remedy
            )
            return  # the rest would fail for the same reason
        done.append(module)
    yield Check('ok', 'imports', ', '.join(done))


def _pip(package: str, needed: str) -> str:
    return f"pip install '{package}{needed}'"
