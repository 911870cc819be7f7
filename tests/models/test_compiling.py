"""``compile=True``: the same step from compiled blocks, and no graph too many."""

import copy
from functools import cache

import pytest
import torch
from conftest import build_model, model_config, optim_wrapper, train, views
from one_step import METHODS, SWIN, VIT, assert_same_step, step
from torch._dynamo.utils import counters

from densessl.engine.launch import load_config, main, parse_args
from densessl.errors import DenseSSLError
from densessl.models.backbones import reference_block
from densessl.registry import MODELS

CLASS = dict(cls_token=True, final_norm=True)
CLASS_TOKEN = dict(
    backbone=VIT | CLASS,
    neck=dict(type='ClassTokenNeck'),
    heads=METHODS['dino']['heads'],
)


@pytest.fixture
def traced(monkeypatch):
    """Blocks go through all of torch.compile but the making of machine code."""

    @cache
    def compiled():
        run = reference_block.ReferenceBlock._run
        backend = 'aot_eager_decomp_partition'  # Inductor's operators and partition
        return torch.compile(run, dynamic=False, backend=backend)

    monkeypatch.setattr(reference_block, '_compiled', compiled)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    'options',
    [
        METHODS['dino'],
        CLASS_TOKEN,
        METHODS['selfpatch_in_parts'],
        METHODS['densedino'],
        METHODS['loca'],
        METHODS['selfpatch'] | dict(low_memory=True),
    ],
    ids=['dino', 'class token', 'selfpatch', 'densedino', 'loca', 'low memory'],
)
def test_step_in_float64_is_that_of_eager_blocks(options, double, traced):
    expected = step(**options)
    assert not counters['stats']
    found = step(**options, compile=True)
    assert_same_step(found, expected, 1e-9)
    assert counters['stats']['unique_graphs'] > 0
    assert not counters['graph_break']


def test_step_under_autocast_is_that_of_eager_blocks(traced):
    options = dict(precision='bf16', **METHODS['selfpatch'])
    expected, found = (step(**options, compile=on) for on in (False, True))
    assert_same_step(found, expected, 0.05)


@pytest.mark.slow
def test_machine_code_of_a_step(double):
    expected, found = (step(**CLASS_TOKEN, compile=on) for on in (False, True))
    assert_same_step(found, expected, 1e-9)


def test_graphs_are_made_in_the_first_step(traced):
    deep = dict(embed_dims=32, depth=12, num_heads=2)  # each block has its own rate
    backbone = model_config()['backbone'] | dict(arch=deep, drop_path_rate=0.3)
    model = build_model(backbone=backbone, compile=True).train()
    wrapper = optim_wrapper(model)
    graphs = []
    for seed in range(4):
        model.train_step(views(seed=seed), wrapper)
        graphs.append(counters['stats']['unique_graphs'])
    # two sizes, of the teacher and of the student, whose first block drops no path
    assert graphs == [6] * 4


def test_only_training_is_compiled(traced):
    model = build_model(compile=True)
    model.eval()
    with torch.no_grad():
        model.backbone(torch.randn(1, 3, 32, 32))
    assert not counters['stats']
    model.train()
    model.backbone(torch.randn(1, 3, 32, 32))
    assert counters['stats']['unique_graphs'] == 1


def saved_bytes(backbone, images):
    """Of activations that a forward keeps for backward."""
    own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = backbone(images).patches  # held, so that no address comes twice
    return sum(kept.values()), out


def test_compiled_blocks_keep_little_more(traced):
    arch = dict(embed_dims=64, depth=4, num_heads=2)
    backbone = MODELS.build(model_config()['backbone'] | dict(arch=arch)).train()
    images = torch.randn(8, 3, 64, 64)
    eager, _ = saved_bytes(backbone, images)
    for block in backbone.blocks:
        block.compiled = True
    compiled, _ = saved_bytes(backbone, images)
    assert compiled < 1.3 * eager


def test_names_weights_and_copies_stay(traced):
    model, eager = build_model(compile=True).train(), build_model().train()
    assert model.state_dict().keys() == eager.state_dict().keys()
    model.backbone(torch.randn(2, 3, 32, 32))
    twin = copy.deepcopy(model.backbone)
    with torch.no_grad():
        twin.patch_embed.proj.weight.zero_()
    images = torch.randn(2, 3, 32, 32)
    found, expected = model.backbone(images), eager.backbone(images)
    torch.testing.assert_close(found.patches, expected.patches)
    assert not twin(images).patches.allclose(expected.patches)


def test_a_backbone_without_such_blocks_is_refused():
    with pytest.raises(DenseSSLError, match=r'SwinTransformer has no blocks to comp'):
        build_model(backbone=SWIN, neck=dict(type='AveragePoolNeck'), compile=True)


@pytest.mark.parametrize('words', [['--compile'], ['--cfg-options', 'compile=True']])
def test_switch_of_the_command_line(words, small_config):
    cfg = load_config(parse_args([str(small_config), *words]))
    assert cfg.model.compile is True
    assert 'compile' not in cfg  # MMEngine would compile the step as well


def test_a_switch_is_on_or_off(small_config, capsys):
    assert main([str(small_config), '--cfg-options', 'compile=mode']) == 2
    assert capsys.readouterr().err == (
        "error: compile='mode' is no switch; give True or False\n"
    )


def test_no_compiler_is_one_line(small_config, monkeypatch, tmp_path):
    monkeypatch.setenv('CXX', '/no/g++')
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    work_dir = tmp_path / 'run'
    ran = train(small_config, '--compile', '--work-dir', work_dir, check=False)
    assert ran.returncode == 2
    line = ran.stderr.splitlines()[-1]
    assert line.startswith('error: compile=True: ') and '/no/g++' in line
    assert line.endswith(
        'leave compile out, or install what torch.compile needs, such as g++'
    )
