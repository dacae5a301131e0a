"""Which part may import which: cli -> workflows -> methods, formats, runtime -> core -> errors."""

import ast
from pathlib import Path

import pytest

import quantkit

ROOT = Path(quantkit.__file__).parent
MAY_IMPORT = {
    "cli": {"workflows", "core", "errors"},
    "workflows": {"methods", "formats", "runtime", "serve", "core", "data", "errors"},
    "serve": {"formats", "runtime", "core", "data", "errors"},
    "runtime": {"formats", "core", "errors"},
    "methods": {"core", "errors"},
    "formats": {"core", "errors"},
    "core": {"data", "errors"},
    "data": set(),
    "errors": set(),
}
# libraries that only these parts know
ONLY_IN = {
    "click": {"cli"},
    "rich": {"cli"},
    "transformers": {"runtime", "workflows"},
    "safetensors": {"core"},
    "huggingface_hub": {"core"},
    "datasets": {"core"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "uvicorn": {"serve", "workflows"},
    "httpx2": {"core", "serve"},
    "numba": {"runtime"},
    "llvmlite": {"runtime"},
}


def imported(file: Path) -> set[str]:
    """Full names of what a file imports anywhere, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


DOORS = (ROOT / "__init__.py", ROOT / "__main__.py")
FILES = [file for file in sorted(ROOT.rglob("*.py")) if file not in DOORS]


def test_every_part_has_its_rule():
    assert {part_of(file) for file in FILES} == MAY_IMPORT.keys()
    assert len(FILES) > 40


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_arrows(file):
    part = part_of(file)
    for name in imported(file):
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package == "quantkit" and other != "__version__":
            assert other in MAY_IMPORT[part] | {part}, f"{part} must not import {other}"
        assert part in ONLY_IN.get(package, {part}), f"{part} must not import {package}"
