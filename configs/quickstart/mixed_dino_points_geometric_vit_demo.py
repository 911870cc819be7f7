"""DINO, reference points and regions matched by place, on built-in scenes, on a CPU."""

_base_ = ['densedino_vit_demo.py']
model = dict(
    heads=dict(
        region=dict(
            type='RegionHead',
            matching='geometric',
            out_dims=256,
            teacher_temp=0.01,
            center_momentum=0.8,
            loss_weight=0.5,
            projector=dict(hidden_dims=256, bottleneck_dims=64),
        )
    )
)
