"""What needs no JAX: spaces, texts, files, time, optional packages."""
