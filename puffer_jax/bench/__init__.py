"""`puffer-jax bench`: how much faster than torch is it here?"""
