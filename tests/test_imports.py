"""Who may import whom. Imports within functions and for type checkers count, too: a circle there is a circle."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("fot", "memory", "training")

# The one lazy arrow upwards: the command that trains loads what trains when it is called.
LAZY = {("fot.commands.train", "training")}


def modules() -> dict[str, Path]:
    """Name -> file of every module of the three packages."""
    found = {}
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@functools.cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text("utf-8"))


def imported(tree: ast.AST) -> set[str]:
    """Names of all modules that a piece of code imports, whoever they are of."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            assert node.module
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            own = names & set(MODULES)
            found |= own if len(own) == len(names) else own | {node.module}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach one another."""

    def reached(start: str) -> set[str]:
        seen, left = set(), [start]
        while left:
            new = graph[left.pop()] - seen
            seen |= new
            left += new
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in graph}
    return [list(group) for group in sorted(groups) if group]


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]


def test_imports_are_found_wherever_they_are() -> None:
    code = """
import memory.disk
from fot import model
from memory import Memory
if TYPE_CHECKING:
    from fot.cache import FoTCache
def late():
    from memory.store import Memory
"""
    assert imported(ast.parse(code)) == {"memory.disk", "fot.model", "memory", "fot.cache", "memory.store"}


# Circles that are left, and why: to go, never to grow.
KNOWN = [
    # FoTForCausalLM.from_pretrained, which loads, is a method of the class that loaded models get.
    ["fot.loading", "fot.longllama", "fot.model"],
]


def test_no_circles() -> None:
    graph = {name: imported(tree_of(name)) & set(MODULES) - {name} for name in MODULES}
    assert circles(graph) == KNOWN


def upward(name: str) -> Iterator[str]:
    """Imports of a module that go up."""
    forbidden = {
        "memory": ("fot", "training", "transformers", "datasets", "accelerate"),
        "fot": ("training",),
        "training": (),
    }
    for other in sorted(imported(tree_of(name))):
        top = other.split(".")[0]
        if top in forbidden[name.split(".")[0]] and (name, top) not in LAZY:
            yield other


@pytest.mark.parametrize("package", PACKAGES)
def test_no_arrow_goes_up(package: str) -> None:
    names = [name for name in MODULES if name.split(".")[0] == package]
    assert names
    assert {name: list(upward(name)) for name in names if list(upward(name))} == {}


def test_lazy_arrows_are_lazy() -> None:
    for name, top in LAZY:
        at_once = {
            other for node in tree_of(name).body if not isinstance(node, ast.FunctionDef) for other in imported(node)
        }
        assert not {other for other in at_once if other.split(".")[0] == top}
        assert any(other.split(".")[0] == top for other in imported(tree_of(name))), "an exception that is none"


def own_names(tree: ast.AST) -> set[str]:
    """Functions that a module defines, and attributes that it sets."""
    nodes = list(ast.walk(tree))
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return functions | {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }


def private(name: str) -> list[str]:
    """Names with an underscore that a module takes from another, or reads of an object that is not its own."""
    found, own = [], own_names(tree_of(name))
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            found += [ast.unparse(node)] if ast.unparse(node.value) not in ("self", "cls") else []
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_of_memory() -> set[str]:
    """What memory's classes keep to themselves."""
    trees = [tree_of(name) for name in MODULES if name.split(".")[0] == "memory"]
    return {name for tree in trees for name in own_names(tree) if is_private(name)}


def test_memory_keeps_its_private_names() -> None:
    """No module of memory reaches into another's private attributes, nor does anybody outside."""
    theirs = names_of_memory()
    assert "_content" in theirs
    found = {name: [one for one in private(name) if one.split(".")[-1] in theirs] for name in MODULES}
    assert {name: reached for name, reached in found.items() if reached} == {}
