"""Files made to run code or to reach other files, in every place where a reader might follow them."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.stress.kinds.base import Case, Kind, tiny_model
from tests.stress.kinds.shipping import Plans, example, with_matching_digests
from tests.stress.worker import Wrong


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self._command,)


class Malicious(Kind):
    """Files that try to run code."""

    name = "malicious"
    weight = 3.0

    @classmethod
    def prepare(cls, folder: Path) -> None:
        Plans.prepare(folder)

    def case(self, rng: random.Random, folder: Path) -> Case:
        makers: tuple[Callable[[random.Random, Path, str], tuple[str, Callable[[], Any]]], ...] = (
            self._pickle,
            self._numpy,
            self._torchscript,
            self._shard,
            self._recipe,
            self._plan_member,
            self._plan_call,
            self._parquet,
            self._tokenizer,
        )
        what, read = rng.choice(makers)(rng, folder, f"touch {folder / 'RAN'}")

        def checked() -> str:
            read()
            if (folder / "RAN").exists():
                raise Wrong("the payload ran")
            return "changed"

        return Case(what, checked)

    def _pickle(self, rng: random.Random, folder: Path, command: str) -> tuple[str, Callable[[], Any]]:
        import torch

        state: dict[str, Any] = dict(tiny_model().state_dict())
        place = rng.choice(("top", "model", "gatewise", "key", "legacy", "raw"))
        path = folder / rng.choice(("x.pth", "x.pt", "x.ckpt", "x.bin", "x.npz", "x.safetensors"))
        if place == "raw":
            path.write_bytes(pickle.dumps(Payload(command)))
        elif place == "legacy":
            torch.save({**state, "x": Payload(command)}, path, _use_new_zipfile_serialization=False)
        else:
            torch.save({"top": Payload(command), **state} if place == "top" else {place: Payload(command)}, path)

        def read() -> None:
            from gatewise.tasks import load_trained

            rng.choice((_load, load_trained))(path)

        return f"pickle, {place} of {path.name}", read

    def _numpy(self, rng: random.Random, folder: Path, command: str) -> tuple[str, Callable[[], Any]]:
        import numpy as np

        path = folder / "x.npz"
        np.savez(path, x=np.array([Payload(command)], dtype=object))
        return "objects in npz", partial(_load, path)

    def _torchscript(self, rng: random.Random, folder: Path, command: str) -> tuple[str, Callable[[], Any]]:
        import torch

        path = folder / "x.pt"
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))
        return "TorchScript", partial(_load, path)

    def _shard(self, rng: random.Random, folder: Path, command: str) -> tuple[str, Callable[[], Any]]:
        name = rng.choice(
            (
                f"pipe:{command}; cat good.tar #.tar".replace("/", "\\x2f"),
                "pipe:touch RAN; cat good.tar #.tar",
                "http:x;touch RAN;.tar",
                "file:$(touch RAN).tar",
                "$(touch RAN).tar",
                "`touch RAN`.tar",
                "gs:x$(touch RAN).tar",
            )
        )
        member = rng.choice(("0000", "../../0000", "/0000", "a/b/0000"))
        inner = folder / "shards"
        inner.mkdir()
        with tarfile.open(inner / name, "w") as tar:
            for extension, content in (
                ("png", b"x"),
                ("cls", b"1"),
                ("pkl", pickle.dumps(Payload(command))),
                ("pyd", pickle.dumps(Payload(command))),
            ):
                info = tarfile.TarInfo(f"{member}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

        def read() -> None:
            from gatewise.data.images.shards import SampleReader, expand_shards, shard_samples

            os.chdir(inner)
            try:
                pattern = rng.choice((str(inner / "*.tar"), "*.tar", name, str(inner / name)))
                reader = SampleReader(("png",), "cls", 5)
                for shard in expand_shards(pattern):
                    for sample in shard_samples(shard):
                        reader(sample)
            finally:
                os.chdir(folder.parent)
                if (inner / "RAN").exists():
                    (folder / "RAN").touch()

        return f"shard {name}", read

    def _recipe(self, rng: random.Random, folder: Path, command: str) -> tuple[str, Callable[[], Any]]:
        tag = rng.choice(("object/apply:os.system", "object/new:os.system", "name:os.system", "module:os"))
        path = folder / "x.yaml"
        path.write_text(f"model: {{name: !!python/{tag} ['{command}']}}\ndata: {{name: digits}}\n", encoding="utf-8")

        def read() -> None:
            from gatewise.tasks import load_recipe

            load_recipe(path)

        return f"tag {tag}", read

    def _plan_member(self, rng: random.Random, folder: Path, command: str) -> tuple[str, Callable[[], Any]]:
        members = self._plan_members()
        name = rng.choice((*members, "network.pt2", "extra.pkl", "data/sample_inputs/model.pt", "../escape"))
        members[name] = pickle.dumps(Payload(command))
        return f"pickle as {name}", self._plan(folder, members)

    def _plan_call(self, rng: random.Random, folder: Path, command: str) -> tuple[str, Callable[[], Any]]:
        """Other functions in place of a plan's operators, in whatever field of its graph names them."""
        members = self._plan_members()
        target = rng.choice(
            (
                "os.system",
                "builtins.eval",
                "torch.ops.load_library",
                "torch.ops.aten.from_file.default",
                "torch.ops.aten.save.default",
                "aten.from_file.default",
                "aten::from_file",
                "torch.load",
                "subprocess.Popen",
                "__import__('os').system",
                "gatewise.__class__.default",
            )
        )
        changed = 0
        for name, content in members.items():
            if name == "plan.json" or content[:1] not in (b"{", b"["):
                continue
            graph = json.loads(content)
            changed += _replace_targets(graph, target, command)
            members[name] = json.dumps(graph).encode()
        return f"{target} in {changed} nodes", self._plan(folder, members)

    def _plan_members(self) -> dict[str, bytes]:
        with zipfile.ZipFile(self.corpus / "eager, folded.zip") as file:
            return {name: file.read(name) for name in file.namelist()}

    def _plan(self, folder: Path, members: dict[str, bytes]) -> Callable[[], Any]:
        path = folder / "plan.zip"
        with zipfile.ZipFile(path, "w") as file:
            for name, content in with_matching_digests(members).items():
                file.writestr(name, content)

        def read() -> None:
            from gatewise.efficiency import load_optimized

            load_optimized(path)(example())

        return read

    def _parquet(self, rng: random.Random, folder: Path, command: str) -> tuple[str, Callable[[], Any]]:
        import pyarrow
        import pyarrow.parquet
        from PIL import Image

        secret = folder / "secret.png"
        Image.new("RGB", (4, 4)).save(secret)
        inner = folder / "rows"
        inner.mkdir()
        cells = [{"bytes": None, "path": rng.choice((str(secret), "../secret.png"))} for _ in range(20)]
        rows = pyarrow.table({"image": cells, "label": [index % 2 for index in range(20)]})
        features = {
            "image": {"_type": "Image"},
            "label": {"_type": "ClassLabel", "names": ["a", "b"]},
        }
        rows = rows.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
        pyarrow.parquet.write_table(rows, inner / "train.parquet")

        def read() -> None:
            from gatewise.data.images.hf import HuggingFace

            data = HuggingFace(str(inner), image_size=4, batch_size=2, num_workers=0, cache_dir=str(folder / "cache"))
            data.setup()
            if any(len(labels) for _, labels in data.val_dataloader()):
                raise Wrong("a picture outside the data set was read")

        return "path in a Parquet cell", read

    def _tokenizer(self, rng: random.Random, folder: Path, command: str) -> tuple[str, Callable[[], Any]]:
        description = rng.choice(
            (
                {"kind": "huggingface", "content": "/etc/passwd", "end_of_text": "x"},
                {"kind": "os.system", "content": command},
                {"kind": "huggingface", "content": json.dumps({"model": {"type": command}}), "end_of_text": None},
            )
        )

        def read() -> None:
            from gatewise.data.text.tokenizers import restore_tokenizer

            restore_tokenizer(description)

        return "tokenizer in a checkpoint", read


def _load(path: Path) -> None:
    import gatewise

    gatewise.load_checkpoint(tiny_model(), path)


def _replace_targets(graph: Any, target: str, command: str) -> int:
    """Put another function into every field that names one; returns how many there were."""
    found = 0
    if isinstance(graph, dict):
        for key, value in graph.items():
            if key in ("target", "op", "function", "name") and isinstance(value, str) and "." in value:
                graph[key] = target
                if "args" in graph:
                    graph["args"] = [command]
                found += 1
            else:
                found += _replace_targets(value, target, command)
    elif isinstance(graph, list):
        found += sum(_replace_targets(value, target, command) for value in graph)
    return found
