"""What is refused is refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from refold.errors import InputError


@contextmanager
def refused(*fragments: str) -> Iterator[None]:
    """The code below raises one printable sentence, which says all ``fragments``."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    for fragment in fragments:
        assert fragment in message
