"""The configs build, and what the pages name exists, parses and runs."""

import ast
import math
import re
import shlex
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, build_model, model_config, optim_wrapper
from mmengine.config import Config
from safetensors import safe_open

from densessl.datasets import collate_views
from densessl.engine.checkpoint import load_run, save_run
from densessl.engine.launch import load_config, parse_args
from densessl.engine.optim import Precision
from densessl.interop.backbone import BACKBONE_FILE
from densessl.models.heads import ClusterHead, PositionHead, PredictionHead
from densessl.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, TRANSFORMS

CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for folder in (
        'methods',
        'methods/mixed',
        'methods/continue',
        'presets',
        'quickstart',
    )
    for path in (ROOT / 'configs' / folder).glob('*.py')
)
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md')])
METHOD_PAGES = sorted(ROOT.glob('docs/methods/*.md'))
CHECKPOINTS = ROOT / 'docs/checkpoints.md'
COMMAND = re.compile(r'python tools/train\.py (configs/[^`|\n]+)')
SWITCH = re.compile(
    r'`((?:model|optim_wrapper|default_hooks|train_cfg|train_dataloader)\.\S+=[^`]+)`'
)
OUT_DIMS = 16
TOY_BACKBONES = dict(
    VisionTransformer=dict(arch=dict(embed_dims=32, depth=1, num_heads=2)),
    TimmBackbone=dict(name='resnet10t'),
    CvT=dict(
        arch=dict(embed_dims=[8] * 4, depths=[1] * 4, num_heads=[1] * 4),
    ),
    VisionLongformer=dict(
        arch=dict(embed_dims=[8] * 4, depths=[1] * 4, num_heads=[1] * 4),
        num_heads=None,
    ),
)


def text(page: Path) -> str:
    return page.read_text().replace('\\\n', ' ')  # a command may go on below


def commands() -> list[str]:
    """Arguments of every command of the pages that names a config."""
    return sorted({c.strip() for page in PAGES for c in COMMAND.findall(text(page))})


def switches() -> list[str]:
    """Options that a method's page names, as commands on its first config."""
    found = []
    for page in METHOD_PAGES:
        config = re.search(r'configs/methods/\w\S*?\.py', text(page)).group()
        found += [f'{config} --cfg-options {s}' for s in SWITCH.findall(text(page))]
    return sorted(set(found))


def toy_model(cfg: Config):
    """The config's model, few channels wide and one block deep."""
    backbone = cfg.model.backbone
    if backbone.get('name', '').startswith('vit_'):  # of timm
        backbone.update(embed_dim=32, depth=1, num_heads=2)
    else:
        backbone.update(TOY_BACKBONES.get(backbone.type, {}))
    if backbone.type == 'SwinTransformer':  # one or several windows, a stage each
        windows = backbone.get('window_size')
        stages = len(windows) if isinstance(windows, list) else 4
        heads = [2**i for i in range(stages)]
        backbone.arch = dict(embed_dims=8, depths=[2] * stages, num_heads=heads)
    cfg.model.neck.pop('num_heads', None)
    for head in cfg.model.heads.values():
        if head is None or head.type == 'PositionHead':
            (head or {}).pop('num_heads', None)
            continue
        head.out_dims = OUT_DIMS
        if 'Contrastive' in head.type:
            head.hidden_dims = 16
            continue
        head.setdefault('projector', {}).update(hidden_dims=16, bottleneck_dims=8)
    torch.manual_seed(0)
    return MODELS.build(cfg.model)


def toy_views(cfg: Config, batch: int = 2) -> dict:
    """Views of noise, cut by the config's own transforms in their full sizes."""
    (crop,) = [t for t in cfg.train_dataloader.dataset.pipeline if 'views' in t]
    crop, rng = TRANSFORMS.build(crop), np.random.default_rng(0)
    samples = []
    for i in range(batch):
        noise = rng.integers(0, 256, (128, 160, 3), dtype=np.uint8)
        samples.append(crop(dict(img=noise, path=f'{i}.jpg', rng=rng)))
    return collate_views(samples)


