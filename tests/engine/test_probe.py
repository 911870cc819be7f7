"""Scores in the training: right, bounded in time, and without a trace in the run."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, build_model
from mmengine.config import Config

from densessl.datasets import DemoScenes
from densessl.engine.hooks import ProbeHook
from densessl.engine.hooks.report import spread
from densessl.engine.launch import main
from densessl.errors import DenseSSLError
from densessl.evaluation import FeatureExtractor, linear_segmentation
from densessl.interop import load_backbone

SMALL = dict(size=32, train_pictures=12, val_pictures=8, interval=1, max_share=1e9, k=3)


@pytest.fixture(autouse=True)
def no_logging_errors(monkeypatch):
    # Loggers of earlier runs in this process still hold pytest's closed streams.
    monkeypatch.setattr('logging.raiseExceptions', False)


@pytest.fixture(scope='module')
def labelled(tmp_path_factory):
    """A folder of masks and one of classes that colour tells apart."""
    home = tmp_path_factory.mktemp('labelled')
    rng = np.random.default_rng(0)
    for split, count in (('train', 9), ('val', 5)):
        for kind in ('images', 'annotations'):
            (home / 'masks' / kind / split).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(0, 50, (32, 48, 3), np.uint8)
            label = np.zeros((32, 48), np.uint8)
            image[:, 24:] += 200
            label[:, 24:], label[:8] = 3, 11
            for kind, ending, data in (
                ('images', 'png', image),
                ('annotations', 'png', label),
            ):
                cv2.imwrite(str(home / f'masks/{kind}/{split}/{i}.{ending}'), data)
            for name, part in (('dark', image[:, :24]), ('light', image[:, 24:])):
                folder = home / 'classes' / split / name
                folder.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(folder / f'{i}.png'), part)
    return home


def run(config, work_dir, *options, **probe) -> Path:
    given = [f'default_hooks.probe.{key}={value}' for key, value in probe.items()]
    given.append('train_dataloader.num_workers=0')
    command = [str(config), '--work-dir', str(work_dir), *options]
    command += ['--cfg-options', *given]
    assert main(command) == 0
    return work_dir


def logged(work_dir) -> dict[int, dict]:
    """What the probes wrote to scalars.json, by step."""
    entries = {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if any(name.startswith('probe/') for name in entry):
                entries[entry['step']] = entry
    return entries


def final(work_dir):
    return torch.load(work_dir / 'step_00000012.pth', weights_only=True)


def assert_equal_states(one, other):
    for part in ('state_dict', 'optim_wrapper'):
        assert_equal(one[part], other[part])


def assert_equal(one, other):
    if torch.is_tensor(one):
        assert one.equal(other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


@pytest.fixture(scope='module')
def runs(tmp_path_factory, labelled):
    """A run without and one with probes, of the same config; 3 epochs x 4 steps."""
    from conftest import small_config

    folder = tmp_path_factory.mktemp('runs')
    config = small_config.__wrapped__(folder)
    plain = run(config, folder / 'plain')
    knn = labelled / 'classes'
    probed = run(config, folder / 'probed', segmentation='demo', knn=knn, **SMALL)
    return config, plain, probed


def test_training_is_bit_equal_with_probes(runs):
    _, plain, probed = runs
    assert_equal_states(final(plain), final(probed))
    assert not logged(plain) and not list(plain.glob('best_dense*'))


def test_scores_stand_in_the_log_and_the_best_is_kept(runs):
    _, _, work_dir = runs
    entries = logged(work_dir)
    assert list(entries) == [4, 8, 12]
    for step, entry in entries.items():
        weights = torch.load(work_dir / f'step_{step:08d}.pth', weights_only=True)
        backbone = load_backbone(work_dir / 'backbone.safetensors')
        prefix = 'teacher.backbone.'
        state = weights['state_dict']
        backbone.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if prefix in k}
        )
        extractor = FeatureExtractor(backbone, backbone.mean, backbone.std)
        parts = [DemoScenes(size=32, seed=seed) for seed in (1_000_003, 1_000_004)]
        train, val = (
            [(s.image, s.labels) for s in map(part.scene, range(count))]
            for part, count in zip(parts, (12, 8), strict=True)
        )
        options = dict(epochs=30, batch_size=20, lr=1.0, train_mask_size=32)
        expected = linear_segmentation(extractor, train, val, 12, **options)
        assert entry['probe/miou'] == pytest.approx(expected.miou, abs=1e-6)
        assert 0 <= entry['probe/knn'] <= 1
        assert entry['probe/seconds'] > 0 and entry['probe/time_share'] > 0
    best = max(entries, key=lambda step: entries[step]['probe/miou'])  # the first one
    about = json.loads((work_dir / 'best_dense.json').read_text())
    assert about['metric'] == 'probe/miou' and about['steps'] == best
    assert about['score'] == entries[best]['probe/miou'] == about['scores']['miou']
    kept = load_backbone(work_dir / 'best_dense.safetensors').state_dict()
    state = torch.load(work_dir / f'step_{best:08d}.pth', weights_only=True)
    for key, value in kept.items():
        assert value.equal(state['state_dict'][f'teacher.backbone.{key}'])


def test_resumed_run_equals_an_uninterrupted_one(runs, tmp_path, labelled):
    config, _, probed = runs
    knn, work_dir = labelled / 'classes', tmp_path / 'run'
    shutil.copytree(probed, work_dir)
    for step in (8, 12):
        (work_dir / f'step_{step:08d}.pth').unlink()
    best = json.loads((work_dir / 'best_dense.json').read_text())
    run(config, work_dir, '--resume', segmentation='demo', knn=knn, **SMALL)
    assert_equal_states(final(work_dir), final(probed))
    assert json.loads((work_dir / 'best_dense.json').read_text()) == best
    again = sorted(work_dir.glob('*/vis_data/scalars.json'))[-1].parent.parent
    assert 'probe after epoch 2' in next(again.glob('*.log')).read_text()


# The data and the scores


def hook_of(work_dir, **options):
    """A hook that has read its data, its runner, and the runner's messages."""
    messages = []
    model = build_model()
    runner = SimpleNamespace(
        model=model,
        work_dir=str(work_dir),
        iter=0,
        epoch=0,
        max_epochs=1000,
        cfg=Config(dict(model=dict(backbone=dict(type='VisionTransformer')))),
        logger=SimpleNamespace(
            info=lambda words: messages.append((logging.INFO, words)),
            warning=lambda words: messages.append((logging.WARNING, words)),
        ),
        visualizer=SimpleNamespace(add_scalars=lambda values, step: None),
    )
    hook = ProbeHook(**options)
    hook.before_train(runner)
    return hook, runner, messages


