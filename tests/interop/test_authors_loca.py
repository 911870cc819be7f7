"""LOCA's Flax checkpoints: names, shapes, and a forward that reads them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from authors_checkpoints import (
    PROJECTOR,
    VITS,
    algorithm,
    assert_near,
    assert_same,
    images,
    load,
    loca_file,
    part,
    vit_config,
    weights_alone,
)
from authors_files import (
    Draw,
    flax_bytes,
    flax_loca,
)

from densessl.interop.authors import export_checkpoint, import_checkpoint
from densessl.models.heads.position_head import PositionHead
from densessl.models.heads.projector import DINOProjector


@pytest.mark.parametrize('sizes, heads', [(VITS[0], 4), (VITS[1], 2), (VITS[2], 8)])
def test_loca(tmp_path, sizes, heads):
    checkpoint = loca_file(Draw(6), sizes, heads)
    state = dict(global_step=3, opt_state={'0': {'count': 3}}, metadata={}, rng=None)
    path = tmp_path / 'loca_vsmall_imnet1k'
    path.write_bytes(flax_bytes(checkpoint | state, chunk=1000))
    imported = import_checkpoint(path, 'loca')
    config = vit_config(*sizes, cls_token=False, pos_embed_resize='bilinear')
    config['arch']['num_heads'] = heads
    assert imported.config == config
    assert f'set num_heads={heads} in the position head too' in imported.notes
    model = algorithm(
        config,
        dict(type='AveragePoolNeck'),
        position=dict(type='PositionHead', grid=sizes[3]),
        cluster=dict(type='ClusterHead', out_dims=24, projector=PROJECTOR),
    )
    model.load_state_dict(imported.state, strict=True)

    exported = export_checkpoint(imported.state, config, 'loca')
    theirs = weights_alone(checkpoint)
    unread = ('cross_attention_block', 'final_norm', 'position_predictor')
    kept = {
        name: value
        for name, value in theirs.items()
        if not name.startswith(tuple(f'ema_params.{part}.' for part in unread))
    }
    assert_same(weights_alone(exported), kept)
    path = tmp_path / 'loca.npz'
    flat = {name.replace('.', '/'): value.numpy() for name, value in kept.items()}
    np.savez(path, **flat)
    assert_same(import_checkpoint(path, 'loca').state, imported.state)


def test_loca_average_alone(tmp_path):
    tree = flax_loca(Draw(6), *VITS[0], 2)
    path = tmp_path / 'loca'
    path.write_bytes(flax_bytes(tree))
    imported = import_checkpoint(path, 'loca')
    state = imported.state
    assert torch.equal(
        state['backbone.norm.weight'], torch.tensor(tree['encoder_norm']['scale'])
    )
    assert not any(name.startswith('heads.') for name in state)
    assert any('copy of the teacher' in note for note in imported.notes)


def flax_dense(x, layer):
    return x @ torch.tensor(layer['kernel']) + torch.tensor(layer['bias'])


def flax_norm(x, layer):
    scale, bias = torch.tensor(layer['scale']), torch.tensor(layer['bias'])
    return F.layer_norm(x, x.shape[-1:], scale, bias, 1e-6)


def flax_attention(x, context, layer):
    q, k, v = (
        torch.einsum('nld,dhc->nlhc', y, torch.tensor(layer[name]['kernel']))
        + torch.tensor(layer[name]['bias'])
        for y, name in ((x, 'query'), (context, 'key'), (context, 'value'))
    )
    scores = torch.einsum('nqhc,nkhc->nhqk', q / q.shape[-1] ** 0.5, k)
    out = torch.einsum('nhqk,nkhc->nqhc', scores.softmax(-1), v)
    kernel = torch.tensor(layer['out']['kernel'])
    return torch.einsum('nqhc,hcd->nqd', out, kernel) + torch.tensor(
        layer['out']['bias']
    )


def flax_mlp(x, layer):
    return flax_dense(F.gelu(flax_dense(x, layer['Dense_0'])), layer['Dense_1'])


@torch.no_grad()
def test_loca_encoder_and_position_head(tmp_path):
    width, depth, patch, side = sizes = (32, 2, 8, 3)
    tree = flax_loca(Draw(9), *sizes, 4)
    path = tmp_path / 'loca'
    path.write_bytes(flax_bytes(dict(params=tree, ema_params=tree)))
    imported, backbone = load(path, 'loca')

    pictures = images(side * patch)
    stem = tree['ToTokenSequence_0']
    patches = pictures.unflatten(3, (side, patch)).unflatten(2, (side, patch))
    kernel = torch.tensor(stem['embedding']['kernel'])
    x = torch.einsum('nchpwq,pqcd->nhwd', patches, kernel)
    x = (
        x
        + torch.tensor(stem['embedding']['bias'])
        + torch.tensor(stem['posembed_input'])
    )
    x = x.flatten(1, 2)
    for i in range(depth):
        block = tree[f'encoderblock_{i}']
        normed = flax_norm(x, block['LayerNorm_0'])
        x = x + flax_attention(normed, normed, block['MultiHeadDotProductAttention_0'])
        x = x + flax_mlp(flax_norm(x, block['LayerNorm_1']), block['MlpBlock_0'])
    x = flax_norm(x, tree['encoder_norm'])
    assert_near(backbone(pictures).patches, x)

    queries, references = x, x.flip(0)[:, :5]
    block = tree['cross_attention_block']
    normed = flax_norm(queries, block['LayerNorm_0'])
    context = flax_norm(references, block['LayerNorm_1'])
    attention = block['MultiHeadDotProductAttention_0']
    y = queries + flax_attention(normed, context, attention)
    y = y + flax_mlp(flax_norm(y, block['LayerNorm_2']), block['MlpBlock_0'])
    logits = flax_dense(flax_norm(y, tree['final_norm']), tree['position_predictor'])
    head = PositionHead(width, grid=side, num_heads=4)
    head.load_state_dict(part(imported, 'heads.position.'))
    assert_near(head.predict(queries, references[None])[:, :, 0], logits)

    clusters = tree['projection_head_for_clustering_prediction']
    z = x
    for i in range(2):
        z = F.gelu(flax_dense(z, clusters[f'Dense_{i}']))
    z = F.normalize(flax_dense(z, clusters['Dense_2']), dim=-1)
    logits = z @ F.normalize(torch.tensor(clusters['prototypes']['kernel']), dim=0)
    projector = DINOProjector(width, 24, hidden_dims=48, bottleneck_dims=16)
    projector.load_state_dict(part(imported, 'projectors.cluster.'))
    assert_near(projector(x), logits)
