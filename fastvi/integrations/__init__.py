"""Other packages and fastvi: one optional package per file, nothing else depends on them."""
