"""Registries of densessl: children of MMEngine's root, scope ``densessl``.

Siblings of MMPretrain's, MMSegmentation's and MMDetection's: a config of ours names
``mmpretrain.SwinTransformer``, and one of theirs ``densessl.VisionTransformer`` once
densessl is imported (``custom_imports``).
"""

from mmengine import registry as root
from mmengine.registry import Registry


def _child(name: str, parent: Registry, location: str) -> Registry:
    return Registry(name, parent=parent, scope='densessl', locations=[location])


MODELS = _child('model', root.MODELS, 'densessl.models')
TASK_UTILS = _child('task util', root.TASK_UTILS, 'densessl.models')
DATASETS = _child('dataset', root.DATASETS, 'densessl.datasets')
DATA_SAMPLERS = _child('data sampler', root.DATA_SAMPLERS, 'densessl.datasets')
TRANSFORMS = _child('transform', root.TRANSFORMS, 'densessl.datasets')
FUNCTIONS = _child('function', root.FUNCTIONS, 'densessl.datasets')
EVALUATORS = _child('evaluator', root.EVALUATOR, 'densessl.evaluation')
HOOKS = _child('hook', root.HOOKS, 'densessl.engine')
LOOPS = _child('loop', root.LOOPS, 'densessl.engine')
RUNNERS = _child('runner', root.RUNNERS, 'densessl.engine')
OPTIM_WRAPPERS = _child('optimizer wrapper', root.OPTIM_WRAPPERS, 'densessl.engine')
OPTIM_WRAPPER_CONSTRUCTORS = _child(
    'optimizer wrapper constructor', root.OPTIM_WRAPPER_CONSTRUCTORS, 'densessl.engine'
)
MODEL_WRAPPERS = _child('model_wrapper', root.MODEL_WRAPPERS, 'densessl.engine')

# MMEngine looks for these in the scope of a config too; they hold nothing of ours.
OPTIMIZERS = _child('optimizer', root.OPTIMIZERS, 'densessl.engine')
LOG_PROCESSORS = _child('log_processor', root.LOG_PROCESSORS, 'densessl.engine')
VISUALIZERS = _child('visualizer', root.VISUALIZERS, 'densessl.visualization')
VISBACKENDS = _child('vis_backend', root.VISBACKENDS, 'densessl.visualization')
