"""The checker of annotations that tests run under: beartype, which takes an int for a float as every checker does."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
