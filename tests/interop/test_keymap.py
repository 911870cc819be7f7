"""Tables of names, both ways, against what they say and against other packages."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from densessl.errors import DenseSSLError
from densessl.interop import layouts
from densessl.interop.keymap import Extra, KeyMap, Own, Rule
from densessl.models.backbones import SwinTransformer, VisionTransformer

VIT = dict(arch=dict(embed_dims=24, depth=2, num_heads=3), patch_size=8, img_size=32)
SWIN = dict(
    arch=dict(embed_dims=12, depths=[2, 2, 2], num_heads=[1, 2, 4]),
    img_size=64,
    window_size=4,
)


def example() -> KeyMap:
    return KeyMap(
        'other',
        Rule('a.{i}.w', 'layer.{i}.weight', lambda x: x.T, lambda x: x.T),
        Rule(
            'qkv.{p}',
            ('q.{p}', 'k.{p}', 'v.{p}'),
            lambda x: x.chunk(3),
            lambda *x: torch.cat(x),
        ),
        Rule('rest.{all*}', 'r.{all*}'),
        Own('twice.{i}', 'a.{i}.w', lambda x: 2 * x),
        Extra('token', 'not used', lambda state: torch.zeros(3)),
        Extra('head.{all*}', 'classifier'),
    )


def test_names_and_tensors_go_there():
    state = {
        'a.7.w': torch.arange(6.0).view(2, 3),
        'twice.7': torch.zeros(2, 3),
        'qkv.bias': torch.arange(6.0),
        'rest.x.y.z': torch.ones(1),
    }
    there = example().there(state)
    assert there.keys() == {
        'layer.7.weight', 'q.bias', 'k.bias', 'v.bias', 'r.x.y.z', 'token'
    }  # fmt: skip
    assert there['layer.7.weight'].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert there['layer.7.weight'].is_contiguous()
    assert there['k.bias'].tolist() == [2, 3]
    assert there['token'].tolist() == [0, 0, 0]


def test_names_and_tensors_come_back():
    theirs = {
        'layer.0.weight': torch.arange(6.0).view(3, 2),
        'k.bias': torch.tensor([1.0]),
        'v.bias': torch.tensor([2.0]),
        'q.bias': torch.tensor([0.0]),
        'head.fc.weight': torch.ones(1),
        'token': torch.ones(3),
    }
    back = example().back(theirs)
    assert back.keys() == {'a.0.w', 'qkv.bias', 'twice.0'}
    assert back['qkv.bias'].tolist() == [0, 1, 2]
    assert torch.equal(back['twice.0'], 2 * back['a.0.w'])
    left = example().left_out(list(theirs))
    assert left == {'classifier': ['head.fc.weight'], 'not used': ['token']}


def test_unknown_names_are_refused_both_ways():
    with pytest.raises(DenseSSLError, match=r'other: .* no place for a\.b'):
        example().there({'a.b': torch.ones(1)})
    known = {f'layer.{i}.weight': torch.ones(1, 1) for i in range(2)}
    with pytest.raises(DenseSSLError, match=r'2 of 4 names are unknown .*layer\.0'):
        example().back(known | {'layer.0': torch.ones(1), 'x': torch.ones(1)})


def test_a_torn_tensor_is_refused():
    with pytest.raises(DenseSSLError, match=r'parts of qkv\.bias are missing'):
        example().back({'q.bias': torch.ones(1), 'v.bias': torch.ones(1)})


def vit(**options) -> dict[str, torch.Tensor]:
    return VisionTransformer(**VIT, **options).state_dict()


@pytest.mark.parametrize('cls', [True, False])
@pytest.mark.parametrize(
    'table',
    ['VIT_MMPRETRAIN', 'VIT_MMSEG', 'VIT_TIMM', 'VIT_HF'],
)
def test_vit_comes_back_as_it_went(table, cls):
    if table == 'VIT_MMSEG' and not cls:
        table = 'VIT_MMSEG_NO_CLS'
    keymap, state = getattr(layouts, table), vit(cls_token=cls, final_norm=cls)
    assert_same(keymap.back(keymap.there(state)), state)


@pytest.mark.parametrize(
    'keymap',
    [
        layouts.swin_original(3),
        layouts.swin_timm(3),
        layouts.swin_hf(3),
        layouts.SWIN_MMPRETRAIN,
        layouts.swin_feature_pyramid([12, 24, 48]),
    ],
    ids=lambda keymap: keymap.layout,
)
def test_swin_comes_back_as_it_went(keymap):
    state = SwinTransformer(**SWIN).state_dict()
    assert_same(keymap.back(keymap.there(state)), state)


def test_resnet_comes_back_as_it_went():
    state = {
        f'model.{k}': v for k, v in timm.create_model('resnet18').state_dict().items()
    }
    theirs = layouts.RESNET.there(state)
    without = {k: v for k, v in state.items() if not k.startswith('model.fc.')}
    assert_same(layouts.RESNET.back(theirs), without)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@given(st.integers(1, 9))
def test_relative_position_index_is_what_a_window_reads(side):
    table = torch.zeros((2 * side - 1) ** 2, 1)
    index = layouts.relative_position_index(table)
    span = 2 * side - 1
    for a in range(0, side * side, 3):
        for b in range(side * side):
            dy, dx = a // side - b // side, a % side - b % side
            assert index[a, b] == (dy + side - 1) * span + dx + side - 1


def test_merging_reads_the_same_neighbours_in_both_orders():
    # One channel of one neighbour is 1: both orders must name it.
    channels, rows, columns = 3, (0, 1, 0, 1), (0, 0, 1, 1)
    for c in range(channels):
        for block, (row, column) in enumerate(zip(rows, columns, strict=True)):
            original = torch.zeros(4 * channels)
            original[block * channels + c] = 1
            unfolded = torch.nn.functional.unfold(
                torch.eye(4).view(4, 1, 2, 2), 2
            )  # which place 00 01 10 11 has
            place = int(unfolded[2 * row + column, :, 0].argmax())
            ours = layouts._merging_back(original)
            assert ours.nonzero().tolist() == [[4 * c + place]]
            assert torch.equal(layouts._merging_there(ours), original)
