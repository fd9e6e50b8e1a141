"""Compiling one decorated function: admission of attempts, the attempts themselves, and their outcomes."""
