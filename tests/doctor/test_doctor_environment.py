"""Faults of environments, each planted in a folder in the place of all packages."""

import ast
import re
import resource
from pathlib import Path

import pytest
from conftest import ROOT
from doctor_setup import assert_found, doctor, lines, off

from densessl.doctor.check import Check
from densessl.doctor.packages import OPTIONAL
from densessl.doctor.versions import FAMILIES, NEEDED, PYTHON, TESTED, fits


def plant(site: Path, packages: dict[str, str], without: tuple[str, ...] = ()) -> Path:
    """Distributions without code, and the folders of the OpenMMLab packages."""
    folders = {name: key for key, names in FAMILIES.items() for name in names}
    for name, version in packages.items():
        info = site / f'{name.replace("-", "_")}-{version}.dist-info'
        info.mkdir(parents=True)
        (info / 'METADATA').write_text(f'Name: {name}\nVersion: {version}\n')
        files = [f'{info.name}/METADATA']
        if (folder := folders.get(name)) and folder not in without:
            (site / folder).mkdir(exist_ok=True)
            (site / folder / '__init__.py').touch()
            files.append(f'{folder}/__init__.py')
        (info / 'RECORD').write_text(''.join(f'{file},,\n' for file in files))
    return site


def healthy_packages() -> dict[str, str]:
    whole = {**dict.fromkeys(NEEDED, '99.0'), **TESTED[0], 'setuptools': '81.0.0'}
    whole.pop('Python')
    return whole


ENVIRONMENT_FAULTS = {
    'setuptools without pkg_resources': (
        dict(change={'setuptools': '84.0.0'}),
        ('fail', 'setuptools', 'pkg_resources', "'setuptools>=77.0.3,<82'"),
    ),
    'a package is missing': (
        dict(change={'timm': None}),
        ('fail', 'timm', 'not installed', "pip install 'timm>=1.0.20'"),
    ),
    'torch is too old': (
        dict(change={'torch': '2.4.1+cpu'}),
        ('fail', 'torch', '2.4.1+cpu', "pip install 'torch>=2.11'"),
    ),
    'no mmcv at all': (
        dict(change={'mmcv-lite': None}),
        ('fail', 'mmcv', "pip install 'mmcv-lite>=2.0.0,<2.2.0'"),
    ),
    'mmcv is too new': (
        dict(change={'mmcv-lite': '2.2.0'}),
        ('fail', 'mmcv-lite', 'refuse 2.2', "'mmcv-lite>=2.0.0,<2.2.0'"),
    ),
    'mmcv beside mmcv-lite': (
        dict(change={'mmcv': '2.1.0'}),
        ('fail', 'mmcv', 'mmcv-lite and mmcv at once', 'pip uninstall -y mmcv-lite mm'),
    ),
    'a fork beside its original': (
        dict(change={'onedl-mmengine': '0.10.12'}),
        ('fail', 'mmengine', 'at once', 'pip uninstall -y mmengine onedl-mmengine'),
    ),
    'a fork among stock packages': (
        dict(change={'mmcv-lite': None, 'onedl-mmcv': '2.3.6'}),
        ('warn', 'forks', 'onedl-mmcv beside', 'either the forks or the stock'),
    ),
    'a folder that no package owns': (
        dict(orphan='mmdet'),
        ('fail', 'mmdet', 'no package owns it', 'delete the folder'),
    ),
    'compiled ops of another mmcv': (
        dict(file='mmcv/_ext.cpython-311-x86_64-linux-gnu.so'),
        ('fail', 'mmcv', '_ext', 'left behind', 'delete the folder'),
    ),
    'a package without its files': (
        dict(without=('mmpretrain',)),
        ('fail', 'mmpretrain', 'has lost its files', 'pip install mmpretrain'),
    ),
}


@pytest.fixture(scope='module')
def healthy_site(tmp_path_factory):
    return plant(tmp_path_factory.mktemp('site'), healthy_packages())


def test_healthy_environment_but_for_the_imports(healthy_site):
    found = off(doctor(site=healthy_site).stdout)
    assert [line.text.split(':')[0] for line in found] == [
        'import numpy ModuleNotFoundError'  # planted packages hold no code
    ]