def test_folders_are_read_and_told_apart(tmp_path, labelled):
    hook, runner, _ = hook_of(
        tmp_path,
        segmentation=str(labelled / 'masks'),
        knn=str(labelled / 'classes'),
        ignore=[11],
        **SMALL | dict(train_pictures=6, val_pictures=4),
    )
    train, val, classes = hook.data['miou']
    assert (len(train), len(val), classes) == (6, 4, 4)
    image, label = train[0]
    assert image.shape == (32, 32, 3) and set(np.unique(label)) == {0, 3, 255}
    train, val, classes = hook.data['knn']
    assert (len(train), len(val), classes) == (6, 4, 2)
    assert [int(y) for _, y in train] == [0, 0, 0, 1, 1, 1]
    extractor = FeatureExtractor(
        runner.model.teacher.backbone, **runner.model.data_preprocessor.normalization
    )
    scores = hook._score(extractor)
    assert list(scores) == ['miou', 'knn']
    assert scores['knn'] == 1.0 and scores['miou'] > 0.9  # bright and dark
    state = torch.get_rng_state()
    hook._score(extractor, trial=True)
    assert torch.get_rng_state().equal(state)


def test_spread():
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(101, 3) == [0, 50, 100]
    assert spread(3, 1) == [0]


def test_a_worse_score_does_not_replace_the_best_and_resume_knows_it(tmp_path):
    options = dict(segmentation='demo') | SMALL
    hook, runner, _ = hook_of(tmp_path, **options)
    for step, score in ((4, 0.3), (8, 0.2), (12, 0.3), (16, 0.5)):
        runner.iter = step
        hook._keep(runner, runner.model, dict(miou=score, knn=1.0))
        about = json.loads((tmp_path / 'best_dense.json').read_text())
        assert about['steps'] == (16 if step == 16 else 4)
    anew, _, _ = hook_of(tmp_path, **options)  # another run in this folder
    assert anew.best == -float('inf')
    resumed = ProbeHook(**options)
    resumed.before_train(runner)
    assert resumed.best == 0.5
    other = ProbeHook(**options | dict(k=4))  # other scores do not compare
    other.before_train(runner)
    assert other.best == -float('inf')


