"""
A module's source, with all that it imports from this repository written into it.

export.py needs this: a model that others load must bring its formulas along, and each of them is
written down once, in model.py, kernels/ or engine/.
"""

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from configurator import ROOT


@dataclass
class Module:
    """A source file of this repository, and what the names at its top level mean."""

    lines: list[bytes]  # ast counts columns in bytes
    docstring: str
    body: list[ast.stmt] = field(default_factory=list)  # all but the docstring and the imports
    defined: dict[str, ast.stmt] = field(default_factory=dict)
    external: dict[str, str] = field(default_factory=dict)  # name -> its import statement
    own: dict[str, tuple[Path, str | None]] = field(default_factory=dict)  # None: a whole module


def source_file(module: str) -> Path | None:
    """The file of a module of this repository, None for others."""
    path = ROOT / (module.replace(".", "/") + ".py")
    return path if path.is_file() else None


@cache
def read(path: Path) -> Module:
    source = path.read_bytes()
    tree = ast.parse(source)
    module = Module(source.split(b"\n"), ast.get_docstring(tree, clean=False) or "")
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = getattr(node, "module", None)
            for alias in node.names:
                name = alias.asname or alias.name
                if origin and (file := source_file(f"{origin}.{alias.name}")):
                    module.own[name] = (file, None)
                elif origin and (file := source_file(origin)):
                    if alias.asname:
                        raise ValueError(f"{path} gives {alias.name} another name, {name}")
                    module.own[name] = (file, alias.name)
                else:
                    start = f"from {origin} " if origin else ""
                    renamed = f" as {alias.asname}" if alias.asname else ""
                    module.external[name] = f"{start}import {alias.name}{renamed}"
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            module.body.append(node)
            targets = getattr(node, "targets", [getattr(node, "target", node)])
            for name in (
                getattr(target, "id", getattr(target, "name", None)) for target in targets
            ):
                module.defined[name] = node
    return module


def standalone(path: Path) -> str:
    """The text of a file that does what the module at `path` does. Raises ValueError if two
    definitions that it needs have the same name."""
    imports, parts = set(), []
    added, homes = [], {}  # statements; name -> the file that defines it

    def refer(path: Path, name: str) -> None:
        """Add what a name means in the module at `path`, unless it is local or Python's own."""
        module = read(path)
        if name in module.external:
            imports.add(module.external[name])
        elif name in module.own and module.own[name][1]:
            refer(*module.own[name])
        elif name in module.defined:
            if homes.setdefault(name, path) != path:
                raise ValueError(f"{name} is defined in both {homes[name]} and {path}")
            add(path, module.defined[name])

    def add(path: Path, node: ast.stmt) -> None:
        """Add a statement of the module at `path`, after what it refers to."""
        if node in added:
            return
        added.append(node)
        module, cuts = read(path), []  # (line, start, end) of each `module.` before a name
        for part in ast.walk(node):
            if isinstance(part, ast.Name):
                refer(path, part.id)
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                before = part.value
                file, member = module.own.get(before.id, (None, None))
                if file and member is None:
                    refer(file, part.attr)
                    cuts.append((before.lineno, before.col_offset, before.end_col_offset + 1))
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        lines = module.lines[first - 1 : node.end_lineno]
        for line, start, end in sorted(cuts, reverse=True):
            lines[line - first] = lines[line - first][:start] + lines[line - first][end:]
        parts.append(b"\n".join(lines).decode())

    for node in read(path).body:
        add(path, node)
    header = f'"""{read(path).docstring}"""\n\n' + "\n".join(sorted(imports))
    return "\n\n\n".join([header, *parts]) + "\n"
