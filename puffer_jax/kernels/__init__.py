"""Our own CPU kernels; their C++ sources are in `cc`."""
