"""Reading the gates of a network: what each lets through, as numbers and as pictures."""

from __future__ import annotations

from gatewise.gates.capture import Reading, capture
from gatewise.gates.draw import draw

__all__ = ["Reading", "capture", "draw"]
