"""The tests; also the run-time type checker that jaxtyping's import hook uses in them."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# As in type annotations everywhere, an int will do where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
