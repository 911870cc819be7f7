"""GLSD with LOCA's clusters as a third task, on built-in scenes.

Regions matched by place and balanced clusters supervise the same tokens of a small Swin.
"""

_base_ = ['glsd_swin_demo.py']
model = dict(
    heads=dict(
        cluster=dict(
            type='ClusterHead',
            out_dims=256,
            reference_role='global',
            query_roles=['global'],
            projector=dict(hidden_dims=256, bottleneck_dims=64),
        )
    )
)
