"""`torch.compile` removes keys from the caller's `options`.

"guard_filter_fn" and "use_aoti" are popped from the dict itself. A second `torch.compile` with the same options
silently lacks them.

Expected: the dict is unchanged. Seen on 2.13.0, CPU.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


def main() -> bool:
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe, "epilogue_fusion": True}
    before = sorted(options)
    torch.compile(torch.sin, options=options)
    print(f"options before: {before}, after: {sorted(options)}")
    return sorted(options) != before


if __name__ == "__main__":
    if not main():
        print("not reproduced")
        sys.exit(1)
