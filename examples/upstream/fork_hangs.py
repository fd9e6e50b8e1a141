"""A forked child that compiles hangs if its parent has compiled C++ kernels before.

`AsyncCompile.pool()` is a thread pool. The child inherits its count of idle threads but not the threads, so a kernel
submitted to it is never compiled. The process pool has a fork handler; this pool has none.

Expected: the child creates a new pool. Seen on 2.13.0, CPU.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time

import torch
from torch import Tensor


def sine(x: Tensor) -> Tensor:
    return x.sin() + 1


def cosine(x: Tensor) -> Tensor:
    return x.cos() + 1


def exponential(x: Tensor) -> Tensor:
    return x.exp() + 1


def main() -> bool:
    x = torch.ones(64)
    for fn in (sine, cosine):
        start = time.monotonic()
        torch.compile(fn)(x)
        usual = time.monotonic() - start
    patience = max(30, 4 * usual)
    child = multiprocessing.get_context("fork").Process(target=torch.compile(exponential), args=(x,))
    child.start()
    child.join(patience)
    if child.is_alive():
        child.kill()
        child.join()
        print(f"a kernel took the parent {usual:.1f} s; the forked child had not compiled one after {patience:.0f} s")
        return True
    print(f"the child exited with {child.exitcode}")
    return False


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
        os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
        reproduced = main()
    if not reproduced:
        print("not reproduced")
    sys.exit(not reproduced)
