"""P3D, beyond what the digests show."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gatewise
from gatewise.catalog.checkpoint import export_state, load_checkpoint, load_state
from gatewise.errors import CheckpointError
from gatewise.fidelity.cases.p3d import reference_case
from gatewise.fidelity.fingerprint import make_input, relative_error
from gatewise.fidelity.verify import build_case
from gatewise.networks.video.p3d import Bottleneck, P3DConfig, Pseudo3dConv
from tests.conftest import FINGERPRINTS, _moved
from tests.networks.video.test_contract import small_video_model

SMALL = {
    "p3d63": {"base_width": 4, "depths": (1, 1, 1, 1), "num_classes": 5},
    "caffe_p3d199_flow+mean": {"base_width": 4, "depths": (1, 2, 1, 1), "num_classes": 5, "temporal_pool": "mean"},
}

SIZES = {"caffe_p3d199_flow+mean": [(16, 32, 48), (40, 37, 66)]}

CARDS = {
    "p3d63": (25_745_232, 8_441_856_000),
    "p3d131": (48_088_400, 12.898e9),
    "p3d199": (66_492_240, 18.403e9),
    "p3d199_flow": (66_489_104, 18.082e9),
    "p3d199_k600_224": (66_902_040, None),
    "p3d199_k600_299": (66_902_040, None),
    "caffe_p3d199": (66_492_240, 18.403e9),
    "caffe_p3d199_flow": (66_489_104, 18.082e9),
    "caffe_p3d199_sports1m": (66_670_503, None),
}
"""Parameters (exact) and MACs (exact where an integer, else to four digits) of the published tables.

