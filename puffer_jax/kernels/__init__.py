"""One operation a file, and who computes it: a CPU kernel or XLA."""
