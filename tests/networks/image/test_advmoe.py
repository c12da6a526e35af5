"""AdvMoE's networks, beyond what the digests show."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_checkpoint, load_state
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.cost.count import count
from gatewise.fidelity.verify import build_case
from gatewise.gates.capture import capture
from gatewise.networks.image.advmoe import ExpertConv2d, Router
from gatewise.ops.expert_conv import route_to_experts
from tests.conftest import FINGERPRINTS, small_model

SMALL = {
    "resnet18_cifar_moe": {"depths": (1, 1, 1, 2), "ratio": 0.125, "num_classes": 5},
    "resnet50_imagenet_moe": {"depths": (1, 1, 1, 1), "ratio": 0.0625, "n_expert": 3, "num_classes": 5},
    "resnet18_cifar_ori": {"depths": (1, 1, 1, 1), "ratio": 0.125, "num_classes": 5},
    "wrn_28_4_cifar_moe": {"depth": 10, "widen_factor": 1, "preactivate_transitions": True, "num_classes": 5},
    "vgg16_bn_moe": {"widths": ((16, 16), (32,), (32,), (64,), (64,)), "hidden_dim": 16, "num_classes": 5},
    "densenet_cifar_moe": {"depth": 16, "growth_rate": 6, "init_features": 8, "num_classes": 5},
}

SIZES = {
    "resnet18_cifar_moe": [(32, 32), (32, 48), (37, 25), (17, 40)],
    "resnet18_cifar_ori": [(32, 32), (32, 48), (37, 25), (17, 40)],
    "wrn_28_4_cifar_moe": [(32, 32), (32, 48), (37, 25), (17, 40)],
    "densenet_cifar_moe": [(32, 32), (32, 48), (37, 25), (17, 40)],
}

STRIDES = {
    "resnet18_cifar_moe": (1, 2, 4, 8),
    "resnet18_cifar_ori": (1, 2, 4, 8),
    "wrn_28_4_cifar_moe": (1, 2, 4),
    "vgg16_bn_moe": (1, 2, 4, 8, 16),
    "densenet_cifar_moe": (1, 2, 4),
}

CARDS = {
    "resnet18_cifar_moe": (5_834_652, 192.3e6),
    "resnet18_cifar_ori": (11_173_962, 555.4e6),
    "vgg16_bn_moe": (7_959_420, 119.6e6),
    "vgg16_bn_ori": (15_311_818, 313.8e6),
    "wrn_28_10_cifar_moe": (18_508_804, 1_351.5e6),
    "wrn_28_10_cifar_ori": (36_479_194, 5_243.3e6),
    "densenet_cifar_moe": (602_572, 112.9e6),
    "densenet_cifar_ori": (176_122, 72.37e6),
}
"""Parameters (exact, router included) and MACs (to four digits) as the published code measures them."""

BACKBONES = [name for name in SMALL if name.endswith("_moe")]


def mixed_scores(batch, experts):
    """Scores that send images to all experts in turn, the last expert first."""
    return torch.eye(experts)[torch.arange(batch - 1, -1, -1) % experts]


def images(name, batch=5):
    return torch.rand(batch, 3, *SIZES.get(name, [(64, 64)])[0])


def thin_network(model, expert):
    """The dense network that has one expert's rows in the place of each convolution with experts."""
    own = type(model)(replace(model.config, n_expert=1)).eval()
    rows = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, ExpertConv2d)}
    state = {
        key: value.chunk(model.config.n_expert)[expert] if key in rows else value
        for key, value in model.state_dict().items()
        if not key.startswith("router.")
    }
    own.load_state_dict(state)
    return own


