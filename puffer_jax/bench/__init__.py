"""`puffer-jax bench`: how fast it is beside torch, on this machine."""
