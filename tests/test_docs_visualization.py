"""The commands of the page on pictures run, on untrained models of their configs."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_docs import text

from densessl.engine.checkpoint import save_run
from densessl.engine.launch import load_config, parse_args
from densessl.registry import MODELS
from densessl.visualization import main as visualize
from densessl.visualization import report_page

PAGE = ROOT / 'docs/visualization.md'
RUN = re.compile(r'work_dirs/(\w[\w-]*_demo)/(step_(\d+)\.pth|backbone\.safetensors)')


def commands(tool: str) -> list[str]:
    return re.findall(rf'^python {tool}\.py (.+)$', text(PAGE), re.MULTILINE)


VISUALIZE, REPORT = commands('tools/visualize'), commands('tools/report')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """The work dirs that the page names, and its pictures."""
    folder = tmp_path_factory.mktemp('home')
    for name, _, steps in set(RUN.findall(text(PAGE))):
        work_dir = folder / 'work_dirs' / name
        config = ROOT / f'configs/quickstart/{name}.py'
        cfg = load_config(parse_args([str(config)]))
        runner = SimpleNamespace(
            train_loop=SimpleNamespace(steps_per_epoch=1),
            train_dataloader=SimpleNamespace(
                batch_sampler=SimpleNamespace(global_batch_size=1)
            ),
            seed=0,
            cfg=cfg,
            model=MODELS.build(cfg.model),
            optim_wrapper=torch.optim.SGD([torch.zeros(1)], 0.1),
        )
        save_run(runner, int(steps or 0), work_dir)
        data = work_dir / '20250101_000000/vis_data'
        data.mkdir(parents=True, exist_ok=True)
        lines = [dict(step=i, loss=5.0 - i, lr=0.1) for i in (1, 2)]
        (data / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))
        (data / 'config.py').write_text(cfg.pretty_text)
    (make_scenes,) = re.findall(r'^python -c "(.+)"$', text(PAGE), re.MULTILINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(make_scenes, {})
    assert len(list(folder.glob('work_dirs/scenes/images/*.jpg'))) == 4
    return folder


def test_every_command_has_its_example(capsys):
    with pytest.raises(SystemExit):
        visualize.main(['nothing'])
    known = capsys.readouterr().err.partition('choose from ')[2]
    kinds = {command.split()[0] for command in VISUALIZE}
    listed = set(re.findall(r'`tools/visualize\.py (\w+)`', text(PAGE)))
    assert kinds == listed == set(re.findall(r'\w+', known)) and len(REPORT) == 1


@pytest.mark.parametrize('command', VISUALIZE, ids=lambda command: command[:30])
def test_command_of_the_page_runs(command, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    (home / 'configs').exists() or (home / 'configs').symlink_to(ROOT / 'configs')
    assert visualize.main(shlex.split(command)) == 0, capsys.readouterr().err
    written = capsys.readouterr().out.split()
    assert written and all((home / path).stat().st_size for path in written)


def test_report_of_the_page_runs(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert report_page.main(shlex.split(REPORT[0])) == 0
    assert (home / capsys.readouterr().out.strip()).stat().st_size > 1000
