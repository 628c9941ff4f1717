"""What is sampled: the loss that a person wrote, and what it must obey."""
