"""Problems whose local learning coefficient is known, and how well: see `problems.py` and `reference.py`."""
