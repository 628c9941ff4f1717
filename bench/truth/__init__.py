"""Problems whose local learning coefficient is known, and how well.

See `problems.py` and `reference.py`.
"""
