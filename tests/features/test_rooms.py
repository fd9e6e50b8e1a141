"""Private PyTorch is used in one room only. `make lint` checks the imports between rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import compile_retry

SOURCE = Path(compile_retry.__file__).parent


def private_torch(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names below torch that have a private part, whether imported or used."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            first, *parts = name.split(".")
            if first == "torch" and any(part.startswith("_") and not part.startswith("__") for part in parts):
                yield name


def test_private_torch_is_used_in_its_room_only() -> None:
    """Private PyTorch is used in one folder only, so a rename in a new version affects only that folder."""
    outside = [path for path in SOURCE.rglob("*.py") if "_torch" not in path.relative_to(SOURCE).parts]
    assert len(outside) > 30
    used = {str(path.relative_to(SOURCE)): list(private_torch(ast.parse(path.read_text()))) for path in outside}
    assert {path: names for path, names in used.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo",
        "from torch._C import _functions",
        "from torch import _inductor",
        "def f():\n    torch._C._get_default_device()",
        "from torch.utils._triton import has_triton",
    ],
)
def test_private_torch_is_found(code: str) -> None:
    """The check finds imports and attributes."""
    assert list(private_torch(ast.parse(code)))