@pytest.mark.parametrize('path', CONFIGS)
def test_config_gives_a_loss_on_its_own_views(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = load_config(parse_args([path]))
    model = toy_model(cfg)
    out = model(**model.data_preprocessor(toy_views(cfg)))
    assert {key for key in out if key.startswith('loss_')} == {
        f'loss_{name}'
        for name, head in cfg.model.heads.items()
        if head is not None and head.get('matching', '') is not None
    }
    total = 0.0
    for name, head in model.heads.items():
        # unit rows of W and unit bottlenecks: logits in [-1, 1], over a temperature
        least, most = 0.0, math.log(OUT_DIMS) + 2 / getattr(head, 'student_temp', 1)
        if isinstance(head, PositionHead):
            most = 2 * math.log(math.prod(head.grid))
        if isinstance(head, ClusterHead):  # less the entropy of the mean prediction
            least = -math.log(OUT_DIMS)
        if isinstance(head, PredictionHead):  # cosines in [-1, 1], among keys; twice
            most = 2 * (math.log(1 + 4096) + 2 / head.temp)
        assert least < out[f'loss_{name}'] < most
        total = total + head.loss_weight * out[f'loss_{name}']
    if cfg.model.get('average_losses'):
        total = total / sum(head.loss_weight for head in model.heads.values())
    torch.testing.assert_close(out['loss'], total)


@pytest.mark.parametrize('command', commands() + switches())
def test_command_of_a_page_takes_effect(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = parse_args(shlex.split(command, comments=True))
    cfg = load_config(args)
    plain = load_config(parse_args([args.config])).to_dict()
    for option, value in (args.cfg_options or {}).items():
        if '_delete_' not in option:
            assert lookup(plain, option) != value, (
                f'{option}: the config has it already'
            )
    optim = dict(cfg.optim_wrapper)
    assert optim.pop('precision') in get_args(Precision)  # a CPU has no fp16
    OPTIM_WRAPPER_CONSTRUCTORS.get(optim.pop('constructor'))(optim)(toy_model(cfg))
    toy_views(cfg, batch=1)


def lookup(node, dotted: str):
    """What a config has under a dotted key; ``'(absent)'`` for nothing."""
    for key in dotted.split('.'):
        if isinstance(node, list | tuple):
            node = node[int(key)]
        elif isinstance(node, dict) and key in node:
            node = node[key]
        else:
            return '(absent)'
    return node


@cache
def names(path: Path) -> set[str]:
    """Functions and classes of a file, and methods as ``Class.method``."""
    kinds = ast.FunctionDef | ast.ClassDef
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, kinds)]
    inner = {
        f'{node.name}.{part.name}'
        for node in top
        for part in node.body
        if isinstance(node, ast.ClassDef) and isinstance(part, kinds)
    }
    return {node.name for node in top} | inner


def rows(block: str) -> list[list[str]]:
    """Cells of the tables in a block of Markdown, without heads and rules."""
    lines = [line for line in block.splitlines() if line.startswith('|')]
    cells = [[c.strip() for c in line.strip('|').split('|')] for line in lines]
    rules = [i for i, row in enumerate(cells) if set(''.join(row)) <= {'-', ':'}]
    return [r for i, r in enumerate(cells) if i not in rules and i + 1 not in rules]


@pytest.mark.parametrize('page', METHOD_PAGES, ids=lambda page: page.stem)
def test_every_equation_has_its_code_and_its_test(page):
    stated = re.findall(r'^(\[[A-Z]\d+\])  ', text(page), re.MULTILINE)
    table = {row[0]: row[1:] for row in rows(text(page)) if len(row) == 3}
    assert stated and set(stated) <= set(table)
    for label in stated:
        code, test = table[label]
        assert re.search(r'\[`.+`\]\(.+\.py\)', code) and '.py::test_' in test, label