# The time


@pytest.mark.parametrize(
    ('epoch_seconds', 'probe_seconds', 'epochs', 'expected'),
    [
        (100.0, 4.0, 20, [5, 10, 15, 20]),  # within 5 % as it is
        (10.0, 4.0, 60, None),  # every 8 epochs at most
        (1.0, 100.0, 50, []),  # never
    ],
)
def test_probes_keep_to_their_share(
    tmp_path, monkeypatch, epoch_seconds, probe_seconds, epochs, expected
):
    now, probed = [0.0], []
    monkeypatch.setattr(ProbeHook, '_clock', lambda self: now[0])

    def score(self, extractor, trial=False):
        now[0] += probe_seconds / 10 if trial else probe_seconds
        if not trial:
            probed.append(runner.epoch + 1)
        return dict(miou=0.5)

    monkeypatch.setattr(ProbeHook, '_score', score)
    options = SMALL | dict(interval=5, max_share=0.05)
    hook, runner, messages = hook_of(tmp_path, segmentation='demo', **options)
    runner.max_epochs = epochs
    for epoch in range(epochs):
        runner.epoch, runner.iter = epoch, 4 * (epoch + 1)
        hook.before_train_epoch(runner)
        now[0] += epoch_seconds
        hook.after_train_epoch(runner)
        if probed:
            assert hook.spent <= 0.05 * hook.trained
    assert hook.trained == pytest.approx(epochs * epoch_seconds)
    assert now[0] == pytest.approx(hook.trained + hook.spent)
    warnings = [words for level, words in messages if level == logging.WARNING]
    if expected is not None:
        assert probed == expected
    else:
        assert len(probed) in (6, 7) and probed[0] == 9  # 4.4 s are 5 % of 88 s
        assert min(np.diff(probed)) >= 8 - 1 and hook.interval == 8
    if epoch_seconds == 100:
        assert not warnings
    else:
        about_last = [words for words in warnings if f'after epoch {epochs}:' in words]
        assert len(warnings) - len(about_last) == 1  # said once
        assert '5%' in warnings[0] and 'train_pictures' in warnings[0]


def test_without_data_nothing_happens(tmp_path):
    hook, runner, messages = hook_of(tmp_path)
    hook.before_train_epoch(runner)
    hook.after_train_epoch(runner)
    assert not hook.wanted and not messages and not list(tmp_path.iterdir())


# The guard


def guarded(work_dir, monkeypatch, scores, **options):
    """A hook whose start, and then each epoch, has a planted score."""
    planted = iter(scores)
    monkeypatch.setattr(
        ProbeHook, '_score', lambda *_, **__: dict(miou=next(planted), knn=0.1)
    )
    options = dict(segmentation='demo', guard='warn', **SMALL) | options
    hook, runner, messages = hook_of(work_dir, **options)
    for epoch in range(len(scores) - 1):
        runner.epoch, runner.iter = epoch, 4 * (epoch + 1)
        hook.before_train_epoch(runner)
        hook.after_train_epoch(runner)
    return [words for level, words in messages if level == logging.WARNING]


def test_a_fall_is_warned_of_once_and_the_start_is_kept(tmp_path, monkeypatch):
    scores = [0.5, 0.495, 0.45, 0.3, 0.51, 0.4]
    (warning,) = guarded(tmp_path, monkeypatch, scores[:4])
    assert '45.0% from 50.0%' in warning and 'margin of 1.0%' in warning
    for remedy in ('lr', 'layer_decay', 'freeze_backbone_epochs', 'best_dense'):
        assert remedy in warning
    about = json.loads((tmp_path / 'best_dense.json').read_text())
    assert (about['steps'], about['score'], about['start']) == (0, 0.5, 0.5)
    assert len(guarded(tmp_path, monkeypatch, scores)) == 1
    about = json.loads((tmp_path / 'best_dense.json').read_text())
    assert (about['steps'], about['score'], about['start']) == (16, 0.51, 0.5)


