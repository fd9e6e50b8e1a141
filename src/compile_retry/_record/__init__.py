"""The history of each function: its events, and samples of its calls."""
