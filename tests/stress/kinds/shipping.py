"""Quantized files, saved plans, and the functions that make them."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import zipfile
from pathlib import Path
from typing import Any

from tests.stress.kinds.base import Case, Kind, tiny_model
from tests.stress.mutations import damaged, junk, misshapen
from tests.stress.worker import Wrong

SHAPE = (2, 3, 16, 16)


def example(seed: int = 0) -> Any:
    import torch

    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


class QuantizedFiles(Kind):
    """ONNX files of quantized networks, and quantized state dicts."""

    name = "quantized files"
    weight = 5.0

    @classmethod
    def prepare(cls, folder: Path) -> None:
        from gatewise.efficiency import quantize
        from gatewise.efficiency.quantization.state import save_quantized_state

        model = tiny_model()
        quantize(model, example()).save(folder / "int8.onnx")
        quantize(model, example(), weights_only=True).save(folder / "weights.onnx")
        save_quantized_state(model, quantize(model, example()), folder / "state.safetensors")

    def case(self, rng: random.Random, folder: Path) -> Case:
        good = rng.choice(sorted(self.corpus.iterdir()))
        path = folder / good.name
        if good.suffix == ".onnx" and rng.random() < 0.4:
            path.write_bytes(_with_other_report(rng, good.read_bytes()))
            what = f"report of {good.name}"
        else:
            path.write_bytes(damaged(rng, good.read_bytes()))
            what = good.name

        def read() -> str:
            from gatewise.efficiency import load_quantized
            from gatewise.efficiency.quantization.state import load_quantized_state

            if path.suffix == ".onnx":
                network: Any = load_quantized(path)
                str(network.report)
            else:
                network = tiny_model()
                network = load_quantized_state(path, network)
            if not network(example()).isfinite().all():
                raise Wrong("answers are not finite")
            return "changed"

        return Case(what, read)


def _with_other_report(rng: random.Random, content: bytes) -> bytes:
    import onnx

    from gatewise.efficiency.quantization.quantize import HEADER

    model = onnx.load_from_string(content)
    for entry in model.metadata_props:
        if entry.key == HEADER:
            entry.value = json.dumps(misshapen(rng, json.loads(entry.value)))
    return model.SerializeToString()


class Plans(Kind):
    """Saved plans: the archive's bytes, and the fields and members in it."""

    name = "plans"
    weight = 4.0

    @classmethod
    def prepare(cls, folder: Path) -> None:
        from gatewise.efficiency import optimize
        from gatewise.efficiency.acceleration.plans import default_plans

        for name in ("onnxruntime", "eager, folded"):
            plans = [plan for plan in default_plans("float32", example()) if plan.name == name]
            optimize(tiny_model(), example(), plans=plans, budget_s=2.0).save(folder / f"{name}.zip")

    def case(self, rng: random.Random, folder: Path) -> Case:
        good = rng.choice(sorted(self.corpus.iterdir()))
        path = folder / good.name
        if rng.random() < 0.3:
            path.write_bytes(damaged(rng, good.read_bytes()))
            what = "bytes"
        else:
            with zipfile.ZipFile(good) as file:
                members = {name: file.read(name) for name in file.namelist()}
            what = rng.choice(sorted(members))
            members[what] = self._other(rng, members[what])
            if rng.random() < 0.8:
                members = with_matching_digests(members)
            with zipfile.ZipFile(path, "w") as file:
                for name, content in members.items():
                    file.writestr(name, content)

        def read() -> str:
            from gatewise.efficiency import load_optimized

            network = load_optimized(path)
            repr(network), str(network.report)
            if not network(example()).isfinite().all():
                raise Wrong("answers are not finite")
            return "changed"

        return Case(f"{what} of {good.name}", read)

    @staticmethod
    def _other(rng: random.Random, content: bytes) -> bytes:
        if content[:1] != b"{" or rng.random() < 0.2:
            return damaged(rng, content)
        return json.dumps(misshapen(rng, json.loads(content))).encode()


def with_matching_digests(members: dict[str, bytes]) -> dict[str, bytes]:
    """The members with every SHA-256 that the header holds made anew, as a malicious author would."""
    try:
        header = json.loads(members["plan.json"])
    except ValueError:
        return members
    if not isinstance(header, dict):
        return members
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    for key, value in header.items():
        if isinstance(value, dict) and value and set(value) <= set(members):
            header[key] = {name: digests[name] for name in value}
    return {**members, "plan.json": json.dumps(header).encode()}


