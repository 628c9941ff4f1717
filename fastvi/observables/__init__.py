"""What draws of q or of the posterior are used for."""