Heads of other widths differ by 2049 parameters a class.
"""


def unit(x, conv, norm, relu=True):
    """conv3d, norm and ReLU with a 2-D kernel of frames (odd width) or of time (width 1, height over 1)."""
    kernel = conv.weight.unsqueeze(4 if conv.kernel_size == (3, 1) else 2)
    y = F.conv3d(x, kernel, stride=(1, *conv.stride), padding=[size // 2 for size in kernel.shape[2:]])
    y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)
    return F.relu(y) if relu else y


def pair_by_the_equations(middle, wiring, x):
    spatial, temporal = middle.spatial, middle.temporal
    s = unit(x, spatial.conv, spatial.norm)
    t = unit(x if wiring == "B" else s, temporal.conv, temporal.norm)
    return t if wiring == "A" else s + t


@pytest.mark.parametrize("wiring", ["A", "B", "C"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 4), (1, 2, 7, 5)])
def test_wirings_follow_the_equations(wiring, shape):
    middle = _moved(Pseudo3dConv(6, wiring)).double()
    x = torch.randn(shape[0], 6, *shape[1:], dtype=torch.float64)
    for laid_out in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        assert torch.allclose(middle(laid_out), pair_by_the_equations(middle, wiring, x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_follows_the_equations(stride):
    block = _moved(Bottleneck(5, 3, Pseudo3dConv(3, "C"), stride, project=True)).double()
    x = torch.randn(2, 5, 4, 7, 6, dtype=torch.float64)
    y = unit(x, block.reduce.conv, block.reduce.norm)
    y = pair_by_the_equations(block.middle, "C", y)
    y = unit(y, block.expand.conv, block.expand.norm, relu=False)
    expected = F.relu(y + unit(x, block.shortcut.conv, block.shortcut.norm, relu=False))
    assert block(x).shape == (2, 12, 4, -(-7 // stride), -(-6 // stride))
    assert torch.allclose(block(x), expected, rtol=1e-9, atol=1e-12)


def test_gradients_of_a_pair_are_right():
    middle = _moved(Pseudo3dConv(2, "B")).double()
    x = torch.randn(1, 2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(middle, x)


def test_wirings_are_counted_through_the_first_three_stages():
    assert ["".join(row) for row in P3DConfig().wirings()[:3]] == ["ABC", "ABCA", "BCABCA"]
    deep = P3DConfig(depths=(3, 8, 36, 3)).wirings()
    assert ["".join(row) for row in deep[:2]] == ["ABC", "ABCABCAB"]
    assert deep[2][0] == "C"
    assert deep[3] == [None, None, None]
    assert ["".join(row) for row in P3DConfig(struc=("A", "B")).wirings()[:3]] == ["ABA", "BABA", "BABABA"]


def test_the_gradient_of_the_logits_is_the_references():
    record = json.loads((FINGERPRINTS / "p3d" / "tiny-abc.json").read_text())
    case = build_case(record)
    x = make_input(**record["inputs"]["x"]).requires_grad_()
    logits = case.run(case.module.eval(), x)["logits"]
    (gradient,) = torch.autograd.grad((logits * make_input("cotangent", logits.shape)).sum(), x)
    assert relative_error(gradient, record["grads"]["input"]) < 1e-4


@pytest.mark.parametrize(("pool", "first"), [("port", -1), ("caffe", 0)])
@pytest.mark.parametrize("size", [8, 9])
def test_windows_of_the_first_pooling_start_where_each_network_has_them(pool, first, size):
    model = small_video_model("p3d63", pool=pool)
    x = torch.rand(1, 1, 4, size, size)
    pooled = model.stem_pool(x)
    # Without pixels around, an odd size leaves no room for one window more.
    length = size // 2 if pool == "caffe" else -(-size // 2)
    assert pooled.shape[2:] == (2, length, length)
    for row in range(pooled.shape[3]):
        rows = slice(max(0, 2 * row + first), 2 * row + first + 3)
        assert pooled[0, 0, 1, row, 0] == x[0, 0, 2:4, rows, max(0, first) : first + 3].max()


@pytest.mark.parametrize(("pool", "fewest", "most"), [("port", 16, 31), ("caffe", 15, 30)])
def test_clips_end_as_one_frame_or_are_refused(pool, fewest, most):
    model = small_video_model("p3d63", pool=pool)
    for frames in (fewest, most):
        assert model.forward_features(torch.randn(1, 3, frames, 32, 32)).shape == (1, 128, 1, 1, 1)
    with pytest.raises(ValueError, match=f"clips of {fewest} to {most} frames, not {most + 1}; with temporal_pool"):
        model(torch.randn(1, 3, most + 1, 32, 32))
    assert model.forward_pyramid(torch.randn(1, 3, most + 1, 32, 32))[-1].shape == (1, 128, 2, 1, 1)


def test_logits_of_several_frames_are_averaged():
    model = small_video_model("p3d63", temporal_pool="mean")
    features = model.forward_features(torch.randn(2, 3, 49, 40, 64))
    assert features.shape == (2, 128, 3, 2, 2)
    single = [model.forward_head(features[:, :, t : t + 1]) for t in range(3)]
    assert torch.allclose(model.forward_head(features), sum(single) / 3, rtol=1e-5, atol=1e-6)


def test_frames_of_the_last_stage_do_not_mix():
    stage = small_video_model("p3d63").stages[3]
    x = torch.randn(2, 64, 3, 4, 6)
    together = stage(x)
    for t in range(3):
        assert torch.allclose(together[:, :, t], stage(x[:, :, t : t + 1])[:, :, 0], rtol=1e-5, atol=1e-5)


def test_color_clips_are_refused_by_a_network_of_flow():
    model = small_video_model("caffe_p3d199_flow+mean")
    with pytest.raises(ValueError, match="expects 2 channels, not 3"):
        model(torch.randn(1, 3, 16, 32, 32))


def test_weights_start_as_in_the_port():
    model = gatewise.create_model("p3d63", depths=(1, 1, 1, 1))
    block = model.stages[2][0]
    assert model.stem.conv.weight.std().item() == pytest.approx((2 / (7 * 64)) ** 0.5, rel=0.05)
    assert block.reduce.conv.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    for unit in (block.middle.spatial, block.middle.temporal):
        assert unit.conv.weight.std().item() == pytest.approx((2 / (3 * 256)) ** 0.5, rel=0.05)
    assert model.stages[3][0].middle.conv.weight.abs().max() <= (512 * 9) ** -0.5


def test_norms_of_pretrained_stages_are_fixed_for_fine_tuning():
    model = small_video_model("p3d63")
    model.freeze_norms()
    model.train()
    assert model.stem.norm.training
    assert not model.stages[2][0].middle.temporal.norm.training
    assert not model.stages[0][0].shortcut.norm.weight.requires_grad
    assert model.stages[3][0].expand.norm.training
    model.freeze_norms(stages=4)
    assert not model.train().stages[3][0].expand.norm.training


def test_the_ports_checkpoints_are_read_and_written(tmp_path):
    source, target = small_video_model("p3d63"), gatewise.create_model("p3d63", **SMALL["p3d63"]).eval()
    state = export_state(source, "port")
    shapes = {
        "conv1_custom.weight": (4, 3, 1, 7, 7),
        "layer1.0.conv2.weight": (4, 4, 1, 3, 3),
        "layer3.0.conv3.weight": (16, 16, 3, 1, 1),
        "layer2.0.downsample.0.weight": (32, 16, 1, 1, 1),
        "layer4.0.conv_normal.weight": (32, 32, 3, 3),
        "layer4.0.bn_normal.running_var": (32,),
        "layer4.0.downsample.1.bias": (128,),
        "fc.weight": (5, 128),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    path = tmp_path / "p3d_rgb_199.checkpoint.pth.tar"
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, path)
    assert load_checkpoint(target, path).name == "port"
    x = torch.randn(1, 3, 16, 48, 32)
    assert torch.equal(target(x), source(x))


CAFFE = "caffe_p3d199_flow+mean"


def caffe_archive(path, model, layout="caffe", change=lambda blobs: None):
    """The model's weights as the Caffe network has them: norms with five axes, in a NumPy archive."""
    blobs = {key: tensor.numpy() for key, tensor in export_state(model, layout).items()}
    for key, blob in blobs.items():
        if key.startswith("bn"):
            blobs[key] = blob.reshape(1, -1, 1, 1, 1)
    change(blobs)
    np.savez(path, **blobs)
    return path


