"""The checks behind ``python -m compile_retry doctor``."""
