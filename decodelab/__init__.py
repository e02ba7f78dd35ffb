"""A literate laboratory of decoding methods for language models.

Names are found on first use: `from decodelab import TokenRecycling` imports the one module that defines it, and nothing else.
"""

from importlib import import_module as _import_module
from typing import Any as _Any

__version__ = "0.1.0"


def _where() -> dict[str, str]:
    # public name -> module, from nbdev's index; a name that two modules define is left out
    from decodelab._modidx import d

    found: dict[str, str] = {}
    twice = set()
    index: dict[str, dict[str, _Any]] = d["syms"]  # type: ignore[assignment]
    for module, symbols in index.items():
        for path in symbols:
            name = path.removeprefix(module + ".")
            if "." not in name and not name.startswith("_"):
                if name in found:
                    twice.add(name)
                found[name] = module
    return {name: module for name, module in found.items() if name not in twice}


def __getattr__(name: str) -> _Any:
    module = None if name.startswith("_") else _where().get(name)
    if module is None:
        raise AttributeError(f"module 'decodelab' has no attribute {name!r}")
    value = getattr(_import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_where()})
