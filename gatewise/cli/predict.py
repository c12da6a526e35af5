"""Classify image files with a trained network; a file that cannot be read is named, and the rest still done."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gatewise predict`."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--checkpoint", required=True, metavar="F", help="of a run of `gatewise train`")
    parser.add_argument("--top", type=int, default=5, help="classes per image (default: %(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the accelerator, if there is one)")
    parser.add_argument("--json", action="store_true", help="print a JSON object per image, one a line")


def run(args: argparse.Namespace) -> int:
    """Predict and print; exit status 1 if a file could not be read, else 0.

    Raises:
        UserError: if the checkpoint cannot be used.
    """
    from gatewise.errors import UserError
    from gatewise.tasks import load_trained, predict
    from gatewise.tasks.training import build_data

    if args.top < 1:
        raise UserError(f"--top must be at least 1, not {args.top}")
    trained = load_trained(args.checkpoint)
    transform = build_data(trained.recipe).transform_for_eval()
    failed = 0
    for prediction in predict(trained.model, args.images, transform, trained.class_names, args.top, args.device):
        if prediction.error is not None:
            failed += 1
            print(f"gatewise: {prediction.error}", file=sys.stderr)
        if args.json:
            print(json.dumps(asdict(prediction)), flush=True)
        elif prediction.error is None:
            classes = ", ".join(f"{name} {score:.1%}" for name, score in prediction.classes)
            print(f"{prediction.path}: {classes}", flush=True)
    if failed:
        print(f"gatewise: {failed} of {len(args.images)} files could not be read", file=sys.stderr)
    return 1 if failed else 0
