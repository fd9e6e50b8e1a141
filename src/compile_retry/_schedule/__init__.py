"""The retry schedule: the policy and the breaker. Independent of torch and of decorated functions."""
