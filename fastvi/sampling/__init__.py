"""The sampler: Langevin walkers that begin at draws of q."""
