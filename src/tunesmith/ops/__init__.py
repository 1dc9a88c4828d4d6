"""The only door to kernels: one op a file, its `reference` first, a fast path beside it that must equal it."""
