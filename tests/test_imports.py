"""The reading order of the package: a module imports only those above it."""

import ast
import re
from pathlib import Path

import instructjax

PACKAGE = Path(instructjax.__file__).parent
TOOLS = ["miniature", "preflight"]


def imported(file: Path) -> set[str]:
    """Top-level modules of the package that a file imports when it is imported itself."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("instructjax"):
            _, _, module = node.module.partition(".")
            names |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
    return names


def test_scripts_read_data_as_the_model_does():
    """By `pretrained.reader`, which binds the model's ends of a response and its vocabulary."""
    for file in (PACKAGE.parent / "experiments").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "instructjax.data":
                assert "load" not in {alias.name for alias in node.names}, file


def test_a_module_imports_only_those_above_it_in_the_reading_order():
    order = re.findall(r"^    (\w+)(?:\.py|/) ", instructjax.__doc__, re.MULTILINE)
    there = {path.stem for path in PACKAGE.iterdir() if path.name[0] not in "_."}
    assert sorted(order) == sorted(there)
    assert order[-2:] == TOOLS
    for module in order[:-2]:
        path = PACKAGE / module
        files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
        above = {*order[: order.index(module) + 1]}
        if module == "evaluation":
            above |= {"miniature", "preflight"}  # its gold judge; peak rates of chips
        assert set().union(*map(imported, files)) <= above, module
