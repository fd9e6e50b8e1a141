"""What a function remembers and tells: events, log lines, samples of its calls."""
