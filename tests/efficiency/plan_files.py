"""Saved plans taken apart and put together again, with checksums that agree."""

from __future__ import annotations

import hashlib
import json
import zipfile


def members(path):
    """The content of each member."""
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def write(path, content):
    """Write members under the checksums that they have, as an author of files would."""
    content = {name: data if isinstance(data, bytes) else data.encode() for name, data in content.items()}
    header = json.loads(content["plan.json"])
    header["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in content.items() if name != "plan.json"}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in (content | {"plan.json": json.dumps(header)}).items():
            file.writestr(name, data)


def change(path, name, edit):
    """Rewrite one member of a saved plan."""
    content = members(path)
    write(path, content | {name: edit(content[name])})


def set_field(data, *keys, value):
    """JSON with one field changed."""
    header = json.loads(data)
    inner = header
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return json.dumps(header)
