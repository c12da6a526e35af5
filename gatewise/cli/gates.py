"""Draw the gates of a trained network on an image, or the attention of a language model on a text."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="?", help="image file, for an image network")
    parser.add_argument("--prompt", metavar="TEXT", help="text, for a language model with attention")
    parser.add_argument("--checkpoint", required=True, metavar="F", help="checkpoint that `gatewise train` wrote")
    parser.add_argument(
        "--to", type=Path, default=Path("gates.png"), metavar="F.png", help="image file to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from gatewise.data.images.base import ImageData
    from gatewise.data.text.text import Text
    from gatewise.errors import UserError
    from gatewise.files import write_atomically
    from gatewise.tasks import load_trained
    from gatewise.tasks.training import build_data

    if (args.image is None) == (args.prompt is None):
        raise UserError("give either an image file or --prompt TEXT")
    trained = load_trained(args.checkpoint)
    data = build_data(trained.recipe)
    if args.image is not None and isinstance(data, ImageData):
        figure = _of_image(trained.model, data, args.image)
    elif args.prompt is not None and isinstance(data, Text):
        figure = _of_text(trained.model, data, args.prompt)
    else:
        wanted = "an image file" if isinstance(data, ImageData) else "--prompt TEXT"
        raise UserError(f"{args.checkpoint} was trained on {trained.recipe.data.name}: give {wanted}")
    kind = args.to.suffix.removeprefix(".") or "png"
    write_atomically(args.to, lambda file: figure.savefig(file, format=kind, dpi=150))
    print(f"gates: {args.to}")
    return 0


def _of_image(model, data, path):
    from gatewise.data.images.reading import read_image
    from gatewise.gates import capture, draw

    images = data.transform_for_eval()(read_image(path))[None]
    return draw(data.denormalize(images)[0], capture(model, images))


def _of_text(model, data, prompt):
    from gatewise.gates import attention_diagnostics, draw_diagnostics
    from gatewise.tasks.language_modeling import prompt_tokens

    return draw_diagnostics(
        {model.variant or "network": attention_diagnostics(model, prompt_tokens(data.tokenizer, prompt))}
    )
