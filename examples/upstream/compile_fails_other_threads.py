"""A first compile by Inductor can make calls of an `nn.Module` in other threads raise.

For the first code that it generates in a process, Inductor traces a function with `torch.fx.symbolic_trace`, which
replaces `nn.Module.__call__` for all threads.

Expected: tracing affects only calls in its own thread. Seen on 2.13.0, CPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading

import torch


def main() -> bool:
    sys.setswitchinterval(1e-5)
    module = torch.nn.Linear(2, 2)
    done = threading.Event()
    errors: list[Exception] = []

    def call() -> None:
        try:
            while not done.is_set():
                module(torch.ones(2))
        except Exception as exc:
            errors.append(exc)

    thread = threading.Thread(target=call)
    thread.start()
    with tempfile.TemporaryDirectory() as cache:  # code found in the cache is not generated
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2))
        done.set()
        thread.join()
    print(f"calling a module in another thread raised {errors}")
    return bool(errors)


if __name__ == "__main__":
    if not main():
        print("not reproduced")
        sys.exit(1)
