"""If memory is full during autotuning, the operation can never be compiled again, even after memory is free.

A choice that fails is timed as infinite, and the result is written to the cache file like a measurement. If all choices
have infinite times, every later compile, in every process that shares the cache, raises NoValidChoicesError without
trying any.

Expected: failures are not stored, at least not if all choices fail. Seen on 2.13.0, CPU.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch


def main(folder: str) -> bool:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
    from torch._inductor import config
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    logging.disable()
    module = torch.nn.Linear(64, 64).eval()
    measure, tried = AlgorithmSelectorCache.benchmark_choice, 0

    def compiles(when: str, *, memory: bool) -> bool:
        nonlocal tried
        tried = 0

        def benchmark_choice(*args: Any) -> float:
            nonlocal tried
            tried += 1
            if not memory:
                raise torch.OutOfMemoryError("out of memory")
            return measure(*args)

        torch._dynamo.reset()
        try:
            with torch.no_grad(), mock.patch.object(AlgorithmSelectorCache, "benchmark_choice", benchmark_choice):
                torch.compile(module)(torch.randn(32, 64))
        except torch._dynamo.exc.BackendCompilerFailed as error:
            outcome = f"{error.inner_exception}".partition(":")[0]
        else:
            outcome = "compiled"
        stored = sum(path.read_text().count("Infinity") for path in Path(folder).glob("cache/*"))
        print(f"{when}: {outcome}; choices tried: {tried}; infinite times stored: {stored}")
        return outcome == "compiled"

    with config.patch(max_autotune=True, freezing=True):
        first = compiles("memory full", memory=False)
        second = compiles("memory free", memory=True)
    return not first and not second


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        reproduced = main(directory)
    if not reproduced:
        print("not reproduced")
    sys.exit(not reproduced)
