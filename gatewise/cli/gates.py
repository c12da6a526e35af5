"""Draw what the gates of a trained network let through of an image."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="an image file")
    parser.add_argument("--checkpoint", required=True, metavar="F", help="of a run of `gatewise train`")
    parser.add_argument("--to", type=Path, default=Path("gates.png"), metavar="F.png", help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from gatewise.data.images import read_image
    from gatewise.gates import capture, draw
    from gatewise.tasks import load_trained
    from gatewise.tasks.training import build_data

    trained = load_trained(args.checkpoint)
    data = build_data(trained.recipe)
    images = data.transform_for_eval()(read_image(args.image))[None]
    figure = draw(data.denormalize(images)[0], capture(trained.model, images))
    args.to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.to, dpi=150)
    print(f"gates: {args.to}")
    return 0
