"""The launcher of other packages' scripts, on a package made for it."""

import sys

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub

from densessl.interop import downstream, mmcv_ops

SCRIPT = """
import sys
from densessl.errors import DenseSSLError

print(__name__, sys.argv)
if 'stop' in sys.argv:
    raise DenseSSLError('weights differ;\\nexport them again')
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package by the name of mmdet with one script."""
    tools = tmp_path / 'mmdet/.mim/tools'
    tools.mkdir(parents=True)
    (tmp_path / 'mmdet/__init__.py').touch()
    (tools / 'train.py').write_text(SCRIPT)
    monkeypatch.delitem(sys.modules, 'mmdet', raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['downstream.py'])
    monkeypatch.setattr(mmcv_ops, 'install', lambda: True)
    return tools


def test_script_runs_with_its_own_arguments(package, capfd):
    assert downstream.main(['mmdet', 'train', 'config.py', '--amp', '-x']) == 0
    stand_in, script = capfd.readouterr().out.splitlines()
    assert stand_in.startswith('mmcv has no compiled ops')
    path = str(package / 'train.py')
    assert script == f'__main__ {[path, "config.py", "--amp", "-x"]}'


def test_compiled_ops_and_other_ranks_are_not_announced(package, capfd, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    assert downstream.main(['mmdet', 'train']) == 0
    monkeypatch.delenv('RANK')
    monkeypatch.setattr(mmcv_ops, 'install', lambda: False)
    assert downstream.main(['mmdet', 'train']) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith('__main__') for line in lines)


def failure(capfd, *arguments) -> str:
    assert downstream.main(list(arguments)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def test_an_error_of_ours_is_one_line(package, capfd):
    expected = 'error: weights differ; export them again'
    assert failure(capfd, 'mmdet', 'train', 'stop') == expected


def test_unknown_script_is_one_line(package, capfd):
    (package / 'test.py').touch()
    line = failure(capfd, 'mmdet', 'browse')
    assert "no script 'browse'" in line and 'give one of test, train' in line


def test_missing_package_is_one_line(capfd, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    line = failure(capfd, 'mmseg', 'train')
    assert line == 'error: mmseg is not installed; pip install mmsegmentation'


def test_missing_mmcv_is_one_line(package, capfd, monkeypatch):
    monkeypatch.undo()
    monkeypatch.syspath_prepend(package.parent.parent.parent)
    monkeypatch.delitem(sys.modules, 'mmdet', raising=False)
    monkeypatch.delitem(sys.modules, mmcv_ops.EXTENSION, raising=False)
    monkeypatch.setitem(sys.modules, 'mmcv', None)
    line = failure(capfd, 'mmdet', 'train')
    assert line.startswith('error: mmcv is not installed')


def test_checkpoints_of_mmengine_can_be_read(tmp_path):
    hub = MessageHub('test')
    for value in (3.0, 1.0):
        hub.update_scalar('train/loss', value)
    hub.update_info('iter', np.int64(2))
    torch.save(dict(message_hub=hub.state_dict()), tmp_path / 'iter_2.pth')
    downstream.allow_checkpoints()
    state = torch.load(tmp_path / 'iter_2.pth', weights_only=True)['message_hub']
    loss = state['log_scalars']['train/loss']
    assert loss.mean() == 2 and loss.min() == 1 and loss.current() == 1


class Evil:
    """Looks up a function that is none of a buffer's statistics."""

    def __reduce__(self):
        return getattr, (np.ndarray, 'tofile')


def test_nothing_else_can_be_looked_up(tmp_path):
    torch.save(Evil(), tmp_path / 'evil.pth')
    downstream.allow_checkpoints()
    with pytest.raises(Exception, match="refused to look up 'tofile'"):
        torch.load(tmp_path / 'evil.pth', weights_only=True)
