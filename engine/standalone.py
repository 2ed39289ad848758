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
    defined: dict[str, list[ast.stmt]] = field(default_factory=dict)  # by all of these
    external: dict[str, list[str]] = field(default_factory=dict)  # name -> its import statements
    own: dict[str, tuple[Path, str | None]] = field(default_factory=dict)  # None: a whole module


def source_file(module: str) -> Path | None:
    """The file of a module of this repository, None for others."""
    path = ROOT / (module.replace(".", "/") + ".py")
    return path if path.is_file() else None


def names_bound(node: ast.stmt) -> set[str]:
    """The names that a statement gives a value, an attribute or an item, and those inside it."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    names = set()
    for part in ast.walk(node):
        if isinstance(getattr(part, "ctx", None), ast.Store):
            while isinstance(part, ast.Attribute | ast.Subscript):
                part = part.value
            names.add(getattr(part, "id", None))
        elif isinstance(part, ast.FunctionDef | ast.ClassDef):
            names.add(part.name)
        elif isinstance(part, ast.alias):
            names.add(part.asname or part.name.partition(".")[0])
    return names


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
                    name = alias.asname or alias.name.partition(".")[0]
                    statement = f"{start}import {alias.name}{renamed}"
                    module.external.setdefault(name, []).append(statement)
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            module.body.append(node)
            for name in names_bound(node):
                module.defined.setdefault(name, []).append(node)
    return module


def check(path: Path, node: ast.stmt) -> None:
    """Raises ValueError for what would mean something else, or nothing, in another file."""
    modules = {name for name, (_, member) in read(path).own.items() if member is None}
    for part in ast.walk(node):
        place, local = f"line {getattr(part, 'lineno', 0)} of {path}", getattr(part, "arg", None)
        if isinstance(part, ast.Import | ast.ImportFrom):
            origins = [getattr(part, "module", None), *(alias.name for alias in part.names)]
            origins += [f"{origins[0]}.{name}" for name in origins[1:]]
            if any(map(source_file, filter(None, origins))):
                raise ValueError(f"{place} imports a module of this repository inside a function")
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            local = part.id
        if local in modules and not isinstance(part, ast.keyword):
            raise ValueError(f"{local} in {place} names a module too; rename it")


def standalone(path: Path) -> str:
    """The text of a file that does what the module at `path` does. Raises ValueError if two
    definitions that it needs have the same name, and for imports that it can't resolve."""
    imports, parts = set(), []
    added, homes = [], {}  # statements; name -> the file that defines it

    def refer(path: Path, name: str) -> None:
        """Add what a name means in the module at `path`, unless it is local or Python's own."""
        module = read(path)
        if name in module.external:
            for statement in module.external[name]:
                if source_file(statement.removeprefix("import ")):
                    raise ValueError(f"{path} says {statement}; write  from ... import ...")
                imports.add(statement)
        elif name in module.own and module.own[name][1]:
            refer(*module.own[name])
        elif name in module.defined:
            if homes.setdefault(name, path) != path:
                raise ValueError(f"{name} is defined in both {homes[name]} and {path}")
            for node in module.defined[name]:
                add(path, node)

    def add(path: Path, node: ast.stmt) -> None:
        """Add a statement of the module at `path`, after what it refers to."""
        if node in added:
            return
        added.append(node)
        check(path, node)
        module, bound = read(path), names_bound(node)
        cuts = []  # (line, start, end) of each `module.` before a name
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id not in bound:
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
