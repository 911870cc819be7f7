"""Importing, registering and installing."""

import runpy
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import setuptools
from conftest import ROOT
from mmengine import registry as root
from mmpretrain.models import SwinTransformer

from densessl.models.backbones import VisionTransformer
from densessl.registry import MODELS

IMPORT = """
import os, random, time, warnings
import cv2, mmcv, mmengine, mmpretrain, numpy as np, safetensors, timm, torch
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    from mmpretrain.utils import dependency
    dependency.WITH_MULTIMODAL = False  # fails beside a new transformers
    import mmpretrain.models

def state():
    generators = random.getstate(), np.random.get_state()[1].tobytes()
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch_state = torch.get_rng_state().numpy().tobytes(), torch.get_default_dtype()
    allowed = len(torch.serialization.get_safe_globals())
    return generators, threads, torch_state, dict(os.environ), os.getcwd(), allowed

before = state()
start = time.perf_counter()
import densessl
print(time.perf_counter() - start)
assert state() == before
"""


def test_import_is_quick_and_has_no_side_effects():
    result = subprocess.run(
        [sys.executable, '-c', IMPORT],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout) < 3, 'seconds beside the dependencies'


def test_import_prints_nothing():
    result = subprocess.run(
        [sys.executable, '-c', 'import densessl'],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')


def test_names_resolve_across_packages():
    assert MODELS.get('VisionTransformer') is VisionTransformer
    assert MODELS.get('mmpretrain.SwinTransformer') is SwinTransformer
    # from MMEngine's root, and so from MMSegmentation's and MMDetection's scopes
    assert root.MODELS.get('densessl.VisionTransformer') is VisionTransformer
    for registry, name in (
        (root.HOOKS, 'HealthHook'),
        (root.DATASETS, 'UnlabelledImages'),
        (root.TRANSFORMS, 'MultiCrop'),
        (root.FUNCTIONS, 'collate_views'),
        (root.LOOPS, 'TrainLoop'),
    ):
        assert registry.get(f'densessl.{name}').__name__ == name


@pytest.mark.parametrize(
    ('installed', 'asked', 'not_asked'),
    [
        ([], ['mmcv-lite', 'mmengine', 'mmpretrain'], []),
        (['mmcv'], ['mmengine', 'mmpretrain'], ['mmcv-lite']),
        (['onedl_mmcv', 'onedl-mmengine'], ['mmpretrain'], ['mmcv-lite', 'mmengine']),
    ],
)
def test_installed_packages_are_never_replaced(
    monkeypatch, installed, asked, not_asked
):
    found = [SimpleNamespace(metadata={'Name': name}) for name in installed]
    monkeypatch.setattr(metadata, 'distributions', lambda path: found)
    calls = {}
    monkeypatch.setattr(setuptools, 'setup', lambda **options: calls.update(options))
    monkeypatch.delenv('DENSESSL_BARE', raising=False)
    runpy.run_path(str(ROOT / 'setup.py'), run_name='__main__')
    names = {need.split('>')[0].split('<')[0] for need in calls['install_requires']}
    assert names >= {'torch', 'timm', 'setuptools', *asked}
    assert not names & set(not_asked)
    monkeypatch.setenv('DENSESSL_BARE', '1')
    runpy.run_path(str(ROOT / 'setup.py'), run_name='__main__')
    assert not any(
        'mm' in need for need in calls['install_requires'] if 'timm' not in need
    )