@pytest.mark.parametrize('fault', ENVIRONMENT_FAULTS)
def test_fault_of_the_environment(fault, tmp_path):
    how, wanted = ENVIRONMENT_FAULTS[fault]
    packages = {**healthy_packages(), **how.get('change', {})}
    packages = {name: version for name, version in packages.items() if version}
    plant(tmp_path, packages, how.get('without', ()))
    if 'orphan' in how:
        (tmp_path / how['orphan']).mkdir()
        (tmp_path / how['orphan'] / '_ext.so').touch()
    if 'file' in how:
        (tmp_path / how['file']).touch()
    ran = doctor(site=tmp_path)
    assert_found(ran.stdout, *wanted)
    assert len(off(ran.stdout)) == 2  # and numpy, see above
    assert ran.returncode == 1


def test_version_that_was_not_run(tmp_path):
    plant(tmp_path, {**healthy_packages(), 'torch': '2.16.1'})
    out = doctor(site=tmp_path).stdout
    wanted = (
        'warn  torch 2.16.1 (tested: 2.14.1, 2.15.0): if something fails, try 2.15.0'
    )
    assert wanted in out


def test_import_that_fails_is_one_line(tmp_path):
    plant(tmp_path, healthy_packages())
    (tmp_path / 'numpy.py').write_text(
        "raise OSError('libx.so.3: no such file\\nmore')"
    )
    ran = doctor(site=tmp_path)
    wanted = 'OSError: libx.so.3: no such file', '--force-reinstall --no-deps numpy'
    assert_found(ran.stdout, 'fail', 'import', *wanted)
    assert ran.returncode == 1 and not ran.stderr
    assert 'shared memory' in ran.stdout  # the rest goes on


def test_transformers_that_densessl_works_around(tmp_path):
    plant(tmp_path, {**healthy_packages(), 'transformers': '5.23.0'})
    folder = tmp_path / 'transformers'
    folder.mkdir()
    (folder / '__init__.py').touch()
    (folder / 'modeling_utils.py').write_text('def other(): ...')
    (line,) = [x for x in lines(doctor(site=tmp_path).stdout) if 'transf' in x.text]
    assert line.level == 'ok' and 'densessl leaves these out' in line.text
    (folder / 'modeling_utils.py').write_text('def apply_chunking_to_forward(): ...')
    (line,) = [x for x in lines(doctor(site=tmp_path).stdout) if 'transf' in x.text]
    assert line.text == 'transformers 5.23.0'


def test_limit_of_open_files(healthy_site):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    out = doctor(site=healthy_site, preexec_fn=limit).stdout
    assert_found(out, 'fail', 'open files', '64 allowed', 'ulimit -Hn')


def test_check_has_a_remedy_or_is_ok():
    for level, remedy in (('ok', 'do'), ('warn', ''), ('fail', '')):
        with pytest.raises(ValueError, match='remedy'):
            Check(level, 'a', 'b', remedy)


def test_versions_are_those_of_setup_py():
    tree = ast.parse((ROOT / 'setup.py').read_text())
    text = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert PYTHON in text
    for package, bounds in NEEDED.items():
        assert package + bounds in text
    asked = [
        s for s in text if isinstance(s, str) and re.fullmatch(r'[\w-]+[<>]=.+', s)
    ]
    known = NEEDED | OPTIONAL
    for requirement in asked:
        package, bounds = re.fullmatch(r'([\w-]+)(.+)', requirement).groups()
        assert package == 'ruff' or known[package] == bounds
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict) and isinstance(node.values[0], ast.Set):
            families = [{e.value for e in value.elts} for value in node.values]
            assert families == [
                set(FAMILIES[k]) for k in ('mmengine', 'mmcv', 'mmpretrain')
            ]
            break
    else:
        raise AssertionError('setup.py names no families')


def test_versions_are_those_of_the_readme():
    section = (ROOT / 'README.md').read_text().split('## What was run\n')[1]
    head, _, *rows = (x for x in section.split('\n## ')[0].splitlines() if x[:1] == '|')
    names, *table = [
        [c.strip() for c in r.strip('|').split('|')] for r in (head, *rows)
    ]
    for row, tested in zip(table, TESTED, strict=True):
        shown = dict(zip(names, row, strict=True))
        shown.pop('on')
        package, shown[package] = shown.pop('mmcv').split()
        assert shown == tested


@pytest.mark.parametrize(
    ('version', 'needed', 'result'),
    [
        ('82.0.0', '>=77.0.3,<82', False),
        ('81.9', '>=77.0.3,<82', True),
        ('77.0.3', '>=77.0.3,<82', True),
        ('77.0.2', '>=77.0.3', False),
        ('2.9.1+cu128', '>=2.11', False),
        ('2.11.0', '>=2.11', True),
        ('2.11', '>=2.11.0', True),
        ('1', '', True),
    ],
)
def test_version_ranges(version, needed, result):
    assert fits(version, needed) is result
