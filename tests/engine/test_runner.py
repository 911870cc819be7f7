"""Runs of one process."""

import json

from densessl.engine.launch import main


def test_runs_begun_in_the_same_second_keep_their_logs_apart(
    monkeypatch, small_config, tmp_path
):
    monkeypatch.setattr('mmengine.runner.runner.time.strftime', lambda *_: '20260101')
    one_epoch = ['--cfg-options', 'train_cfg.max_epochs=1']
    for name in ('first', 'second'):
        folder = tmp_path / name
        assert main([str(small_config), '--work-dir', str(folder), *one_epoch]) == 0
        (log,) = folder.glob('*/vis_data/scalars.json')
        steps = [json.loads(line)['step'] for line in log.read_text().splitlines()]
        assert max(steps) == 4 and (folder / 'curve.png').is_file()


def test_hooks_that_are_none_are_left_out(small_config, tmp_path):
    options = ['train_cfg.max_epochs=1', 'default_hooks.report=None']
    words = [str(small_config), '--work-dir', str(tmp_path), '--cfg-options', *options]
    assert main(words) == 0
    assert not (tmp_path / 'curve.png').exists() and [*tmp_path.glob('step_*.pth')]
