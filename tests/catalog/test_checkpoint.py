"""Checkpoints: every layout loads whole or not at all, and nothing in a file is ever run."""

from __future__ import annotations

import argparse
import http.server
import pickle
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import gatewise
from gatewise import load_checkpoint
from gatewise.catalog.checkpoint import export_state, load_state, peel, read_checkpoint
from gatewise.catalog.registry import family_of
from gatewise.errors import CheckpointError
from tests.conftest import SMALL, small_model
from tests.networks.image.test_contract import images


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("name", SMALL)
def test_every_writable_layout_round_trips(name):
    source, image = small_model(name), images(name)
    for layout in family_of(name.partition("+")[0]).layouts(source.config):
        if layout.tensor_to_ours is not None:
            continue
        target = small_model(name, drop_path_rate=0.1)
        target.load_state_dict({key: torch.zeros_like(value) for key, value in target.state_dict().items()})
        found = load_state(target, export_state(source, layout.name))
        # The names of networks without published weights are our own.
        assert found.name == layout.name or not layout.rules
        assert torch.equal(target(image), source(image))


@pytest.mark.parametrize("post_norm", [False, True])
def test_timms_own_focalnet_exchanges_weights_with_ours(post_norm):
    from timm.models.focalnet import FocalNet

    shape = {"depths": (1, 1, 2, 1), "embed_dim": 16, "num_classes": 7, "focal_levels": (3, 2, 2, 1)}
    scale = 1e-4 if post_norm else None
    options = {"use_post_norm": post_norm, "use_overlap_down": post_norm, "layerscale_value": scale}
    theirs, other = (FocalNet(**shape, **options).eval() for _ in range(2))
    options = {"use_postln": post_norm, "use_conv_embed": post_norm, "layer_scale_init": scale}
    ours = gatewise.create_model("focalnet_tiny_srf", **shape, **options).eval()
    exchange(theirs, ours, "timm", other)


@pytest.mark.parametrize(("name", "layout"), [("inception_next_atto", "official"), ("mobilenetv2_120d", "timm")])
def test_timms_own_networks_exchange_weights_with_ours(name, layout):
    import timm

    theirs, other = (timm.create_model(name, num_classes=7).eval() for _ in range(2))
    exchange(theirs, gatewise.create_model(name, num_classes=7).eval(), layout, other)


def exchange(theirs, ours, layout, other):
    """Their weights give ours their outputs; written back in their layout they fill another of theirs."""
    load_state(ours, theirs.state_dict())
    x = torch.randn(1, 3, 96, 64)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    other.load_state_dict(export_state(ours, layout))
    assert torch.equal(other.eval()(x), theirs(x))


def test_torchvisions_own_network_loads():
    import torchvision

    theirs = torchvision.models.mobilenet_v2(width_mult=0.5).eval()
    ours = gatewise.create_model("mobilenetv2_050").eval()
    assert load_state(ours, theirs.state_dict()).name == "torchvision"
    x = torch.randn(1, 3, 64, 96)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_tensorflow_names_axes_and_background_class():
    ours = gatewise.create_model("tf_mobilenetv2_035", num_classes=4)
    state = {"global_step": torch.tensor(7)}
    for key, tensor in ours.state_dict().items():
        if "num_batches" not in key:
            state[tensorflow_name(key)] = tensorflow_axes(key, tensor)
    target = gatewise.create_model("tf_mobilenetv2_035", num_classes=4)
    assert load_state(target, state).name == "tensorflow"
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in target.state_dict().items())


def tensorflow_name(key: str) -> str:
    """Written out from the names of TensorFlow's variables, independently of the layout under test."""
    norm = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    head, _, leaf = key.rpartition(".")
    if head == "head":
        return f"MobilenetV2/Logits/Conv2d_1c_1x1/{'weights' if leaf == 'weight' else 'biases'}"
    *place, unit = head.split(".")
    leaf = f"BatchNorm/{norm[leaf]}" if unit == "norm" else "weights"
    if place[0] != "stages":
        return f"MobilenetV2/{'Conv' if place[0] == 'stem' else 'Conv_1'}/{leaf}"
    repeats = (1, 2, 3, 4, 3, 3, 1)
    number = sum(repeats[: int(place[1])]) + int(place[2])
    part = {"expand": "expand", "spatial": "depthwise", "project": "project"}[place[3]]
    leaf = "depthwise_weights" if part == "depthwise" and leaf == "weights" else leaf
    return f"MobilenetV2/expanded_conv{f'_{number}' if number else ''}/{part}/{leaf}"


