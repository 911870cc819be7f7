"""CvT's attention in windows against the same in plain loops."""

import itertools
import math

import pytest
import torch

from densessl.models.backbones import CvT
from densessl.models.backbones.cvt import WindowAttention

WIDTH, HEADS, WINDOW = 6, 2, 3


def attention(relative_position_bias=True):
    """An attention layer with weights, biases and statistics that all matter."""
    torch.manual_seed(0)
    layer = WindowAttention(WIDTH, HEADS, WINDOW, relative_position_bias).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.batch_norm.running_mean.normal_()
    layer.batch_norm.running_var.uniform_(0.5, 2)
    return layer.eval()


def plain_attention(layer, image):
    """One image ``(H, W, C)``, token by token."""
    height, width, _ = image.shape
    window = min(WINDOW, height, width)
    rows = math.ceil(height / window) * window
    columns = math.ceil(width / window) * window
    padded = image.new_zeros(rows, columns, WIDTH)
    padded[:height, :width] = image
    kernel = layer.depthwise.weight[:, 0].permute(1, 2, 0)
    norm = layer.batch_norm
    qkv = {}
    for y, x in itertools.product(range(rows), range(columns)):
        mixed = torch.zeros(WIDTH, dtype=torch.float64)
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            if 0 <= y + dy < rows and 0 <= x + dx < columns:
                mixed = mixed + kernel[dy + 1, dx + 1] * padded[y + dy, x + dx]
        mixed = (mixed - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        mixed = mixed * norm.weight + norm.bias
        qkv[y, x] = (layer.qkv.weight @ mixed + layer.qkv.bias).view(3, HEADS, -1)
    out = torch.zeros(height, width, WIDTH, dtype=torch.float64)
    for y, x in itertools.product(range(height), range(width)):
        top, left = y // window * window, x // window * window
        keys = [(top + i, left + j) for i in range(window) for j in range(window)]
        heads = []
        for head in range(HEADS):
            scores = []
            for key in keys:
                score = qkv[y, x][0, head] @ qkv[key][1, head] / WIDTH**0.5
                if layer.bias_table is not None:
                    dy, dx = key[0] - y, key[1] - x
                    middle = WINDOW - 1
                    score = score + layer.bias_table[head, middle + dy, middle + dx]
                scores.append(score)
            weights = torch.stack(scores).softmax(0)
            values = torch.stack([qkv[key][2, head] for key in keys])
            heads.append(weights @ values)
        out[y, x] = layer.proj.weight @ torch.cat(heads) + layer.proj.bias
    return out


@pytest.mark.parametrize('grid', [(3, 6), (5, 7), (2, 2), (4, 2)])
@pytest.mark.parametrize('biased', [True, False])
def test_attention_equals_plain_loops(grid, biased):
    layer = attention(biased)
    x = torch.randn(2, *grid, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([plain_attention(layer, image) for image in x])
        torch.testing.assert_close(layer(x), expected)


def test_windows_meet_in_the_convolution_alone():
    layer = attention()
    x = torch.randn(1, 6, 6, WIDTH, dtype=torch.float64)

    def moved_by_a_change_at(row, column):
        changed = x.clone()
        changed[0, row, column] += 1
        return (layer(x) != layer(changed)).any(-1)[0]

    own = torch.zeros(6, 6, dtype=torch.bool)
    own[:3, :3] = True
    assert moved_by_a_change_at(1, 1).equal(own)
    assert moved_by_a_change_at(2, 2).all()  # the convolution reaches all 4 windows
    with torch.no_grad():
        layer.depthwise.weight.zero_()[:, :, 1, 1] = 1
    assert moved_by_a_change_at(2, 2).equal(own)


def test_relative_position_bias_is_an_option():
    arch = dict(embed_dims=[4], depths=[2], num_heads=[1])
    biased = CvT(arch, window_size=3)
    plain = CvT(arch, window_size=3, relative_position_bias=False)
    extra = set(biased.state_dict()) - set(plain.state_dict())
    assert extra == {f'stages.0.blocks.{i}.attn.bias_table' for i in range(2)}
    assert biased.state_dict()['stages.0.blocks.0.attn.bias_table'].shape == (1, 5, 5)


def test_embeddings_are_the_conv_layers_of_the_paper():
    convs = [stage.embed for stage in CvT().stages]
    sizes = [(c.kernel_size[0], c.stride[0], c.padding[0]) for c in convs]
    assert sizes == [(7, 4, 2)] + 3 * [(3, 2, 1)]
