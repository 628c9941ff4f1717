"""A whole step of the mixture, defined. The one implementation is the loop's, `fastvi.inference.loop.run_steps`."""
