"""Complete runs on a laptop: a trained classifier, and a target whose answer is known exactly."""

from fastvi.demos.digits import DigitsDemo
from fastvi.demos.quadratic import QuadraticDemo

DEMOS = {"digits": DigitsDemo, "quadratic": QuadraticDemo}
