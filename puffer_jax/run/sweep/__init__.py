"""Searching hyper-parameters: the space, the study that remembers, populations in JAX."""
