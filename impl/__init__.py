"""Every technique of the study; importing this package registers them all.

One module per family: the directory listing is the table of contents.
"""

import importlib
import pkgutil

from . import core

_NOT_FAMILIES = {"core", "fidelity", "machine", "models"}
FAMILIES = tuple(
    sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_FAMILIES)
)
for _name in FAMILIES:
    importlib.import_module(f"{__name__}.{_name}")

TECHNIQUES = core.TECHNIQUES
