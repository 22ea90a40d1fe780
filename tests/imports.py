"""Who imports whom: the modules of this project and the rooms that they live in, as read from the source."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

from tests.repository import REPOSITORY

PACKAGES = ("wsi", "models", "pipeline", "flows")

Graph = dict[str, set[str]]
"""Name -> the names that it imports."""


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def own_imports(path: Path, modules: set[str]) -> set[str]:
    """Return the modules of this project that a file imports, inside functions and under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module` imports the module; `from module import name` the module it names.
            found |= members & modules or {node.module}
    return found & modules


def import_graph(root: Path = REPOSITORY) -> Graph:
    """Return module -> the project's modules that it imports."""
    files = {module_name(path, root): path for package in PACKAGES for path in (root / package).rglob("*.py")}
    return {name: own_imports(path, set(files)) - {name} for name, path in files.items()}


def circles(graph: Graph) -> list[list[str]]:
    """Return one circle of imports for each module from which an import path leads back to itself."""
    found: list[list[str]] = []
    for start in sorted(graph):
        paths, seen = [[start]], {start}
        while paths:
            path = paths.pop()
            for target in graph[path[-1]]:
                if target == start:
                    found.append([*path, start])
                elif target not in seen:
                    seen.add(target)
                    paths.append([*path, target])
    return found


def room_of(module: str) -> str:
    """Return the folder or file of `pipeline/` that a module lives in ("pipeline.slide"), or its package ("wsi")."""
    package, *rest = module.split(".")
    return f"{package}.{rest[0]}" if package == "pipeline" and rest else package


def room_graph(graph: Graph) -> Graph:
    """Return room -> the other rooms that its modules import. `pipeline/__init__.py` is not a room."""
    rooms: Graph = defaultdict(set)
    for module, targets in graph.items():
        rooms[room_of(module)] |= {room_of(target) for target in targets}
    rooms.pop("pipeline", None)
    return {room: targets - {room, "pipeline"} for room, targets in sorted(rooms.items())}


def without_shortcuts(graph: Graph) -> Graph:
    """Return the graph without the edges that a longer path replaces (its transitive reduction).

    The graph must not contain a circle.
    """
    reach = {name: reachable(graph, name) for name in graph}
    return {
        name: {target for target in targets if not any(target in reach[other] for other in targets - {target})}
        for name, targets in graph.items()
    }


def reachable(graph: Graph, start: str) -> set[str]:
    """Return every name that a path of one or more edges leads to from `start`."""
    found: set[str] = set()
    left = [start]
    while left:
        left += (news := graph[left.pop()] - found)
        found |= news
    return found