@pytest.mark.parametrize(
    ('scores', 'margin'), [([0.5, 0.6, 0.5], 0.0), ([0.5, 0.42, 0.41], 0.1)]
)
def test_no_fall_no_words(tmp_path, monkeypatch, scores, margin):
    assert not guarded(tmp_path, monkeypatch, scores, margin=margin, guard='stop')


def test_a_fall_stops_the_run_where_that_is_asked_for(tmp_path, monkeypatch):
    with pytest.raises(DenseSSLError, match=r'fell to 48\.0% from 50\.0%'):
        guarded(tmp_path, monkeypatch, [0.5, 0.495, 0.48], guard='stop')


def test_a_resumed_run_knows_its_start(tmp_path, monkeypatch):
    guarded(tmp_path, monkeypatch, [0.5, 0.6])
    options = dict(segmentation='demo', guard='stop', **SMALL)
    for folder, start in ((tmp_path, 0.5), (tmp_path / 'other', None)):
        _, runner, messages = hook_of(tmp_path / 'none')
        runner.work_dir, runner.iter, runner.epoch = str(folder), 4, 1
        hook = ProbeHook(**options)
        hook.before_train(runner)
        assert hook.start == start
        assert bool(messages) == (start is None)
    assert 'no guard' in messages[0][1]


def test_a_run_that_ruins_its_weights_is_stopped(
    small_config, tmp_path, labelled, capfd
):
    """Bright and dark, which any features tell, unless a huge lr has ruined them."""
    probe = dict(segmentation=labelled / 'masks', guard='stop', margin=0.0) | SMALL
    given = [f'default_hooks.probe.{key}={value}' for key, value in probe.items()]
    given += ['train_dataloader.num_workers=0', 'model.teacher_momentum=0.5']
    command = [str(small_config), '--work-dir', str(tmp_path / 'w'), '--cfg-options']
    still = 'optim_wrapper.optimizer.lr=0'
    assert main([*command, *given, still]) == 0  # bit-equal features, equal scores
    command[2] = str(tmp_path / 'ruined')
    assert main([*command, *given, 'optim_wrapper.optimizer.lr=2400']) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith('error: the score fell to')
    about = json.loads((tmp_path / 'ruined/best_dense.json').read_text())
    assert about['score'] >= about['start'] > 0
    still = json.loads((tmp_path / 'w/best_dense.json').read_text())
    assert still['start'] == still['score'] == about['start'] and not still['steps']


# Several processes, and mistakes


@pytest.mark.dist
def test_first_of_two_processes_probes_and_the_other_waits(small_config, tmp_path):
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PORT': '29631'}
    env['PATH'] = f'{Path(sys.executable).parent}:{env["PATH"]}'
    probe = dict(segmentation='demo') | SMALL
    result = subprocess.run(
        [
            *('bash', str(ROOT / 'tools/dist_train.sh'), str(small_config), '2'),
            *('--work-dir', str(tmp_path / 'run'), '--cfg-options'),
            'train_dataloader.batch_size=2',
            *(f'default_hooks.probe.{key}={value}' for key, value in probe.items()),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (result.stdout + result.stderr).count('probe after epoch 2:') == 1
    assert list(logged(tmp_path / 'run')) == [4, 8, 12]
    assert final(tmp_path / 'run')['steps'] == 12


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(segmentation='nowhere'), ['nowhere/images/train', 'no such folder']),
        (dict(knn='nowhere'), ['nowhere/train', 'no such folder']),
        (dict(segmentation='demo', size=36), ['size=36', 'patch, 8 px', 'size=32']),
        (dict(segmentation='demo', interval=0), ['interval=0', '1 or more']),
        (dict(segmentation='demo', max_share=0), ['max_share=0', '0.05']),
        (dict(segmentation='demo', guard='maybe'), ["guard='maybe'", "'warn'"]),
        (dict(segmentation='demo', margin=-1), ['margin=-1', '0.01']),
        (dict(segmentatio='demo'), ['segmentatio', 'unexpected keyword']),
    ],
)
def test_mistakes_end_in_one_line(small_config, tmp_path, capfd, options, words):
    given = [f'default_hooks.probe.{key}={value}' for key, value in options.items()]
    command = [str(small_config), '--work-dir', str(tmp_path / 'w'), '--cfg-options']
    assert main([*command, *given]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith('error: ')]
    assert len(errors) == 1 and lines[-1] == errors[0]
    for word in words:
        assert word in errors[0]
    assert not list(tmp_path.glob('w/step_*'))
