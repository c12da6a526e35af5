"""Weights: published formats, state dicts and checkpoints of training."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any, ClassVar

from tests.stress.kinds.base import TINY_MODEL, Case, Kind, tiny_model
from tests.stress.mutations import damaged, junk, misshapen
from tests.stress.worker import Wrong

CHECKSUMMED = (".pth", ".npz")


class CheckpointBytes(Kind):
    """The bytes of a checkpoint in each format."""

    name = "checkpoint bytes"
    weight = 10.0

    def __init__(self, corpus: Path) -> None:
        super().__init__(corpus)
        self._model = tiny_model()
        self._state = {key: tensor.clone() for key, tensor in self._model.state_dict().items()}

    @classmethod
    def prepare(cls, folder: Path) -> None:
        import numpy as np
        import torch
        from safetensors.torch import save_file

        state = tiny_model().state_dict()
        torch.save(state, folder / "zip.pth")
        torch.save({"model": state, "epoch": 3}, folder / "wrapped.pth")
        torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
        save_file(state, folder / "model.safetensors")
        np.savez(folder / "model.npz", **{key: tensor.numpy() for key, tensor in state.items()})

    def case(self, rng: random.Random, folder: Path) -> Case:
        good = rng.choice(sorted(self.corpus.iterdir()))
        path = folder / good.name
        path.write_bytes(damaged(rng, good.read_bytes()))
        self._model.load_state_dict(self._state)

        def read() -> str:
            import gatewise

            gatewise.load_checkpoint(self._model, path)
            return _compared(self._model, self._state, must_be_same=path.suffix in CHECKSUMMED)

        return Case(good.name, read)


def _compared(model: Any, state: dict[str, Any], must_be_same: bool) -> str:
    import torch

    found = model.state_dict()
    if not all(tensor.isfinite().all() for tensor in found.values()):
        raise Wrong("loaded weights are not finite")
    same = all(torch.equal(found[key], state[key]) for key in state)
    if must_be_same and not same:
        raise Wrong("other weights were loaded from a format with checksums")
    return "same" if same else "changed"


class StateDicts(Kind):
    """State dicts that were saved properly and hold what they should not."""

    name = "state dicts"
    weight = 4.0

    def __init__(self, corpus: Path) -> None:
        super().__init__(corpus)
        self._model = tiny_model()
        self._state = {key: tensor.clone() for key, tensor in self._model.state_dict().items()}

    @classmethod
    def prepare(cls, folder: Path) -> None:
        """Nothing: state dicts are made in memory."""

    def case(self, rng: random.Random, folder: Path) -> Case:
        import torch

        content: Any = {key: tensor.clone() for key, tensor in self._state.items()}
        for _ in range(rng.choice((1, 1, 2))):
            content[rng.choice(list(content))] = self._odd(rng)
        for _ in range(rng.choice((0, 0, 1, 3, 200))):
            content = {rng.choice(("model", "state_dict", "module", "params", "state_dict_ema")): content}
        if rng.random() < 0.1:
            content[rng.choice(("model", "state_dict"))] = content
        path = folder / "odd.pth"
        self._model.load_state_dict(self._state)
        torch.save(content, path)

        def read() -> str:
            import gatewise

            gatewise.load_checkpoint(self._model, path)
            return _compared(self._model, self._state, must_be_same=False)

        return Case("odd value in a state dict", read)

    def _odd(self, rng: random.Random) -> Any:
        import torch

        tensor = self._state[rng.choice(list(self._state))].clone()
        flat = tensor.flatten()
        place = rng.randrange(flat.numel())
        choice = rng.randrange(16)
        if choice < 3:
            flat[place] = (math.nan, math.inf, -math.inf)[choice]
            return flat.reshape(tensor.shape)
        if choice < 9:
            dtype = (torch.bool, torch.int8, torch.uint8, torch.int64, torch.complex64, torch.float8_e4m3fn)[choice - 3]
            return tensor.to(dtype)
        made = {
            9: lambda: tensor.to_sparse(),
            10: lambda: tensor.to("meta"),
            11: lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            12: lambda: torch.zeros(1).expand(2**40),
            13: lambda: torch.empty(0),
            14: lambda: tensor.double() * 1e300,
            15: lambda: junk(rng),
        }
        return made[choice]()


class TrainedCheckpoints(Kind):
    """Checkpoints of training with wrong fields."""

    name = "trained checkpoints"
    weight = 6.0

    RECIPE: ClassVar[dict[str, Any]] = {
        "model": TINY_MODEL,
        "data": {"name": "digits", "batch_size": 16, "num_workers": 0},
        "trainer": {
            "epochs": 1,
            "accelerator": "cpu",
            "progress": False,
            "limit_train_batches": 1,
            "limit_val_batches": 1,
        },
    }

    def __init__(self, corpus: Path) -> None:
        super().__init__(corpus)
        self._content: Any = None

    @classmethod
    def prepare(cls, folder: Path) -> None:
        from gatewise.tasks import parse_recipe, train

        train(parse_recipe({**cls.RECIPE, "output": str(folder / "run")}))

    def case(self, rng: random.Random, folder: Path) -> Case:
        import torch

        if self._content is None:
            self._content = torch.load(self.corpus / "run" / "best.ckpt", weights_only=True)
        part = rng.choice(("gatewise", "gatewise", "gatewise", "state_dict", ""))
        content = dict(self._content)
        if part == "":
            content = misshapen(rng, content)
        else:
            content[part] = misshapen(rng, dict(content[part]))
        path = folder / "best.ckpt"
        torch.save(content, path)

        def read() -> str:
            from gatewise.tasks import load_trained

            trained = load_trained(path)
            with torch.no_grad():
                output = trained.model(torch.zeros(2, *trained.input_size))
            if not output.isfinite().all():
                raise Wrong("the network's answers are not finite")
            if trained.class_names and len(trained.class_names) != output.shape[1]:
                raise Wrong(f"{len(trained.class_names)} class names for {output.shape[1]} outputs")
            return "changed"

        return Case(f"field of {part or 'the checkpoint'}", read)
