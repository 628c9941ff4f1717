"""What people call: estimates, fits, curves, and the checks of what they pass."""