class Functions(Kind):
    """Odd arguments of the functions that run, write and ship networks."""

    name = "functions"
    weight = 8.0
    # A wrong argument is a ValueError or a TypeError by Python's custom.
    refusals = (ValueError, TypeError, *Kind.refusals)

    def __init__(self, corpus: Path) -> None:
        super().__init__(corpus)
        self._model = tiny_model()
        self._loaded: dict[str, Any] = {}

    @classmethod
    def prepare(cls, folder: Path) -> None:
        from gatewise.efficiency import quantize

        quantize(tiny_model(), example()).save(folder / "int8.onnx")

    def case(self, rng: random.Random, folder: Path) -> Case:
        calls = {
            "forward": (30, self._forward),
            "quantized": (20, self._quantized),
            "language model": (20, self._language_model),
            "generate": (10, self._generate),
            "create_model": (15, self._create),
            "export": (1, self._export),
            "quantize": (1, self._quantize),
            "optimize": (1, self._optimize),
        }
        name = rng.choices(list(calls), [weight for weight, _ in calls.values()])[0]
        state = rng.getstate()

        def read() -> str:
            rng.setstate(state)
            answer = calls[name][1](rng, folder)
            if answer is not None and hasattr(answer, "isfinite") and not answer.isfinite().all():
                raise Wrong("answers are not finite for finite input")
            return "changed"

        return Case(name, read)

    def _tensor(self, rng: random.Random) -> Any:
        import numpy as np
        import torch

        shape = list(SHAPE)
        if rng.random() < 0.6:
            shape[rng.randrange(4)] = rng.choice((0, 1, 2, 3, 5, 15, 17, 31))
        if rng.random() < 0.2:
            shape = shape[: rng.randrange(5)]
        dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64))
        made = torch.zeros(shape, dtype=dtype)
        return rng.choice((made, made, made, made, np.zeros(shape, np.float32), None, "image", [made]))

    def _forward(self, rng: random.Random, folder: Path) -> Any:
        import torch

        x = self._tensor(rng)
        try:
            with torch.no_grad():
                return self._model(x)
        except RuntimeError as error:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                # PyTorch's own words on precisions that do not fit are what its users know.
                raise ValueError(str(error)) from error
            raise

    def _quantized(self, rng: random.Random, folder: Path) -> Any:
        from gatewise.efficiency import load_quantized

        if "quantized" not in self._loaded:
            self._loaded["quantized"] = load_quantized(self.corpus / "int8.onnx")
        return self._loaded["quantized"](self._tensor(rng))

    def _sequence_model(self) -> Any:
        import torch

        import gatewise

        if "sequence" not in self._loaded:
            torch.manual_seed(0)
            self._loaded["sequence"] = gatewise.create_model(
                "gla_tiny", vocab_size=257, dim=16, depth=1, num_heads=2, gate_rank=4, hidden_dim=16
            ).eval()
        return self._loaded["sequence"]

    def _language_model(self, rng: random.Random, folder: Path) -> Any:
        import torch

        shape = [rng.choice((0, 1, 2)), rng.choice((0, 1, 5))]
        tokens = torch.zeros(shape, dtype=rng.choice((torch.int64, torch.int64, torch.int32, torch.float32)))
        if tokens.numel() and rng.random() < 0.5:
            tokens.view(-1)[0] = rng.choice((-1, 256, 257, 2**31 - 1))
        with torch.no_grad():
            answer = self._sequence_model()(rng.choice((tokens, tokens, tokens, None, "text", [1, 2])))
        return answer[0] if isinstance(answer, tuple) else answer

    def _generate(self, rng: random.Random, folder: Path) -> Any:
        from gatewise.data.text.tokenizers import ByteTokenizer
        from gatewise.tasks import generate

        arguments = {
            "max_new_tokens": rng.choice((0, 1, 3, -1, 2.5, None)),
            "temperature": rng.choice((0.0, 1.0, -1.0, float("nan"), float("inf"), "hot")),
            "top_k": rng.choice((None, 1, 0, -1, 10**9, 2.5)),
            "top_p": rng.choice((None, 0.5, 0.0, 1.0, 2.0, float("nan"))),
            "seed": rng.choice((0, -1, 2**64, 2**70)),
        }
        prompt = rng.choice(("hello", "", "ü" * 10, "\ud800"))
        "".join(generate(self._sequence_model(), ByteTokenizer(), prompt, device="cpu", **arguments))

    def _create(self, rng: random.Random, folder: Path) -> Any:
        import gatewise

        fields = ("num_classes", "in_chans", "depths", "embed_dim", "drop_path_rate", "focal_levels", "mlp_ratio", "x")
        gatewise.create_model("focalnet_tiny_srf", **{rng.choice(fields): junk(rng)})

    def _export(self, rng: random.Random, folder: Path) -> Any:
        from gatewise.efficiency import export_onnx

        path = rng.choice((folder / "x.onnx", folder, folder / "missing" / "x.onnx", "/dev/full", ""))
        export_onnx(self._model, path, self._tensor(rng))

    def _quantize(self, rng: random.Random, folder: Path) -> Any:
        from gatewise.efficiency import quantize

        name = rng.choice(("bits", "weight_bits", "scheme", "per_channel", "activations", "weights_only"))
        value = junk(rng)
        calibration = rng.choice((example(), example(), self._tensor(rng), [], [example(), example()[:0]]))
        return quantize(copy.deepcopy(self._model), calibration, **{name: value})(example())

    def _optimize(self, rng: random.Random, folder: Path) -> Any:
        from gatewise.efficiency import optimize

        arguments = {"precision": rng.choice(("float32", "int8", "int7", None)), "budget_s": rng.choice((0.1, 0, -1))}
        return optimize(self._model, self._tensor(rng), plans=[], **arguments)(example())
