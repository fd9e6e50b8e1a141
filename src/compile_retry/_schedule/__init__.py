"""When to try again. Knows the policy and the clock, and neither torch nor functions."""
