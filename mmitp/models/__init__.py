"""Networks and detector parts registered in :data:`mmitp.registry.MODELS`.

Importing this package (mmengine does so at the first look-up of a ``mmitp.*`` type) imports every module in it, and
thereby registers every class.
"""

import importlib
import importlib.util
import pkgutil

# Modules that build on a package which a user of the others may lack (a classification-only installation has no mmdet).
_REQUIREMENTS = {"centernet_head": "mmdet"}

for _info in pkgutil.iter_modules(__path__):
    if _info.name not in _REQUIREMENTS or importlib.util.find_spec(_REQUIREMENTS[_info.name]) is not None:
        importlib.import_module(f"{__name__}.{_info.name}")
