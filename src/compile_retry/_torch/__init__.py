"""All uses of private PyTorch APIs, each with its reason, its first PyTorch version, and what happens without it.

Written against torch 2.13 and checked on 2.10 and 2.14. `frames`, `cache_entries`, `functions` and `compilers` import
``torch._dynamo``, so they are not imported before the first attempt.
"""

import torch

if torch.__version__ < "2.10":  # compares as a version
    raise ImportError(f"compile_retry requires torch 2.10 or later, this is {torch.__version__}")
