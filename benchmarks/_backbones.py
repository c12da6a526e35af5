"""Every family's smallest member, scaled to 32x32 images."""

from __future__ import annotations

from typing import Any

TVCONV = {"hidden": 16, "hidden_layers": 1}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "FocalNet": (
        "focalnet_tiny_srf",
        {
            "patch_size": 2,
            "embed_dim": 24,
            "depths": [1, 1, 1],
            "focal_levels": [2] * 3,
            "focal_windows": [3] * 3,
            "use_postln_in_modulation": True,
        },
    ),
    "HorNet": (
        "hornet_tiny_7x7",
        {
            "patch_size": 2,
            "embed_dims": [24, 48, 96],
            "depths": [1, 1, 1],
            "orders": [2, 3, 4],
            "layer_scale_init": 1.0,
            "out_indices": [0, 1, 2],
        },
    ),
    "InceptionNeXt": (
        "inception_next_atto",
        {
            "patch_size": 2,
            "embed_dims": [24, 48, 96],
            "depths": [1, 2, 1],
            "mlp_ratios": [4, 4, 3],
            "layer_scale_init": 1.0,
            "out_indices": [0, 1, 2],
        },
    ),
    "ConvNeXt": (
        "convnext_tiny_k5",
        {
            "patch_size": 2,
            "embed_dims": [24, 48, 96],
            "depths": [1, 2, 1],
            "layer_scale_init": 1.0,
            "out_indices": [0, 1, 2],
        },
    ),
    "UniRepLKNet": (
        "unireplknet_a",
        {
            "embed_dims": [32, 64, 96, 128],
            "depths": [1, 1, 1, 1],
            "kernel_sizes": [[3], [5], [5], [3]],
            "layer_scale_init": 1.0,
        },
    ),
    "OverLoCK": (
        "overlock_xt",
        {
            "embed_dims": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "focus_depths": [1, 1],
            "focus_num_heads": [2, 2],
            "kernel_sizes": [9, 7, 5, 5],
            "small_kernel_size": 3,
            "projection_dim": 128,
            "auxiliary_head": False,
        },
    ),
    "ConViT": (
        "convit_tiny",
        {"image_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "local_up_to_layer": 3},
    ),
    "ViG": ("vig_tiny", {"image_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}),
    "ViG-H": (
        "vig_h_tiny",
        {"embed_dims": [32, 64, 96], "depths": [1, 2, 1], "num_heads": [1, 2, 3], "out_indices": [0, 1, 2]},
    ),
    "DeiT": ("deit_tiny", {"image_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}),
    "SpaRTAN": (
        "spartan_tiny",
        {"embed_dims": [32, 48, 64], "depths": [1, 2, 1], "expand_ratios": [4, 2, 2], "out_indices": [0, 1, 2]},
    ),
    "MOAT": (
        "tiny_moat_0",
        {
            "stem_dims": [16, 16],
            "embed_dims": [24, 48, 64, 96],
            "depths": [1, 1, 2, 1],
            "stage_strides": [1, 2, 1, 2],
            "position_sizes": [None, None, 8, 4],
            "head_dim": 16,
            # The published momentum is for runs of many thousand steps.
            "norm_momentum": 0.1,
        },
    ),
    "Gated-SwinRMT": (
        "gated_swinrmt_tiny_swat",
        {"embed_dims": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 4], "projection_dim": 128},
    ),
    "ResNet": ("resnet50", {"width_mult": 0.25, "depths": [1, 1, 2, 1]}),
    "ResNet, max pools": ("resnet50_max", {"width_mult": 0.25, "depths": [1, 1, 2, 1]}),
    "ResNet, EvoNorm-S0": (
        "resnet50_evonorm_s0",
        {"channels": [64, 128, 256, 512], "stem_channels": 32, "depths": [1, 1, 2, 1]},
    ),
    "ViT, max pools": ("vit_ti_max", {"image_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}),
    "MobileNetV2": (
        "mobilenetv2_035",
        {"rows": [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 2, 2], [6, 64, 2, 2]], "width_mult": 1.0},
    ),
    "MobileNetV2, TVConv": (
        "tvconv_mobilenet_v2_x0_1",
        {
            "rows": [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 2, 2], [6, 64, 2, 2]],
            "width_mult": 1.0,
            "head_channels": 256,
            "input_size": [32, 32],
            "operator": TVCONV,
            "embed_dim": 128,
            "logit_scale": 1.0,
        },
    ),
    "MobileNetV5": (
        "mobilenetv5_300m_enc",
        {
            "blocks": [
                ["er_k3_s1_e4_c24"],
                ["uir_a3_k5_s2_e4_c48", "uir_a5_k0_s1_e4_c48"],
                ["uir_a3_k5_s2_e4_c64", "mqa_h4_d16_c64", "uir_a0_k0_s1_e2_c64"],
            ],
            "stem_dim": 16,
            "fused_dim": 128,
            "grid_size": 4,
            "out_indices": [0, 1, 2],
        },
    ),
    "ConvFirstNet": (
        "convfirstnet_small",
        {
            "embed_dims": [32, 64, 96],
            "depths": [1, 2, 2],
            "blocks": ["convfirst", "convfirst", "mbconv"],
            "expand_ratios": [4, 4, 4],
            "out_indices": [0, 1, 2],
        },
    ),
    "AdvMoE ResNet": ("resnet18_cifar_moe", {"depths": [1, 1, 1, 1], "ratio": 0.125}),
    "Activator": ("activator_cifar10", {"embed_dim": 96, "hidden_dim": 192, "depth": 4, "drop_rate": 0.0}),
    "NiNformer": (
        "ninformer_cifar10",
        {"embed_dim": 64, "hidden_dim": 128, "depth": 3, "num_tokens": 64, "drop_rate": 0.0},
    ),
    "CE-Encoder": ("herseg_encoder_24", {"patch_size": 4, "embed_dim": 48, "depths": [1, 1, 2], "num_heads": [3, 6]}),
}
"""Registered name, and what is changed for 32x32 images and about ten million multiply-accumulates."""
