"""The call path's other half: may a frame be compiled now, how is that attempted, and what follows from the outcome."""
