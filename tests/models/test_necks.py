"""Aggregators: the fast path over sets against one set at a time."""

import pytest
import torch

from densessl.errors import DenseSSLError
from densessl.models.features import Tokens
from densessl.models.necks import AveragePoolNeck, ClassAttentionNeck, ClassTokenNeck


def sets(batch=2, patches=9, places=5, k=4):
    index = torch.randint(patches, (batch, places, k))
    valid = torch.rand(batch, places, k) < 0.6
    valid[..., 0] = True
    return index, valid


@pytest.mark.parametrize('neck', [ClassAttentionNeck(32, 4), AveragePoolNeck(32, True)])
def test_aggregate_is_pool_of_each_set(neck):
    torch.manual_seed(0)
    patches = torch.randn(2, 9, 32)
    index, valid = sets()
    out = neck.aggregate(patches, index, valid)
    for b in range(2):
        for m in range(5):
            chosen = patches[b][index[b, m][valid[b, m]]][None]
            alone = neck.pool(Tokens(chosen, (1, chosen.shape[1])))[0]
            torch.testing.assert_close(out[b, m], alone, atol=1e-5, rtol=1e-5)


def test_class_attention_equals_softmax_written_out():
    torch.manual_seed(0)
    neck = ClassAttentionNeck(16, num_heads=2, depth=1).double()
    patches = torch.randn(1, 6, 16, dtype=torch.float64)
    block, token = neck.blocks[0], neck.token[0]
    x = block.norm1(torch.cat([token, patches[0]]))
    key, value = block.kv(x).chunk(2, -1)
    query = block.q(x[:1])
    heads = []
    for h in range(2):
        part = slice(8 * h, 8 * h + 8)
        share = (query[:, part] @ key[:, part].T / 8**0.5).softmax(-1)
        heads.append(share @ value[:, part])
    token = token + block.proj(torch.cat(heads, -1))
    token = token + block.mlp(block.norm2(token))
    expected = neck.norm(token)
    torch.testing.assert_close(neck.pool(Tokens(patches, (2, 3))), expected)


def test_set_order_does_not_matter():
    neck = ClassAttentionNeck(32, 4)
    patches = torch.randn(2, 9, 32)
    index, valid = sets()
    order = torch.randperm(4)
    torch.testing.assert_close(
        neck.aggregate(patches, index, valid),
        neck.aggregate(patches, index[..., order], valid[..., order]),
    )


def test_average_and_class_token():
    tokens = Tokens(torch.randn(2, 9, 32), (3, 3), cls=torch.randn(2, 32))
    assert ClassTokenNeck(32).pool(tokens).equal(tokens.cls)
    mean = sum(tokens.patches[:, i] for i in range(9)) / 9
    torch.testing.assert_close(AveragePoolNeck(32).pool(tokens), mean)
    with pytest.raises(DenseSSLError, match='no class token'):
        ClassTokenNeck(32).pool(Tokens(tokens.patches, (3, 3)))