@pytest.mark.parametrize("name", BACKBONES)
def test_each_image_runs_through_the_thin_network_of_its_expert(name):
    model, x = small_model(name), images(name)
    scores = mixed_scores(5, model.config.n_expert)
    logits = model(x, scores)
    for image, expert in enumerate(scores.argmax(1).tolist()):
        expected = thin_network(model, expert)(x[image : image + 1])
        torch.testing.assert_close(logits[image : image + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_levels_come_back_in_the_order_of_the_images(name):
    model, x = small_model(name), images(name, 3)
    scores = mixed_scores(3, model.config.n_expert)
    alone = [model.forward_pyramid(x[i : i + 1], scores[i : i + 1]) for i in range(3)]
    for level, parts in zip(model.forward_pyramid(x, scores), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(level, torch.cat(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_whole_passes_per_expert_equal_experts_at_every_layer(name):
    model, x = small_model(name), images(name)
    scores = mixed_scores(5, model.config.n_expert)
    expected = model(x, scores)
    # In training mode the batch stays together; with fixed statistics that changes nothing.
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.testing.assert_close(model(x, scores), expected, rtol=1e-4, atol=1e-5)


def test_norms_see_the_whole_batch_in_training():
    model, x = small_model("resnet18_cifar_moe").train(), images("resnet18_cifar_moe", 4)
    unit = model.stages[0][0].units[0]
    unit.norm.momentum = 1.0
    stem = model.stem(x)
    scores = mixed_scores(4, 2)
    model(x, scores)
    parts = unit.conv.weight.chunk(2)
    outputs = torch.cat([F.conv2d(stem[i : i + 1], parts[e], padding=1) for i, e in enumerate(scores.argmax(1))])
    torch.testing.assert_close(unit.norm.running_mean, outputs.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_scores_get_the_gradient_of_the_published_code():
    """All experts computed, masked by the choice and gathered, layer by layer."""
    model = small_model("resnet18_cifar_moe", depths=(1, 1)).double()
    x = images("resnet18_cifar_moe", 3).double()
    scores = mixed_scores(3, 2).double().requires_grad_()

    def masked(conv, y):
        mask = F.one_hot(scores.argmax(1), 2) + (scores - scores.detach())
        every = F.conv2d(y, conv.weight, None, conv.stride, conv.padding).unflatten(1, (2, -1))
        return (every * mask[..., None, None, None])[torch.arange(3), scores.argmax(1)]

    y = model.stem(x)
    for (block,) in model.stages:
        z = F.relu(block.units[0].norm(masked(block.units[0].conv, y)))
        z = block.units[1].norm(masked(block.units[1].conv, z))
        y = F.relu(z + block.shortcut(y))
    cotangent = torch.randn(3, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(model.head(y.mean(dim=(2, 3))), scores, cotangent)
    (found,) = torch.autograd.grad(model(x, scores), scores, cotangent)
    torch.testing.assert_close(found, expected)
    assert (found[scores == 0] == 0).all()


def test_the_router_learns_from_the_logits_unless_scores_are_cut_off():
    model, x = small_model("resnet18_cifar_moe"), images("resnet18_cifar_moe")
    model(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.router.parameters())
    model.zero_grad()
    model(x, model.scores(x).detach()).sum().backward()
    assert all(p.grad is None for p in model.router.parameters())


def router_by_the_definition(router, x):
    """Option-A shortcuts and a pooling window as large as the map, from the router's tensors alone."""
    state = router.state_dict()

    def conv_norm(path, x, stride=1):
        x = F.conv2d(x, state[f"{path}.conv.weight"], None, stride, 1)
        values = [state[f"{path}.norm.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values)

    x = F.relu(conv_norm("stem", x))
    for stage in range(3):
        for block in range(3):
            stride = 2 if stage and not block else 1
            y = F.relu(conv_norm(f"stages.{stage}.{block}.units.0", x, stride))
            y = conv_norm(f"stages.{stage}.{block}.units.1", y)
            if stride == 2:
                zeros = torch.zeros(x.shape[0], x.shape[1] // 2, *y.shape[2:])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            x = F.relu(x + y)
    return F.linear(F.avg_pool2d(x, x.shape[3]).flatten(1), state["fc.weight"], state["fc.bias"])


def test_the_router_follows_its_definition():
    router = small_model("resnet18_cifar_moe").router
    x = torch.rand(2, 3, 20, 20)
    torch.testing.assert_close(router(x), router_by_the_definition(router, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experts", [2, 3, 4])
def test_size_of_the_router(experts):
    assert sum(p.numel() for p in Router(experts).parameters()) == 269_202 + 65 * (experts - 2)
    with torch.device("meta"):
        router = Router(experts)
    assert count(router, torch.empty(1, 3, 32, 32, device="meta")).macs == pytest.approx(40.55e6, rel=1e-3)


def test_the_choice_is_read_as_a_gate():
    model, x = small_model("resnet18_cifar_moe"), images("resnet18_cifar_moe")
    (reading,) = capture(model, x)
    assert reading.path == "router"
    assert torch.equal(reading.maps["expert"].argmax(1), model.scores(x).argmax(1))
    assert torch.equal(reading.maps["expert"].sum(1), torch.ones(5))


def test_load_of_the_experts_tells_a_collapsed_router():
    model, x = small_model("resnet18_cifar_moe"), images("resnet18_cifar_moe", 8)
    balance(model, x)
    assert model.expert_load(x) == (4, 4)
    model.router.fc.bias.data = torch.tensor([100.0, 0.0])
    assert model.expert_load(x) == (8, 0)


@torch.no_grad()
def balance(model, x):
    """Shift the router's scores so that two experts share these images evenly."""
    first, second = model.scores(x).unbind(1)
    model.router.fc.bias[1] += (first - second).median() + 1e-4 * (first - second).abs().mean()


@pytest.mark.parametrize("name", BACKBONES)
def test_folding_is_exact_for_every_expert(name):
    model, x = small_model(name), images(name)
    folded, scores = fold(model), mixed_scores(5, model.config.n_expert)
    expected = model(x, scores)
    torch.testing.assert_close(folded(x, scores), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_folding_scales_every_experts_rows_alike():
    model = small_model("resnet18_cifar_moe")
    unit = model.stages[1][0].units[0]
    ratio = unit.merged().conv.weight / unit.conv.weight
    first, second = ratio.flatten(1).mean(dim=1).chunk(2)
    torch.testing.assert_close(first, second)
    assert len(unit.merged().conv.bias) == len(unit.conv.weight)


def test_input_normalization_comes_before_the_router():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    model, x = small_model("resnet18_cifar_moe"), images("resnet18_cifar_moe")
    normalizing = small_model("resnet18_cifar_moe", input_mean=mean, input_std=std)
    normalizing.load_state_dict(model.state_dict())
    normalized = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(normalizing(x), model(normalized))
    torch.testing.assert_close(normalizing.scores(x), model.scores(normalized))


def test_the_first_norm_of_a_published_transition_is_followed_and_unused():
    model = small_model("wrn_28_4_cifar_moe", preactivate_transitions=False)
    x, scores = images("wrn_28_4_cifar_moe"), mixed_scores(5, 2)
    expected = model(x, scores)
    for stage, unused in ((0, False), (1, True), (2, True)):
        block = model.stages[stage][0]
        assert (block.shortcut is not None) == unused
        if unused:
            block.norm1.weight.data.fill_(float("nan"))
    assert torch.equal(model(x, scores), expected)
    folded = fold(model)
    assert isinstance(folded.stages[1][0].norm1, nn.Identity)
    torch.testing.assert_close(folded(x, scores), expected, rtol=1e-4, atol=1e-4)
    before = model.stages[1][0].norm1.running_mean.clone()
    model.train()(x, scores).sum().backward()
    assert not torch.equal(model.stages[1][0].norm1.running_mean, before)
    assert model.stages[1][0].norm1.weight.grad is None


@pytest.mark.untyped
def test_the_published_wide_network_compiles_without_a_graph_break():
    model = small_model("wrn_28_4_cifar_moe", preactivate_transitions=False)
    x = images("wrn_28_4_cifar_moe")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.untyped
@pytest.mark.parametrize("name", ["resnet18_cifar_moe", "vgg16_bn_moe"])
def test_onnx_gives_the_same_with_images_of_both_experts(name, tmp_path):
    model, x = small_model(name), images(name, 4)
    balance(model, x)
    assert model.expert_load(x) == (2, 2)
    report = export_onnx(model, tmp_path / "network.onnx", x)
    assert report.dynamic_batch
    assert report.error < 1e-4


@pytest.mark.parametrize(
    ("name", "overrides", "size", "parameters", "macs"),
    [
        ("resnet18_cifar_ori", {"ratio": 0.5}, 32, 2_797_610, 139.3e6),
        ("vgg16_bn_ori", {"ratio": 0.5}, 32, 4_013_034, 79.07e6),
        ("wrn_28_10_cifar_ori", {"ratio": 0.5}, 32, 9_126_002, 1310.9e6),
        ("densenet_cifar_ori", {"ratio": 0.5}, 32, 45_802, 18.3e6),
        ("resnet18_imagenet_moe", {"num_classes": 200}, 128, 5_639_656 + 269_202, 806.5e6),
    ],
)
def test_sizes_of_thin_and_large_networks(name, overrides, size, parameters, macs):
    with torch.device("meta"):
        model = gatewise.create_model(name, **overrides)
    cost = count(model, torch.empty(1, 3, size, size, device="meta"))
    assert cost.parameters == parameters
    # The published figures have three or four digits.
    assert cost.macs == pytest.approx(macs, rel=3e-3)


def test_weights_start_as_published():
    model = gatewise.create_model("resnet18_cifar_moe", num_classes=10)
    weight = model.stages[3][1].units[1].conv.weight
    assert weight.shape[0] == 512
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    # The router keeps the framework's: uniform up to 1 / sqrt(fan-in).
    assert model.router.stages[2][2].units[1].conv.weight.abs().max() <= (64 * 9) ** -0.5


def test_a_published_file_repeats_the_router_and_is_read_once(tmp_path):
    model = small_model("resnet18_cifar_moe")
    state = export_state(model, "official")
    assert {"conv1.weight", "layer1.0.bn2.weight", "layer2.0.shortcut.0.weight", "linear.bias"} <= set(state)
    router = {key.removeprefix("router."): value for key, value in state.items() if key.startswith("router.")}
    assert {"conv1.weight", "layer3.2.bn2.running_var", "fc.weight"} <= set(router)
    repeated = {f"layer1.0.conv1.router.{key}": value for key, value in router.items()}
    content = {"epoch": 3, "arch": "resnet18_cifar_moe", "state_dict": state | repeated, "router": router}
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    fresh = type(model)(model.config).eval()
    assert load_checkpoint(fresh, tmp_path / "checkpoint.pth.tar").name == "official"
    x = images("resnet18_cifar_moe")
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("resnet50_imagenet_moe", {"conv1.weight", "layer4.0.downsample.1.bias", "layer1.0.conv3.weight", "fc.bias"}),
        ("wrn_28_4_cifar_moe", {"conv1.weight", "block2.layer.0.convShortcut.weight", "block1.layer.0.bn2.bias"}),
        ("vgg16_bn_moe", {"features.0.weight", "features.4.running_mean", "features.7.weight", "classifier.4.bias"}),
        ("densenet_cifar_moe", {"features.denseblock3.denselayer2.conv2.weight", "features.transition2.norm.bias"}),
    ],
)
def test_official_names(name, keys):
    model = small_model(name)
    state = export_state(model, "official")
    assert keys <= set(state)
    fresh = type(model)(model.config).eval()
    load_state(fresh, state, layout="official")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize("name", ["wrn_28_4_imagenet_moe", "densenet_imagenet_moe", "vgg16_moe", "resnet50_cifar_moe"])
def test_official_names_of_other_forms_are_those_of_every_tensor(name):
    with torch.device("meta"):
        model = gatewise.create_model(name)
    state = export_state(model, "official")
    stems = {"wrn_28_4_imagenet_moe": "bn0.weight", "densenet_imagenet_moe": "features.norm0.weight"}
    assert stems.get(name, next(iter(state))) in state
    assert not any("stages" in key or "unit" in key for key in state)
    assert len(state) == len(model.state_dict())


def test_a_digest_of_an_unknown_architecture_has_no_case():
    record = json.loads((FINGERPRINTS / "advmoe" / "resnet18_tiny.json").read_text())
    assert build_case(record | {"config": {"arch": "resnet20_cifar_moe"}}) is None


def test_threads_that_share_a_network_do_not_share_a_choice():
    model, x = small_model("resnet18_cifar_moe"), images("resnet18_cifar_moe", 4)
    choices = [mixed_scores(4, 2), mixed_scores(4, 2).flip(1), torch.eye(2)[torch.zeros(4, dtype=torch.long)]]
    expected = [model(x, scores) for scores in choices]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda scores: model(x, scores), choices * 4))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 4, strict=True))


def test_a_diverged_router_is_told():
    model, x = small_model("resnet18_cifar_moe"), images("resnet18_cifar_moe", 3)
    model.router.fc.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="router produced non-finite scores for 3 of 3 images"):
        model(x)


def test_scores_that_do_not_fit_are_refused():
    model, x = small_model("resnet18_cifar_moe"), images("resnet18_cifar_moe", 3)
    with pytest.raises(ValueError, match=r"must be \(batch, experts\) = \(3, 2\), not \(3, 3\)"):
        model(x, torch.zeros(3, 3))
    dense = small_model("resnet18_cifar_ori")
    with pytest.raises(ValueError, match="has a single expert: it takes no routing scores"):
        dense(x, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="has a single expert and no router"):
        dense.scores(x)


def test_a_single_expert_is_an_ordinary_convolution():
    conv, x = ExpertConv2d(3, 4, 3, 2, n_expert=1, bias=True), torch.randn(2, 3, 8, 8)
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, 2, 1))


def test_a_convolution_with_experts_asks_for_scores():
    conv = ExpertConv2d(3, 4, 3, n_expert=2)
    with pytest.raises(ValueError, match="MoE convolution has no routing scores: call the whole network"):
        conv(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="among 2 experts, not 3"):
        conv(torch.zeros(1, 3, 8, 8), route_to_experts(torch.zeros(1, 3)))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("resnet18_cifar_moe", {"n_expert": 0}, "n_expert must be at least 1, not 0"),
        ("resnet18_cifar_moe", {"ratio": 0.01}, "ratio must leave at least one of 64 channels, not 0.01"),
        ("resnet18_cifar_moe", {"stem": "tiny"}, "stem must be cifar or imagenet, not 'tiny'"),
        ("resnet18_cifar_moe", {"depths": (2, 0, 2, 2)}, "depths must be positive"),
        ("resnet18_cifar_moe", {"input_mean": (0.5, 0.5, 0.5)}, "belong together"),
        ("resnet18_cifar_moe", {"input_mean": (0.5,), "input_std": (0.5,)}, r"one value per channel \(3\)"),
        ("wrn_28_4_cifar_moe", {"depth": 27}, r"6 n \+ 4 with n blocks per group, not 27"),
        ("wrn_28_4_cifar_moe", {"widen_factor": 0}, "widen_factor must be at least 1, not 0"),
        ("vgg16_bn_moe", {"widths": ()}, "every stage of a VGG needs at least one convolution"),
        ("vgg16_bn_moe", {"stem": "imagenet"}, "the VGG has no other stem"),
        ("vgg16_bn_moe", {"input_mean": (0.5,) * 3, "input_std": (0.5,) * 3}, "published VGG ignores"),
        ("densenet_cifar_moe", {"compression": 0.0}, r"compression must be in \(0, 1\], not 0.0"),
        ("densenet_cifar_moe", {"depth": 9}, "at least 10, not 9"),
    ],
)
def test_impossible_options_are_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        gatewise.create_model(name, **fields)
