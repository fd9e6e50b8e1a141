"""Every use of non-public PyTorch, each with its reason, since when it exists, and what happens without it."""
