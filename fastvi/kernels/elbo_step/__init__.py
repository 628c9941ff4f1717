"""A whole step of the mixture, defined.

The one implementation is the loop's, `fastvi.fitting.step.run_steps`.
"""