def test_names_of_the_pages_exist():
    found = 0
    for page in PAGES:
        for words, path in re.findall(r'\[(`[^\]]+`)\]\(([^)]+\.py)\)', text(page)):
            if '/configs/' not in path:
                for name in re.findall(r'`([^`]+)`', words):
                    assert name in names((page.parent / path).resolve()), (page, name)
                    found += 1
        for path, name in re.findall(r'`([\w/]+\.py)::(\w+)`', text(page)):
            assert name in names(ROOT / path), (page, name)
            found += 1
    assert found > 40


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    for target in re.findall(r'\]\((?!https?:|mailto:)([^)\s]+)\)', text(page)):
        path, _, anchor = target.partition('#')
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r'^#+ (.+)$', text(file), re.MULTILINE)
            slugs = [
                re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in heads
            ]
            assert anchor in slugs, target
    rooms = 'benchmarks|configs|densessl|docs|examples|tests|tools'
    for path in re.findall(rf'`((?:{rooms})/[\w/.-]+)`', text(page)):
        assert (ROOT / path).exists(), path


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory):
    """A checkpoint of a small model where the page's examples look for it."""
    home = tmp_path_factory.mktemp('home')
    model = build_model()
    for parameter in model.teacher.parameters():  # no longer the student's
        parameter.data.add_(0.01)
    runner = SimpleNamespace(
        train_loop=SimpleNamespace(steps_per_epoch=62),
        train_dataloader=SimpleNamespace(
            batch_sampler=SimpleNamespace(global_batch_size=32)
        ),
        seed=0,
        cfg=Config(dict(model=model_config())),
        model=model,
        optim_wrapper=optim_wrapper(model),
    )
    save_run(runner, 372, home / 'work_dirs/selfpatch_vit-t8_demo')
    cv2.imwrite(str(home / 'picture.jpg'), np.full((50, 70, 3), 99, np.uint8))
    return home / 'work_dirs/selfpatch_vit-t8_demo', model


def section(title: str) -> str:
    return text(CHECKPOINTS).split(f'## {title}\n')[1].split('\n## ')[0]


def listed(block: str) -> list[str]:
    return [re.match(r'`([^`]+)`', row[0]).group(1) for row in rows(block)]


def test_page_lists_the_keys_of_a_checkpoint(work_dir):
    folder, _ = work_dir
    state = load_run(folder / 'step_00000372.pth')
    top, weights = section('`step_*.pth`').split('An incident')
    assert listed(top) == list(state)
    patterns = [
        re.escape(p).replace('<head>', r'\w+').replace(r'\*', '.+')
        for p in listed(weights)
    ]
    for key in state['state_dict']:
        assert sum(bool(re.fullmatch(p, key)) for p in patterns) == 1, key
    for pattern in patterns:
        assert any(re.fullmatch(pattern, key) for key in state['state_dict']), pattern
    with safe_open(folder / BACKBONE_FILE, 'pt') as file:
        assert sorted(listed(section('`backbone.safetensors`'))) == sorted(
            file.metadata()
        )


def test_examples_of_the_page_run(work_dir, monkeypatch):
    folder, model = work_dir
    monkeypatch.chdir(folder.parent.parent)
    scope: dict = {}
    loading, selecting = re.findall(
        r'```python\n(.+?)```', text(CHECKPOINTS), re.DOTALL
    )
    exec(loading, scope)
    assert scope['features'].shape == (1, 6, 8, 32)  # 50 x 70 px, patches of 8
    assert scope['tokens'].cls is None
    grey = torch.full((1, 1, 3, 48, 64), 99.0)
    view = model.data_preprocessor(dict(inputs=dict(view=grey)))['inputs']['view'][0]
    with torch.no_grad():
        expected = model.teacher.backbone(view).patches
    torch.testing.assert_close(scope['tokens'].patches, expected)
    for parameter in scope['backbone'].parameters():
        parameter.data.zero_()
    exec(selecting, scope)
    for key, value in model.teacher.backbone.state_dict().items():
        assert scope['backbone'].state_dict()[key].equal(value), key
