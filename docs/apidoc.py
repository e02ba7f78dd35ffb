"""API pages: one per module, every public name with its signature and a table of its parameters (nbdev's docments)."""

import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcore.docments import docments
from notebooks import FAMILIES, FIRST, ROOT, Notebook

_NOTHING = inspect.Parameter.empty


@dataclass(frozen=True)
class Module:
    """One exported module: its name, its public names and the notebook that it comes from."""

    name: str  # as "decodelab.lab.data"
    public: tuple[str, ...]  # its `__all__`
    notebook: str  # as "core/data", or ""
    summary: str  # first line of its docstring

    @property
    def page(self) -> str:
        """Name of its page below `api/`."""
        return self.name.removeprefix("decodelab.")


def read_modules(notebooks: list[Notebook]) -> list[Module]:
    """All modules of the package that export something, in the order of their notebooks."""
    source = {n.module: n.name for n in notebooks if n.module}
    found = []
    for path in sorted((ROOT / "decodelab").rglob("*.py")):
        if path.stem.startswith("_"):
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module = importlib.import_module(name)
        public = tuple(n for n in getattr(module, "__all__", ()) if not n.startswith("_"))
        if public:
            found.append(Module(name, public, source.get(name, ""), (module.__doc__ or "").strip().split("\n")[0]))
    return sorted(found, key=_rank)


def _rank(module: Module) -> tuple:
    family, _, leaf = module.page.rpartition(".")
    rank = FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)
    return (rank, family, FIRST.index(leaf) if leaf in FIRST else len(FIRST), leaf)


def symbols(modules: list[Module]) -> dict[str, str]:
    """Public name -> full name, also for public methods ("Session.feed"); names that two modules share are left out."""
    found: dict[str, list[str]] = {}
    for module in modules:
        for name in module.public:
            found.setdefault(name, []).append(f"{module.name}.{name}")
            value = getattr(importlib.import_module(module.name), name)
            if inspect.isclass(value):
                for method, _ in _methods(value):
                    found.setdefault(f"{name}.{method}", []).append(f"{module.name}.{name}.{method}")
    return {name: full[0] for name, full in found.items() if len(full) == 1}


def module_page(module: Module) -> str:
    """The page of one module."""
    loaded = importlib.import_module(module.name)
    text = re.sub(r"\n*Docs: \S+\s*$", "", inspect.cleandoc(loaded.__doc__ or "")).strip()
    head, _, rest = text.partition("\n")
    parts = [f"# {module.page}", f"> {head}" if head else "", rest.strip()]
    if module.notebook:
        parts.append(f"Exported from the notebook {{doc}}`/{module.notebook}`, where every piece is explained, used and tested.")
    parts.append(f"```{{py:module}} {module.name}\n```")
    parts += [_entry(name, getattr(loaded, name)) for name in module.public]
    return "\n\n".join(p for p in parts if p) + "\n"


def _entry(name: str, value: Any) -> str:
    if inspect.isclass(value):
        inside = [_body(value)]
        for method, member in _methods(value):
            inside.append(
                _property(method, member) if isinstance(member, property) else _directive("method", method, member, _body(member))
            )
        return _directive("class", name, value, "\n\n".join(p for p in inside if p))
    if callable(value):
        return _directive("function", name, value, _body(value))
    shown = _short(value, 160)
    return f":::{{py:data}} {name}\n{_code(shown) if shown else ''}\n:::"


def _methods(cls: type) -> list[tuple[str, Any]]:
    members = [(n, m.__func__ if isinstance(m, (classmethod, staticmethod)) else m) for n, m in vars(cls).items()]
    return [
        (n, m)
        for n, m in members
        if (not n.startswith("_") or n == "__call__") and (inspect.isfunction(m) or isinstance(m, property)) and m.__doc__
    ]


def _property(name: str, member: property) -> str:
    kind = f"\n:type: {_type(inspect.get_annotations(member.fget).get('return', _NOTHING))}" if member.fget else ""
    return f":::{{py:property}} {name}{kind if kind.strip() != ':type:' else ''}\n\n{_doc(member)}\n:::"


def _directive(kind: str, name: str, value: Any, body: str) -> str:
    fence = "::::" if kind == "class" else ":::"
    return f"{fence}{{py:{kind}}} {name}{_signature(value)}\n\n{body}\n{fence}"


def _signature(value: Any) -> str:
    # names and defaults only: the types stand in the table
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "()"
    parameters = [p for n, p in signature.parameters.items() if n not in ("self", "cls")]
    shown, starred = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not starred:
            shown.append("*")
        starred = starred or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        mark = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        shown.append(f"{mark}{p.name}" + ("" if p.default is _NOTHING else f"={_short(p.default, 32)}"))
    back = "" if inspect.isclass(value) else _type(signature.return_annotation)
    return f"({', '.join(shown)})" + (f" -> {back}" if back and back != "None" else "")


def _body(value: Any) -> str:
    return "\n\n".join(p for p in (_doc(value), _table(value)) if p)


def _doc(value: Any) -> str:
    text = inspect.cleandoc(value.__doc__ or "")  # its own only: what it inherits is documented where it was written
    if inspect.isclass(value) and text.startswith(f"{value.__name__}("):
        return ""  # what `dataclass` writes when there is no docstring
    return "\n".join("\\" + line if line.startswith(("#", ":::")) else line for line in text.splitlines())


def _table(value: Any) -> str:
    try:
        known = docments(value, full=True)
    except (TypeError, ValueError, OSError, AttributeError):
        return ""
    rows = []
    for name, about in known.items():
        if name in ("return", "self", "cls"):
            continue
        default = "" if about["default"] is _NOTHING else _code(_short(about["default"]))
        rows.append(f"| `{name}` | {_code(_type(about['anno']))} | {default} | {_cell(about['docment'] or '')} |")
    if not rows:
        return ""
    back = (known.get("return") or {}).get("docment")
    table = "\n".join(["| parameter | type | default | meaning |", "|---|---|---|---|", *rows])
    return table + (f"\n\n*Returns:* {_cell(back)}" if back else "")


def _type(annotation: Any) -> str:
    if annotation is _NOTHING or annotation is None:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(typing|collections\.abc|transformers(\.\w+)*|builtins|pathlib|numpy|decodelab(\.\w+)*)\.", "", text)


def _short(value: Any, limit: int = 60) -> str:
    if inspect.isclass(value) or inspect.isroutine(value):
        return value.__name__
    if isinstance(value, Path):
        return f"Path({value.name!r})"  # the folder is the builder's own
    text = " ".join(repr(value).split())
    if " at 0x" in text or text.startswith("<"):
        return f"{type(value).__name__}(...)" if limit > 40 else "..."
    return text if len(text) <= limit else "..." if limit <= 40 else text[: limit - 1] + "…"


def _code(text: str) -> str:
    return f"`` {_cell(text)} ``" if "`" in text else f"`{_cell(text)}`" if text else ""


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