def tensorflow_axes(key: str, tensor: torch.Tensor) -> torch.Tensor:
    if key == "head.weight":
        with_background = torch.cat([torch.zeros_like(tensor[:1]), tensor])
        return with_background.T[None, None]
    if key == "head.bias":
        return torch.cat([torch.zeros(1), tensor])
    if tensor.ndim == 4 and ".spatial." in key:
        return tensor.permute(2, 3, 0, 1)
    return tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_file_formats(tmp_path, suffix, image):
    source, target = small_model("mobilenetv2_035"), small_model("mobilenetv2_035", drop_rate=0.3)
    path = tmp_path / f"weights{suffix}"
    state = {key: value.clone() for key, value in source.state_dict().items()}
    if suffix == ".pth":
        torch.save(state, path)
    elif suffix == ".safetensors":
        save_file(state, path)
    else:
        np.savez(path, **{key: value.numpy() for key, value in state.items()})
    torch.nn.init.zeros_(target.head.weight)
    load_checkpoint(target, path)
    assert torch.equal(target(image), source(image))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": {f"model._orig_mod.{key}": value for key, value in state.items()}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"model_state_dict": state, "epoch": 3},
    ],
)
def test_wrappers_and_prefixes_are_peeled(tmp_path, wrap):
    model = small_model("inception_next_atto")
    torch.save(wrap(model.state_dict()), tmp_path / "x.pth")
    assert peel(read_checkpoint(tmp_path / "x.pth")).keys() == model.state_dict().keys()


def test_averaged_weights_are_preferred_unless_told_otherwise():
    content = {"state_dict": {"w": torch.zeros(1)}, "state_dict_ema": {"w": torch.ones(1)}}
    assert peel(content)["w"] == 1
    assert peel(content, ema=False)["w"] == 0


def test_files_from_before_batches_were_counted_load():
    model = small_model("mobilenetv2_035")
    state = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    load_state(model, state)


def test_every_unused_and_unfilled_key_is_listed():
    model = small_model("mobilenetv2_035")
    state = model.state_dict()
    del state["stem.conv.weight"]
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"unused \(1\): extra.weight; unfilled \(1\): stem.conv.weight"):
        load_state(model, state)


def test_a_checkpoint_that_does_not_fit_leaves_the_model_alone():
    model = small_model("mobilenetv2_035")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: torch.zeros_like(value) for key, value in before.items()}
    del state["stem.conv.weight"]
    with pytest.raises(CheckpointError):
        load_state(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_another_head_is_replaced_only_when_asked():
    source, target = small_model("focalnet_tiny_srf", num_classes=7), small_model("focalnet_tiny_srf")
    head = target.head.weight.clone()
    with pytest.raises(CheckpointError, match="only the head differs: pass replace_head=True"):
        load_state(target, source.state_dict())
    load_state(target, source.state_dict(), replace_head=True)
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.norm.weight, source.norm.weight)


def test_classification_weights_fill_a_dense_prediction_backbone():
    source = small_model("focalnet_tiny_srf")
    dense = small_model("focalnet_tiny_srf", num_classes=0, pyramid_norm=True)
    with pytest.raises(CheckpointError, match="level_norms"):
        load_state(dense, source.state_dict())
    load_state(dense, source.state_dict(), replace_head=True)
    assert torch.equal(dense.stem.proj.weight, source.stem.proj.weight)


def test_the_error_names_the_variant_that_fits():
    with torch.device("meta"):
        state = gatewise.create_model("mobilenetv2_075").state_dict()
        model = gatewise.create_model("mobilenetv2_100")
    with pytest.raises(CheckpointError, match="it fits mobilenetv2_075, tf_mobilenetv2_075"):
        load_state(model, state)


