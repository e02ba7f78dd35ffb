"""A literate laboratory of decoding methods for language models.

Top-level names are the registered decoders, `load` (models), `decoders` (what there is) and `advise` (what is fast here); everything else is imported from its module.
They are found on first use: `from decodelab import TokenRecycling` imports the one module that defines it, and nothing else.
"""

from importlib import import_module as _import_module
from typing import Any as _Any

__version__ = "0.1.0"
_OTHERS = {"load": "decodelab.core.zoo", "decoders": "decodelab.core.registry", "advise": "decodelab.advice"}


def _where() -> dict[str, str]:
    # public name -> module
    from decodelab.reading import decoder_classes

    found = {cls: f"decodelab.{path.parent.name}.{path.stem}" for path, cls in decoder_classes().values()}
    return found | _OTHERS


def __getattr__(name: str) -> _Any:
    if name == "__all__":  # `from decodelab import *` asks for it
        return sorted(_where())
    module = None if name.startswith("_") else _OTHERS.get(name) or _where().get(name)
    if module is None:
        raise AttributeError(f"module 'decodelab' has no attribute {name!r}")
    value = getattr(_import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_where()})
