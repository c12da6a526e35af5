"""Data modules by their names in recipes.

Each is a `LightningDataModule` (`gatewise.data.module.DataModule`) whose constructor arguments are the fields of the
recipe's `data` section. They load on first use, so importing this module imports neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gatewise.errors import unknown_name

if TYPE_CHECKING:
    from gatewise.data.images.base import ImageData
    from gatewise.data.images.digits import Digits
    from gatewise.data.images.fashion import Fashion
    from gatewise.data.images.hf import HuggingFace
    from gatewise.data.images.image_folder import ImageFolder
    from gatewise.data.images.webdataset import WebDataset
    from gatewise.data.module import DataModule
    from gatewise.data.text.mqar import MQAR
    from gatewise.data.text.sequences import SequenceData
    from gatewise.data.text.text import Text

DATA_CLASSES = {
    "digits": "gatewise.data.images.digits:Digits",
    "fashion": "gatewise.data.images.fashion:Fashion",
    "hf": "gatewise.data.images.hf:HuggingFace",
    "image_folder": "gatewise.data.images.image_folder:ImageFolder",
    "mqar": "gatewise.data.text.mqar:MQAR",
    "text": "gatewise.data.text.text:Text",
    "webdataset": "gatewise.data.images.webdataset:WebDataset",
}

_HOME = {
    "DataModule": "gatewise.data.module",
    "ImageData": "gatewise.data.images.base",
    "SequenceData": "gatewise.data.text.sequences",
} | {attribute: module for module, attribute in (place.split(":") for place in DATA_CLASSES.values())}

__all__ = [
    "DATA_CLASSES",
    "MQAR",
    "DataModule",
    "Digits",
    "Fashion",
    "HuggingFace",
    "ImageData",
    "ImageFolder",
    "SequenceData",
    "Text",
    "WebDataset",
    "data_class",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gatewise.data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def data_class(name: str) -> type[DataModule]:
    """Return the data module class of that name.

    Raises:
        UnknownNameError: if there is none. The message suggests the closest names.
    """
    if name not in DATA_CLASSES:
        raise unknown_name("data", name, DATA_CLASSES)
    module, attribute = DATA_CLASSES[name].split(":")
    return getattr(import_module(module), attribute)
