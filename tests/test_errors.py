"""One error base for the project, and the error trees that the `errors.py` files draw."""

from __future__ import annotations

import ast
import inspect
import re
from types import ModuleType

import pytest

import models.errors
import pipeline.errors
import wsi.errors
from tests.repository import REPOSITORY
from wsi.errors import WsiSegmentError

MODULES = (wsi.errors, models.errors, pipeline.errors)
BASES = {"WsiSegmentError", "SlideError", "ModelError", "PipelineError"}


def source_trees() -> list[ast.Module]:
    files = [
        path for package in ("wsi", "models", "pipeline", "flows") for path in (REPOSITORY / package).rglob("*.py")
    ]
    return [ast.parse(path.read_text(encoding="utf-8")) for path in files if path.name != "errors.py"]


def error_classes(module: ModuleType) -> dict[str, type]:
    """Return the error classes that a module defines, by name."""
    classes = {name: one for name, one in vars(module).items() if inspect.isclass(one) and issubclass(one, Exception)}
    return {name: item for name, item in classes.items() if item.__module__ == module.__name__}


def drawn_tree(module: ModuleType) -> dict[str, str]:
    """Return class -> base class, as drawn at the top of a module."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for indent, name in re.findall(r"^([│ ├└─]*)([A-Z]\w+)  ", module.__doc__ or "", re.MULTILINE):
        del path[len(indent) // 4 :]
        if path:
            parents[name] = path[-1]
        path.append(name)
    return parents


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_drawn_tree_matches_the_classes(module: ModuleType) -> None:
    drawn = drawn_tree(module)
    defined = {name: item.__base__.__name__ for name, item in error_classes(module).items() if item.__base__}
    if module is wsi.errors:
        assert drawn.pop("ModelError") == drawn.pop("PipelineError") == "WsiSegmentError"
        assert defined.pop("WsiSegmentError") == "Exception"
    assert drawn == defined


def test_every_error_has_the_one_base() -> None:
    assert all(issubclass(item, WsiSegmentError) for module in MODULES for item in error_classes(module).values())


def test_every_leaf_error_is_raised_somewhere() -> None:
    called = {
        node.func.value.id if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) else name
        for tree in source_trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for name in [node.func.id if isinstance(node.func, ast.Name) else ""]
    }
    classes = {name: item for module in MODULES for name, item in error_classes(module).items()}
    leaves = {name for name, item in classes.items() if not item.__subclasses__()}
    assert leaves - called == set()


def test_no_except_clause_lists_two_of_the_base_errors() -> None:
    tuples = [node for tree in source_trees() for node in ast.walk(tree) if isinstance(node, ast.Tuple)]
    names = [{item.id for item in node.elts if isinstance(item, ast.Name)} for node in tuples]
    assert [listed for listed in names if len(listed & BASES) > 1] == []
