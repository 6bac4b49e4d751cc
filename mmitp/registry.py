"""Child registries of mmengine's with scope ``mmitp``: ``type='mmitp.X'`` in any config resolves by itself.

Each registry names the package whose import registers its classes (``locations``); mmengine imports it at the first
look-up. A class therefore has to be imported by that package, which a test checks for all of them.
"""

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import FUNCTIONS as MMENGINE_FUNCTIONS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import PARAM_SCHEDULERS as MMENGINE_PARAM_SCHEDULERS
from mmengine.registry import TASK_UTILS as MMENGINE_TASK_UTILS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import VISBACKENDS as MMENGINE_VISBACKENDS
from mmengine.registry import VISUALIZERS as MMENGINE_VISUALIZERS
from mmengine.registry import Registry

__all__ = [
    "DATASETS",
    "DATA_SAMPLERS",
    "FUNCTIONS",
    "HOOKS",
    "LOOPS",
    "METRICS",
    "MODELS",
    "OPTIM_WRAPPERS",
    "OPTIM_WRAPPER_CONSTRUCTORS",
    "PARAM_SCHEDULERS",
    "TASK_UTILS",
    "TRANSFORMS",
    "VISBACKENDS",
    "VISUALIZERS",
]


def _child(parent: Registry, location: str) -> Registry:
    return Registry(parent.name, parent=parent, scope="mmitp", locations=[location])


MODELS = _child(MMENGINE_MODELS, "mmitp.models")
TASK_UTILS = _child(MMENGINE_TASK_UTILS, "mmitp.models")
DATASETS = _child(MMENGINE_DATASETS, "mmitp.datasets")
DATA_SAMPLERS = _child(MMENGINE_DATA_SAMPLERS, "mmitp.datasets")
FUNCTIONS = _child(MMENGINE_FUNCTIONS, "mmitp.datasets")
TRANSFORMS = _child(MMENGINE_TRANSFORMS, "mmitp.datasets")
HOOKS = _child(MMENGINE_HOOKS, "mmitp.engine.hooks")
LOOPS = _child(MMENGINE_LOOPS, "mmitp.engine")
OPTIM_WRAPPERS = _child(MMENGINE_OPTIM_WRAPPERS, "mmitp.engine")
OPTIM_WRAPPER_CONSTRUCTORS = _child(MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS, "mmitp.engine")
PARAM_SCHEDULERS = _child(MMENGINE_PARAM_SCHEDULERS, "mmitp.engine")
METRICS = _child(MMENGINE_METRICS, "mmitp.evaluation.metrics")
VISUALIZERS = _child(MMENGINE_VISUALIZERS, "mmitp.visualization")
VISBACKENDS = _child(MMENGINE_VISBACKENDS, "mmitp.visualization")
