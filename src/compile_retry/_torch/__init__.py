"""Every use of non-public PyTorch, each with its reason, since when it exists, and what happens without it.

Written against torch 2.13 and checked on 2.10 and 2.14. `frames`, `cache_entries`, `functions` and `compilers` import
``torch._dynamo``, so they are imported at the first attempt and not before.
"""
