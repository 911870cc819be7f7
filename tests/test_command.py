"""How command lines end."""

from importlib import import_module

import pytest
import torch
from torch import distributed

from densessl.command import run_command
from densessl.errors import DenseSSLError

WRONG = {  # by module, what its command line has to refuse
    'densessl.benchmark.main': ['data', 'no.py'],
    'densessl.datasets.demo_coco': ['--train', '0'],
    'densessl.engine.launch': ['no.py'],
    'densessl.evaluation.fewshot': ['classes', 'no', '--out', 'lists'],
    'densessl.evaluation.main': ['no.py', 'no.pth'],
    'densessl.interop.convert': ['import', 'no.pth', 'x.safetensors', '--from', 'dino'],
    'densessl.interop.downstream': ['mmseg', 'no'],
    'densessl.visualization.main': ['curves', 'no'],
    'densessl.visualization.report_page': ['no'],
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('DENSESSL_TRACEBACK', raising=False)


def stop(*words):
    raise DenseSSLError(' '.join(words))


def test_success_is_0(capsys):
    done = []
    assert run_command(done.append, 'this') == 0
    assert done == ['this'] and capsys.readouterr() == ('', '')


def test_an_error_is_one_line_and_2(capsys):
    assert run_command(stop, 'a.jpg: torn;\n', '  get it again') == 2
    assert capsys.readouterr() == ('', 'error: a.jpg: torn; get it again\n')


def test_the_variable_asks_for_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv('DENSESSL_TRACEBACK', '1')
    with pytest.raises(DenseSSLError, match='torn') as found:
        run_command(stop, 'torn')
    assert found.traceback[-1].name == 'stop' and capsys.readouterr() == ('', '')


def test_errors_of_ours_are_not_hidden(capsys):
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('command', [distributed.get_world_size, stop])
def test_the_process_group_is_left(tmp_path, command):
    distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        run_command(command)
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@pytest.mark.parametrize('module', WRONG)
def test_every_command_line_ends_so(module, capsys, monkeypatch):
    main = import_module(module).main
    assert main(WRONG[module]) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: ') and said.count('\n') == 1
    monkeypatch.setenv('DENSESSL_TRACEBACK', '1')
    with pytest.raises(DenseSSLError):
        main(WRONG[module])
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize(
    ('module', 'name', 'error', 'code', 'line'),
    [
        ('engine.launch', 'train', KeyboardInterrupt, 130, 'stopped; go on with'),
        ('evaluation.main', 'evaluate', KeyboardInterrupt, 130, ''),
        (
            'evaluation.main',
            'evaluate',
            torch.OutOfMemoryError,
            2,
            'error: the GPU is full; lower --batch-size 64',
        ),
    ],
)
def test_interrupts_and_full_gpus(capsys, monkeypatch, module, name, error, code, line):
    module = import_module(f'densessl.{module}')

    def fail(args):
        raise error

    monkeypatch.setattr(module, name, fail)
    assert module.main(['config.py', 'no.pth'][: 1 + (name == 'evaluate')]) == code
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count('\n') == bool(line)