def test_sizes_are_not_adapted_unless_asked():
    source = small_model("focalnet_tiny_srf")
    target = small_model("focalnet_tiny_srf", focal_windows=(5, 3, 3, 3))
    with pytest.raises(CheckpointError, match="other shape"):
        load_state(target, source.state_dict())
    load_state(target, source.state_dict(), adapt=True)
    with pytest.raises(CheckpointError, match="defines no transfer"):
        load_state(small_model("mobilenetv2_035"), {}, adapt=True)


class Malicious:
    def __reduce__(self):
        return (print, ("this code has run",))


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, capsys, write):
    path = tmp_path / "evil.pth"
    write({"state_dict": {"w": torch.zeros(1)}, "payload": Malicious()}, path)
    with pytest.raises(CheckpointError, match="refused"):
        load_checkpoint(small_model("mobilenetv2_035"), path)
    assert "this code has run" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path / f"short{suffix}"
    state = {"w": torch.zeros(1000)}
    {".pth": torch.save, ".safetensors": save_file}.get(suffix, lambda s, p: np.savez(p, w=s["w"].numpy()))(state, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"short.* cannot be read"):
        read_checkpoint(path)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.pth").touch()
    with pytest.raises(CheckpointError, match=r"empty.pth cannot be read"):
        read_checkpoint(tmp_path / "empty.pth")


@pytest.mark.parametrize("source", ["nowhere.pth", "runs/none/best.ckpt", "/nowhere/else.safetensors", "a folder"])
def test_a_missing_file_is_named(source):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(source)


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], torch.zeros(3)])
def test_a_file_without_a_state_dict_is_refused(content):
    with pytest.raises(CheckpointError, match="no state dict"):
        peel(content)


def test_a_foreign_module_is_refused():
    with pytest.raises(CheckpointError, match="Linear is not a network of this library"):
        load_state(torch.nn.Linear(1, 1), {})


def test_an_unknown_layout_is_named():
    with pytest.raises(CheckpointError, match="no key layout 'keras'"):
        export_state(small_model("mobilenetv2_035"), "keras")
    with pytest.raises(CheckpointError, match="can be read, not written"):
        export_state(small_model("mobilenetv2_035"), "tensorflow")


def test_urls_are_downloaded_once(tmp_path, monkeypatch):
    model = small_model("mobilenetv2_035")
    served = tmp_path / "served"
    served.mkdir()
    torch.save(model.state_dict(), served / "weights.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(served), **kwargs)

        def log_message(self, *args):
            requests.append(args)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        load_checkpoint(small_model("mobilenetv2_035"), f"{url}/weights.pth")
        load_checkpoint(small_model("mobilenetv2_035"), f"{url}/weights.pth")
        assert len(requests) == 1
        with pytest.raises(CheckpointError, match="cannot download"):
            load_checkpoint(model, f"{url}/missing.pth")
    finally:
        server.shutdown()


def test_the_hub_out_of_reach_is_told(monkeypatch, tmp_path):
    import huggingface_hub as hub

    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="timm/nothing-like-it"):
        load_checkpoint(small_model("mobilenetv2_035"), "timm/nothing-like-it")


def test_archives_of_tensorflow_variables_are_told_from_checkpoints():
    with pytest.raises(CheckpointError, match="holds TensorFlow variables: export them"):
        read_checkpoint("https://example.org/model.tar.gz")


def test_a_layout_can_be_named_where_two_would_fit():
    fields = {"vocab_size": 31, "dim": 32, "depth": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    model = gatewise.create_model("gated_attention_1_7b_28l_elementwise", **fields, hidden_dim=16)
    other = gatewise.create_model("gated_attention_1_7b_28l_elementwise", **fields, hidden_dim=16)
    state = export_state(model, "qwen3_next")
    x = torch.arange(10).reshape(2, 5)
    load_state(other, state, layout="qwen3_next")
    assert torch.equal(other(x), model(x))
    load_state(other, state)
    assert not torch.allclose(other(x), model(x))
    with pytest.raises(CheckpointError, match="no key layout 'qwen' here; known: gatewise, official, qwen3_next"):
        load_state(other, state, layout="qwen")
