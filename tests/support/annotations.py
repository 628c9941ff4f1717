"""The check of annotations in the tests.

By beartype, and an int is a float, as it is to type checkers.
"""

from beartype import BeartypeConf, beartype

hold = beartype(conf=BeartypeConf(is_pep484_tower=True))
