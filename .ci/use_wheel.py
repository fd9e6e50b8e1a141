"""Use the installed package once, where nothing but the package and its dependencies is installed."""

import re
import subprocess
import sys
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import torch

import compile_retry


@compile_retry.compile_with_fallback(backend="eager")
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


result = double(torch.ones(2))

assert result.tolist() == [2.0, 2.0]
assert double.state is compile_retry.CompileState.COMPILED, double.state
assert files("compile_retry").joinpath("py.typed").is_file()
relative = re.findall(r"\]\((?!https://)\S+", metadata.metadata("compile-retry")["Description"])
assert not relative, relative  # they lead nowhere on a package index
assert "site-packages" in compile_retry.__file__, compile_retry.__file__
subprocess.run([sys.executable, "-m", "compile_retry", "--version"], check=True)
subprocess.run([Path(sys.executable).with_name("compile-retry"), "--version"], check=True)
print("compiled by", compile_retry.__file__)
