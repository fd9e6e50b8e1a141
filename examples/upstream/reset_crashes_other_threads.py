"""`torch._dynamo.reset()` in one thread can crash the process while other threads call compiled code.

Dynamo releases the GIL while it evaluates guards, without holding a reference to them, and a reset frees them.

Expected: the other threads recompile. Seen on 2.13.0, CPU; it takes seconds to minutes.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import torch

SECONDS = 60


def main() -> None:
    sys.setswitchinterval(1e-5)
    fn = torch.compile(lambda x: x.sin() + 1, backend="eager", dynamic=False)
    shapes = [torch.ones(n) for n in (2, 3, 4, 5)]
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            for x in shapes:
                fn(x)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        torch._dynamo.reset()
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    if "--child" in sys.argv:
        main()
        sys.exit()
    child = subprocess.run([sys.executable, __file__, "--child"], capture_output=True, text=True, check=False)  # noqa: S603  # this file
    if child.returncode < 0:
        print(f"the process died of signal {-child.returncode}")
        sys.exit()
    print("not reproduced", child.stderr[-300:])
    sys.exit(1)
