"""House rules that a parser can check; a failure lists file:line of each breach."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from ruff import find_ruff_bin

ROOT = Path(__file__).resolve().parent.parent
ALL = ("vilex", "app", "train", "benchmarks", "tests")
MAX_LINES = 60  # of one function
# An invented user's home is allowed: tests of what must not leak need one.
LOCAL_PATH = re.compile(r"(?<![\w.}])/(?:home/(?!me\b)|root/|work/|mnt/|Users/)\w")


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def files(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def nodes(*packages: str) -> Iterator[tuple[str, ast.AST]]:
    """(file:line, node) of all code of some packages."""
    for path in files(*packages):
        for node in ast.walk(parse(path)):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def public(body: list[ast.stmt]) -> list:
    """Functions and classes to document, less properties, whose name and type may say it all."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    found = [node for node in body if isinstance(node, kinds) and not node.name.startswith("_")]
    found = [node for node in found if "property" not in " ".join(map(ast.unparse, node.decorator_list))]
    found = [node for node in found if ast.unparse(node.body[-1]) != "..."]  # what a Protocol asks for
    return found + [inner for node in found if isinstance(node, ast.ClassDef) for inner in public(node.body)]


def names_of(node: ast.AST) -> list[str]:
    """Names that a node gives or uses."""
    fields = (getattr(node, field, None) for field in ("id", "arg", "attr", "name"))
    return [name for name in fields if isinstance(name, str)]


def test_there_is_something_to_check():
    assert len(files("vilex")) >= 17
    assert len(files("train")) >= 8


def test_vilex_never_prints():
    calls = [(where, node.func) for where, node in nodes("vilex") if isinstance(node, ast.Call)]
    assert not [where for where, function in calls if isinstance(function, ast.Name) and function.id == "print"]


def test_vilex_stands_alone():
    refused = {"gradio", "accelerate", "tqdm", "app", "train"}
    imports = [(where, node) for where, node in nodes("vilex") if isinstance(node, ast.Import | ast.ImportFrom)]
    for where, node in imports:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        assert not {module.split(".")[0] for module in modules} & refused, where


def test_what_is_public_has_a_docstring():
    bare = [path.name for path in files("vilex", "train", "app") if not ast.get_docstring(parse(path))]
    overrides = {"forward", "rules"}  # the base class says what they do
    for path in files("vilex", "train"):
        undocumented = {node.name for node in public(parse(path).body) if not ast.get_docstring(node)}
        bare += [f"{path.name}: {name}" for name in undocumented - overrides]
    assert not bare


def test_no_bare_except():
    assert not [where for where, node in nodes(*ALL) if isinstance(node, ast.ExceptHandler) and node.type is None]


def test_settings_are_called_config():
    assert not [where for where, node in nodes(*ALL) if "cfg" in names_of(node)]


def test_functions_are_short():
    functions = [(w, n) for w, n in nodes(*ALL) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert len(functions) > 100
    assert not [where for where, node in functions if node.end_lineno - node.lineno >= MAX_LINES]


def test_no_paths_of_one_machine():
    for path in [*files(*ALL), *ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile"]:
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert path == Path(__file__) or not LOCAL_PATH.search(line), f"{path.relative_to(ROOT)}:{i}"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(command):
    done = subprocess.run([find_ruff_bin(), *command, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
