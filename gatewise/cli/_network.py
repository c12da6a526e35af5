"""Arguments that select a network, shared by the commands that inspect or ship one."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class NamedNetwork:
    """Network in eval mode, and the shape of one sample."""

    name: str
    model: nn.Module
    input_size: tuple[int, ...]

    def example(self, batch_size: int = 1) -> Tensor:
        """Return a random batch for the network."""
        from gatewise.efficiency.inputs import sample_input

        return sample_input(self.model, self.input_size, batch_size)


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --image-size, --length, --num-classes and --checkpoint."""
    parser.add_argument(
        "--image-size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="image height and width (default: the network's own)",
    )
    parser.add_argument(
        "--length", type=int, metavar="T", help="sequence length in tokens (default: the network's own)"
    )
    parser.add_argument("--num-classes", type=int, metavar="N", help="number of classes (default: as published)")
    parser.add_argument("--checkpoint", metavar="FILE", help="file with weights to load into MODEL")


def find_network(model: str, args: argparse.Namespace) -> NamedNetwork:
    """Return the network registered as `model`, or the trained one if `model` is a checkpoint file.

    Raises:
        UnknownNameError: if there is no such name or file.
        CheckpointError: if a checkpoint cannot be read or does not fit.
        UserError: if a size is not positive, or an option contradicts a trained checkpoint or the kind of input.
    """
    from gatewise.errors import UserError

    if args.image_size is not None and min(args.image_size) < 1:
        raise UserError(f"--image-size takes two positive numbers, not {args.image_size[0]} {args.image_size[1]}")
    if args.length is not None and args.length < 1:
        raise UserError(f"--length must be positive, not {args.length}")
    found = _trained(model, args) if Path(model).is_file() else _registered(model, args)
    of_images = len(found.input_size) >= 3
    if args.image_size is not None:
        if not of_images:
            raise UserError(f"--image-size is for images, and {found.name} takes sequences: use --length")
        return replace(found, input_size=(*found.input_size[:-2], *args.image_size))
    if args.length is not None:
        if of_images:
            raise UserError(f"--length is for sequences, and {found.name} takes images: use --image-size")
        return replace(found, input_size=(args.length,))
    return found


def _trained(path: str, args: argparse.Namespace) -> NamedNetwork:
    from gatewise.errors import UserError
    from gatewise.tasks.trained import load_trained

    if args.checkpoint is not None or args.num_classes is not None:
        raise UserError(f"{path} already holds weights and classes: leave out --checkpoint and --num-classes")
    trained = load_trained(path)
    return NamedNetwork(trained.recipe.model.name, trained.model, trained.input_size)


def _registered(name: str, args: argparse.Namespace) -> NamedNetwork:
    from gatewise.catalog.checkpoint import load_checkpoint
    from gatewise.catalog.factory import create_model
    from gatewise.catalog.registry import family_of

    overrides = {} if args.num_classes is None else {"num_classes": args.num_classes}
    input_size = family_of(name).variants[name].input_size
    model = create_model(name, **overrides)
    if args.checkpoint is not None:
        load_checkpoint(model, args.checkpoint)
    return NamedNetwork(name, model.eval(), input_size)
