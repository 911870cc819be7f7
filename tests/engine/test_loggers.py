"""Values of a run in TensorBoard, and the line on a terminal."""

import io
import json
from types import SimpleNamespace

import pytest
from mmengine.logging import HistoryBuffer

from densessl.engine import loggers
from densessl.engine.hooks import ProgressBarHook
from densessl.engine.launch import main


def test_tensorboard_has_what_the_json_lines_have(small_config, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / 'run'
    options = ['--log', 'tensorboard', '--cfg-options', 'train_cfg.max_epochs=1']
    assert main([str(small_config), '--work-dir', str(folder), *options]) == 0
    (log,) = folder.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    events = EventAccumulator(str(log.parent))
    events.Reload()
    names = set(events.Tags()['scalars'])
    assert {'loss', 'lr', 'view/kl', 'teacher_momentum'} <= names
    written = {(e.step, round(e.value, 5)) for e in events.Scalars('loss')}
    expected = {(x['step'], round(x['loss'], 5)) for x in lines if 'loss' in x}
    assert written == expected and len(expected) >= 2


def test_a_missing_package_is_one_line(small_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loggers, 'find_spec', lambda name: None)
    folder = ['--work-dir', str(tmp_path / 'run')]
    assert main([str(small_config), *folder, '--log', 'wandb']) == 2
    assert '--log wandb: the package wandb is not installed; pip install wandb' in (
        capsys.readouterr().err
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def runner():
    scalars = {}
    for name, values in (
        ('train/time', [2.0, 2.0]),
        ('train/data_time', [0.5, 0.5]),
        ('train/loss', [9.0, 7.25]),
    ):
        scalars[name] = HistoryBuffer()
        for value in values:
            scalars[name].update(value)
    hub = SimpleNamespace(log_scalars=scalars)
    return SimpleNamespace(iter=49, max_iters=200, message_hub=hub)


def test_line_on_a_terminal():
    hook = ProgressBarHook(width=8)
    hook.stream = Terminal()
    hook.after_train_iter(runner(), 0)
    hook.after_train(runner())
    drawn = hook.stream.getvalue()
    line = '[##......] 50/200  25%  0:05:00 left  data wait 25%  loss 7.2500'
    assert drawn == f'\x1b[2K{line}\r\x1b[2K'


def test_nothing_in_a_file():
    hook = ProgressBarHook()
    hook.stream = io.StringIO()
    hook.after_train_iter(runner(), 0)
    hook.after_train(runner())
    assert hook.stream.getvalue() == ''
