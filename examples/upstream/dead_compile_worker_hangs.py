"""A pool of compile workers whose process was killed accepts jobs and never answers them.

The parent keeps its own copies of the child's ends of both pipes open, so it sees neither an end of file nor a broken
pipe, and nothing checks whether the process is alive. A compile that waits for such a job hangs forever.

Expected: an error, and a new pool. Seen on 2.13.0, CPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import TimeoutError as FutureTimeoutError

from torch._inductor.compile_worker.subproc_pool import SubprocPool

SECONDS = 20


def main() -> bool:
    pool = SubprocPool(1)
    try:
        print("alive:", pool.submit(abs, -1).result(timeout=120))
        pool.process.kill()  # as by the out-of-memory killer
        pool.process.wait()
        try:
            answer = pool.submit(abs, -1).result(timeout=SECONDS)
        except FutureTimeoutError:
            print(f"killed: no answer in {SECONDS} s, and pool.running is {pool.running}")
            return bool(pool.running)
        print("killed:", answer)
    except RuntimeError as error:
        print("killed:", error)
    finally:
        pool.shutdown()
    return False


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
        reproduced = main()
    if not reproduced:
        print("not reproduced")
    sys.exit(not reproduced)
