"""Low-memory mode: activations computed twice give the step that keeps them."""

import pytest
import torch
from conftest import build_model, views
from one_step import METHODS, VIEW, VIT, assert_same_step, step
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from densessl.engine.launch import load_config, main, parse_args
from densessl.errors import DenseSSLError
from densessl.models.algorithms.low_memory import recompute


@pytest.mark.parametrize('method', METHODS)
def test_step_in_float64_is_that_of_kept_activations(method, double):
    options = METHODS[method]
    expected, found = (step(**options, low_memory=low) for low in (False, True))
    assert any(grad.any() for grad in expected[1].values())
    assert_same_step(found, expected, 1e-9)


@pytest.mark.parametrize('method', METHODS)
def test_step_in_float32_is_that_of_kept_activations(method):
    options = METHODS[method]
    expected, found = (step(**options, low_memory=low) for low in (False, True))
    assert_same_step(found, expected, 1e-6)


def test_step_under_autocast_is_that_of_kept_activations():
    options = dict(precision='bf16', **METHODS['selfpatch'])
    expected, found = (step(**options, low_memory=low) for low in (False, True))
    assert_same_step(found, expected, 1e-6)
    exact = step(**METHODS['selfpatch'])
    assert exact[0]['loss'] != expected[0]['loss']  # it was bfloat16


def test_batch_norm_counts_a_batch_once():
    options = METHODS['resnet']
    (_, _, before, _), (_, _, state, _) = (step(**options, seed=i) for i in range(2))
    assert not before['backbone.model.bn1.running_mean'].equal(
        state['backbone.model.bn1.running_mean']
    )
    _, _, state, _ = step(**options, low_memory=True)
    counts = [v for k, v in state.items() if k.startswith('backbone') and 'num_b' in k]
    assert len(counts) > 8 and all(count == 1 for count in counts)


def calls_of(model, data):
    """Views' tokens and block of each pass through a block's attention, in order."""
    calls = []
    for i, block in enumerate(model.backbone.blocks):
        block.attn.proj.register_forward_hook(
            lambda module, args, out, i=i: calls.append((out.shape[1], i))
        )
    loss = model(**model.data_preprocessor(data))['loss']
    forward = list(calls)
    calls.clear()
    loss.backward()
    return forward, calls


def test_one_block_with_views_of_one_size_at_a_time():
    order = [(16, 0), (16, 1), (9, 0), (9, 1)]  # 2 x 32 px, 3 x 24 px
    assert calls_of(build_model(low_memory=True), views()) == (order, order[::-1])
    assert calls_of(build_model(), views()) == (order, [])


class Storages(TorchDispatchMode):
    """Bytes that operations have allocated and that are still there."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf):
                storage = leaf.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def alive(self):
        return sum(n for ref, n in self.seen.values() if not ref.expired())


@pytest.mark.parametrize('named', [True, False])
def test_forward_keeps_no_activations(named):
    """Neither of a backbone with blocks to be found, nor of one without."""
    alive = []
    backbone = VIT | dict(arch=dict(embed_dims=32, depth=8, num_heads=2))
    for low_memory in (False, True):
        model = build_model(backbone=backbone, heads=VIEW, low_memory=low_memory)
        if not named:
            blocks = torch.nn.ModuleList(model.backbone.blocks)
            model.backbone.parts, model.backbone.__class__ = blocks, _unnamed(model)
            del model.backbone._modules['blocks']
        batch = model.data_preprocessor(views(batch=16))
        with Storages() as storages:
            out = model(**batch)
        alive.append(storages.alive)
        out['loss'].backward()
    assert alive[1] < 0.3 * alive[0]


def _unnamed(model):
    kind = type(model.backbone)
    return type('Unnamed', (kind,), dict(blocks=property(lambda self: self.parts)))


def test_nothing_stays_on_the_blocks():
    model = build_model(low_memory=True)
    model(**model.data_preprocessor(views()))['loss'].backward()
    for block in model.backbone.blocks:
        assert 'forward' not in vars(block)


def test_what_a_second_call_writes_is_forgotten():
    norm = torch.nn.BatchNorm1d(3)
    x = torch.randn(8, 3, requires_grad=True)
    buffers = dict(norm.named_buffers())
    recompute(norm, norm.forward, x).square().sum().backward()
    for name, buffer in norm.named_buffers():
        assert buffer is buffers[name]
    torch.testing.assert_close(norm.running_mean, 0.1 * x.detach().mean(0))
    assert norm.num_batches_tracked == 1


def test_switched_on_in_the_middle_a_run_goes_on_as_it_was(small_config, tmp_path):
    options = [
        *('--cfg-options', 'train_dataloader.num_workers=0'),
        'default_hooks.checkpoint.interval_steps=2',
    ]
    start = [str(small_config), '--work-dir']
    assert main([*start, str(tmp_path / 'whole'), *options]) == 0
    middle = ['--resume', str(tmp_path / 'whole/step_00000006.pth'), '--low-memory']
    assert main([*start, str(tmp_path / 'rest'), *middle, *options]) == 0
    states = [
        torch.load(tmp_path / d / 'step_00000012.pth', weights_only=True)
        for d in ('whole', 'rest')
    ]
    assert 'low_memory=True' in states[1]['config'].replace(' ', '')
    for key, value in states[0]['state_dict'].items():
        torch.testing.assert_close(
            states[1]['state_dict'][key], value, rtol=1e-5, atol=1e-6, msg=key
        )


@pytest.mark.parametrize(
    'words', [['--low-memory'], ['--cfg-options', 'low_memory=True']]
)
def test_one_switch(small_config, words):
    assert 'low_memory' not in load_config(parse_args([str(small_config)])).model
    cfg = load_config(parse_args([str(small_config), *words]))
    assert cfg.low_memory is cfg.model.low_memory is True


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['low_memory=yes'], "low_memory='yes' is no switch; give True or False"),
        (
            ['low_memory=True', 'activation_checkpointing=[backbone]'],
            'leave out activation_checkpointing',
        ),
    ],
)
def test_wrong_settings(small_config, options, words):
    args = parse_args([str(small_config), '--cfg-options', *options])
    with pytest.raises(DenseSSLError, match=words) as caught:
        load_config(args)
    assert '\n' not in str(caught.value)