def loaded_from(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target = gatewise.create_model(CAFFE.partition("+")[0], **SMALL[CAFFE]).eval()
        layout = load_checkpoint(target, path, **options)
    return target, layout.name


def large_variances(model):
    """Of the size that pixels from 0 to 255 give in the first norm."""
    with torch.no_grad():
        model.stem.norm.running_var.mul_(100)
    return model


def test_caffes_blobs_are_read_and_written(tmp_path):
    source = large_variances(small_video_model(CAFFE))
    names = set(export_state(source, "caffe"))
    assert {
        "conv1/0",
        "bn_conv1/3",
        "res2a_branch1/0",
        "bn3a_branch2b_t/2",
        "res5a_branch2b/0",
        "fc_kinetics/1",
    } <= names
    assert export_state(source, "caffe")["res3a_branch2b_t/0"].shape == (8, 8, 3, 1, 1)
    assert not any("2b_t" in name for name in names if name.startswith("res5"))
    target, layout = loaded_from(caffe_archive(tmp_path / "weights.npz", source))
    assert layout == "caffe"
    x = torch.randn(1, 2, 16, 32, 48)
    assert torch.equal(target(x), source(x))


def test_blocks_are_known_by_number_too(tmp_path):
    source = large_variances(small_video_model(CAFFE))

    def number(blobs):
        for key in [key for key in blobs if key.startswith(("res3b_", "bn3b_"))]:
            blobs[key.replace("3b_", "3b1_", 1)] = blobs.pop(key)

    target, _ = loaded_from(caffe_archive(tmp_path / "weights.npz", source, change=number))
    assert torch.equal(target.stages[1][1].middle.temporal.conv.weight, source.stages[1][1].middle.temporal.conv.weight)


def test_deep_stages_are_written_by_number():
    model = gatewise.create_model("caffe_p3d199_sports1m", base_width=2)
    names = set(export_state(model, "caffe"))
    assert {"res2c_branch2c/0", "res3b7_branch2a/0", "bn4b35_branch2b_t/3", "fc_sports1m/0"} <= names
    load_state(model, export_state(model, "caffe"))


def test_inverse_deviations_are_read_where_asked_for(tmp_path):
    source = large_variances(small_video_model(CAFFE))
    path = caffe_archive(tmp_path / "weights.npz", source, "caffe-inverse-std")
    target, layout = loaded_from(path, layout="caffe-inverse-std")
    assert layout == "caffe-inverse-std"
    assert torch.allclose(target.stem.norm.running_var, source.stem.norm.running_var, rtol=1e-5)
    with pytest.warns(UserWarning, match="read as variances, the statistics of bn_conv1 .*'caffe-inverse-std'"):
        load_checkpoint(target, path)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_statistics_that_are_no_variances_are_refused(tmp_path, value):
    def spoil(blobs):
        blobs["bn3a_branch2b/3"].flat[2] = value

    path = caffe_archive(tmp_path / "weights.npz", large_variances(small_video_model(CAFFE)), change=spoil)
    with pytest.raises(CheckpointError, match=r"bn3a_branch2b \(blob 3\) must be positive and finite"):
        loaded_from(path)


def test_a_missing_blob_is_named(tmp_path):
    path = caffe_archive(
        tmp_path / "weights.npz", small_video_model(CAFFE), change=lambda blobs: blobs.pop("res2a_branch2b_t/0")
    )
    target = gatewise.create_model(CAFFE.partition("+")[0], **SMALL[CAFFE])
    with pytest.raises(CheckpointError, match=r"closest layout: caffe.*stages\.0\.0\.middle\.temporal\.conv\.weight"):
        load_checkpoint(target, path)


@pytest.mark.parametrize("channels", [3, 2])
def test_it_starts_from_a_resnet_of_images(channels):
    images = export_state(small_video_model("p3d63"), "resnet")
    assert images["conv1.weight"].shape == (4, 3, 7, 7)
    assert images["layer4.0.conv2.weight"].shape == (32, 32, 3, 3)
    assert not any("temporal" in key for key in images)
    model = gatewise.create_model("p3d63", **{**SMALL["p3d63"], "in_chans": channels, "num_classes": 7})
    assert load_state(model, images, adapt=True, replace_head=True).name == "resnet"
    spatial, temporal = model.stages[2][0].middle.spatial, model.stages[2][0].middle.temporal
    assert torch.equal(spatial.conv.weight, images["layer3.0.conv2.weight"])
    if channels == 3:
        assert temporal.conv.weight.std().item() == pytest.approx(0.001, rel=0.1)
        assert torch.equal(model.stem.conv.weight, images["conv1.weight"])
    else:
        assert 0.9 < temporal.conv.weight.abs().max().item() * (16 * 3 / 3) ** 0.5 <= 1
        assert torch.equal(model.stem.conv.weight[:, 1], images["conv1.weight"].mean(dim=1))


def test_what_the_port_cannot_run_has_no_case():
    record = json.loads((FINGERPRINTS / "p3d" / "tiny-b.json").read_text())
    assert reference_case(record | {"config": record["config"] | {"shortcut_type": "A"}}) is None
    assert reference_case(record | {"config": record["config"] | {"frames": 16}}) is None
    flow = reference_case(record | {"config": record["config"] | {"modality": "Flow", "dropout": 0.7}})
    assert flow.module.config.in_chans == 2
    assert flow.module.config.drop_rate == 0.7


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (3, 4, 6)}, r"depths must be four positive numbers of blocks, not \(3, 4, 6\)"),
        ({"depths": (3, 0, 6, 3)}, "depths must be four positive"),
        ({"base_width": 0}, "base_width must be positive, not 0"),
        ({"struc": ()}, "struc must be one or more of A, B, C"),
        ({"struc": ("A", "D")}, "struc must be one or more of A, B, C"),
        ({"pool": "same"}, "pool must be one of port, caffe, not 'same'"),
        ({"temporal_pool": "max"}, "temporal_pool must be None or 'mean', not 'max'"),
        ({"in_chans": 0}, "in_chans must be positive"),
    ],
)
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        P3DConfig(**fields)
