"""What all tests share."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import torch

from gatewise.efficiency.quantization.prepare import saturates_products

# Nothing is fetched in a test, and no test depends on what another machine would send.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

FINGERPRINTS = Path(__file__).parent / "fingerprints"


def declared(kind: str, name: str) -> dict:
    """The dictionaries that the tests of single networks declare under this name, as one; nothing is imported.

    So a new network brings its entries with its own tests.
    """
    found: dict = {}
    for path in sorted((Path(__file__).parent / "networks" / kind).glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = isinstance(node, ast.Assign) and any(getattr(target, "id", None) == name for target in node.targets)
            if named and isinstance(node.value, ast.Dict):
                entries = ast.literal_eval(node.value)
                if clash := found.keys() & entries.keys():
                    raise ValueError(f"{path.name} declares {name} again for {', '.join(sorted(clash))}")
                found |= entries
    return found


SMALL = declared("image", "SMALL")
"""One small network of each family of image networks: a registered name and overrides.

What stands behind a plus sign in the name tells entries of one family apart.
"""

SMALL_SEQUENCES = declared("sequence", "SMALL")
"""The same for language models."""


needs_eight_bit_products = pytest.mark.skipif(
    saturates_products(),
    reason="without VNNI instructions weights have codes of 7 bits, which the 8-bit simulation does not have",
)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def small_model(name: str, **overrides):
    """The small network of a family, in eval mode, with every parameter moved away from its initial value."""
    import gatewise

    return _moved(gatewise.create_model(name.partition("+")[0], **{**SMALL[name], **overrides}))


def small_language_model(name: str, **overrides):
    """The small language model of an entry of SMALL_SEQUENCES, as `small_model`."""
    import gatewise

    return _moved(gatewise.create_model(name.partition("+")[0], **{**SMALL_SEQUENCES[name], **overrides}))


def _moved(model):
    model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif key.endswith("running_var"):
                buffer.copy_(1 + torch.rand(buffer.shape, generator=generator))
    return model
