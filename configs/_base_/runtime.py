"""How a run goes: loop, optimiser, schedules, hooks, logs. Every config builds on it."""

default_scope = 'densessl'
train_cfg = dict(type='TrainLoop', max_epochs=100)
randomness = dict(seed=0)
pictures = dict(channels='rgb')  # of 8 bits; others: docs/channels.md
env_cfg = dict(
    cudnn_benchmark=True, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0)
)

# DINO's recipe: lr 5e-4 per 256 images, warm-up 10 epochs, cosine to 1e-6; weight decay
# 0.04 -> 0.4; every parameter's gradient clipped by its own norm.
optim_wrapper = dict(
    type='MixedPrecisionOptimWrapper',
    constructor='TwoGroupConstructor',
    optimizer=dict(
        type='AdamW', lr=5e-4, betas=(0.9, 0.999), weight_decay=0.04, fused=True
    ),
    precision='auto',
    clip_grad=dict(type='each', max_norm=3.0),
)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    progress=dict(type='ProgressBarHook'),
    schedule=dict(
        type='ScheduleHook',
        warmup_epochs=10,
        min_lr=1e-6,
        end_weight_decay=0.4,
        base_batch_size=256,
    ),
    health=dict(type='HealthHook', interval=50),
    broken=dict(type='BrokenImageHook', max_broken=0.01),
    checkpoint=dict(type='CheckpointHook', interval=1, keep=3),
    probe=dict(type='ProbeHook'),  # does nothing until it is given labelled data
    report=dict(type='ReportHook', size=448),
    # MMEngine's own, done differently here: ScheduleHook, TrainLoop
    param_scheduler=None,
    sampler_seed=None,
)
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='Visualizer', vis_backends=vis_backends)
log_processor = dict(type='LogProcessor', window_size=50)
