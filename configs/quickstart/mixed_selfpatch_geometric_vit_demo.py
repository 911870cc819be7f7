"""SelfPatch and regions matched by place, on built-in scenes, on a CPU."""

_base_ = ['selfpatch_vit-t8_demo.py']
model = dict(
    heads=dict(
        region=dict(
            type='RegionHead',
            matching='geometric',
            out_dims=256,
            loss_weight=dict(end=1.0),
            teacher_temp=0.01,
            center_momentum=0.8,
            projector=dict(hidden_dims=256, bottleneck_dims=64),
        )
    )
)
