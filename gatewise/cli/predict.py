"""Classify image files or continue a text with a trained network.

Image files that cannot be read are reported, and the others are still classified. Text is printed as it is generated.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gatewise.tasks import Trained

_EPILOG = """examples:
  gatewise predict flower.jpg --checkpoint runs/flowers/best.ckpt
  gatewise predict --prompt "def main" --checkpoint runs/writer/best.ckpt --max-tokens 500
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gatewise predict`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files to classify")
    parser.add_argument("--checkpoint", required=True, metavar="F", help="checkpoint that `gatewise train` wrote")
    parser.add_argument(
        "--top", type=int, default=5, help="number of classes to print per image (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="text to continue, for a language model; '-' reads standard input"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=200, metavar="N", help="number of tokens to generate (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="sampling temperature; 0 picks the most likely token (default: %(default)s)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens only")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the smallest set of tokens with total probability P"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the sampling (default: %(default)s)"
    )
    parser.add_argument("--device", help="device, such as cpu or cuda:1 (default: the accelerator, if there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON, one object per line")


def run(args: argparse.Namespace) -> int:
    """Predict and print. Return 1 if a file could not be read or classified, else 0.

    Raises:
        UserError: if the checkpoint cannot be used or holds another kind of network.
    """
    from gatewise.errors import UserError
    from gatewise.tasks import load_trained

    if args.top < 1:
        raise UserError(f"--top must be at least 1, not {args.top}")
    if (args.prompt is None) == (not args.images):
        raise UserError("name image files for a classifier, or give --prompt TEXT to a language model")
    trained = load_trained(args.checkpoint)
    return _classify(trained, args) if args.prompt is None else _write(trained, args)


def _classify(trained: Trained, args: argparse.Namespace) -> int:
    from gatewise.errors import UserError
    from gatewise.tasks import predict
    from gatewise.tasks.sources import image_preparation

    if not trained.class_names:
        raise UserError(f"{args.checkpoint} is of a network for {trained.recipe.data.name}, not for images")
    failed = 0
    transform = image_preparation(trained)
    for prediction in predict(trained.model, args.images, transform, trained.class_names, args.top, args.device):
        if prediction.error is not None:
            failed += 1
            print(f"gatewise: {prediction.error}", file=sys.stderr)
        if args.json:
            print(json.dumps(asdict(prediction), allow_nan=False), flush=True)
        elif prediction.error is None:
            classes = ", ".join(f"{name} {score:.1%}" for name, score in prediction.classes)
            print(f"{prediction.path}: {classes}", flush=True)
    if failed:
        print(f"gatewise: {failed} of {len(args.images)} files could not be read or classified", file=sys.stderr)
    return 1 if failed else 0


def _write(trained: Trained, args: argparse.Namespace) -> int:
    from gatewise.errors import UserError
    from gatewise.tasks import generate

    if trained.tokenizer is None:
        raise UserError(f"{args.checkpoint} is of a network for {trained.recipe.data.name}, not for text")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    pieces = generate(
        trained.model,
        trained.tokenizer,
        prompt,
        args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        device=args.device,
    )
    if args.json:
        print(json.dumps({"prompt": prompt, "text": "".join(pieces)}))
        return 0
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
