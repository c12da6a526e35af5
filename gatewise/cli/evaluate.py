"""Score a trained network on held-out data.

Images: top-1, top-5, loss, accuracy per class, confusion matrix. Text: loss, perplexity, bits per byte. Associative
recall: accuracy, overall and by number of pairs, length and distance.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gatewise.tasks import Evaluation, LanguageEvaluation, RecallEvaluation

_EPILOG = """examples:
  gatewise evaluate --checkpoint runs/flowers/best.ckpt
  gatewise evaluate --checkpoint runs/flowers/best.ckpt --set data.root=/data/other-flowers
  gatewise evaluate --checkpoint from-a-colleague.ckpt --set data.root=/data/flowers
  gatewise evaluate focalnet_tiny_srf --pretrained --set data.name=image_folder data.root=/data/imagenet
  gatewise evaluate --checkpoint runs/writer/best.ckpt --set data.root=/data/other-text
"""
_CLASSES_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gatewise evaluate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("source", nargs="?", metavar="MODEL|RECIPE.yaml", help="registered name or recipe")
    parser.add_argument(
        "--checkpoint",
        metavar="F",
        help="checkpoint that `gatewise train` wrote; it includes the recipe, so MODEL is left out",
    )
    parser.add_argument("--weights", metavar="F", help="weights for MODEL or RECIPE: path, URL or hub id")
    parser.add_argument("--pretrained", action="store_true", help="use the published weights of MODEL")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="recipe fields to override")
    parser.add_argument(
        "--trust-paths",
        action="store_true",
        help="use the files, folders and URLs that --checkpoint names even if no recipe.yaml beside it confirms them",
    )
    parser.add_argument(
        "--split", choices=("test", "val"), default="test", help="part of the data to score on (default: %(default)s)"
    )
    parser.add_argument("--device", help="device, such as cpu or cuda:1 (default: the accelerator, if there is one)")
    parser.add_argument(
        "--json", metavar="F", type=Path, help="write all metrics to F as JSON; '-' prints only the JSON"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate and print. Return exit status 0.

    Raises:
        UserError: if the network or the data to evaluate on is not determined.
    """
    from rich.console import Console

    from gatewise.files import write_text
    from gatewise.tasks import evaluate
    from gatewise.tasks.sources import open_source

    model, data = open_source(
        args.source,
        checkpoint=args.checkpoint,
        weights=args.weights,
        pretrained=args.pretrained,
        assignments=args.set,
        trust_paths=args.trust_paths,
    )
    alone = args.json == Path("-")
    result = evaluate(model, data, args.split, args.device, progress=not alone)
    text = json.dumps(asdict(result), indent=2, allow_nan=False)
    if alone:
        print(text)
        return 0
    if args.json is not None:
        write_text(args.json, text + "\n")
    Console(highlight=False).print(_table(result, args.split))
    return 0


def _table(result: Evaluation | LanguageEvaluation | RecallEvaluation, split: str) -> RenderableType:
    from gatewise.tasks import Evaluation, LanguageEvaluation

    if isinstance(result, Evaluation):
        return _images(result, split)
    return _text(result, split) if isinstance(result, LanguageEvaluation) else _recall(result, split)


def _text(result: LanguageEvaluation, split: str) -> RenderableType:
    from rich.table import Table

    facts = Table.grid(padding=(0, 2, 0, 0))
    speed = f"{result.tokens_per_second:,.0f} a second"
    facts.add_row("[dim]tokens[/dim]", f"{result.tokens:,} ({split}), {result.seconds:.1f} s, {speed}")
    facts.add_row("[dim]loss[/dim]", f"{result.loss:.4f} nats per token")
    facts.add_row("[dim]perplexity[/dim]", f"{result.perplexity:.3f}")
    facts.add_row("[dim]bits per byte[/dim]", f"{result.bits_per_byte:.4f}")
    return facts


def _recall(result: RecallEvaluation, split: str) -> RenderableType:
    from rich.table import Table

    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_row("[dim]examples[/dim]", f"{result.examples:,} ({split}), {result.seconds:.1f} s")
    facts.add_row("[dim]accuracy[/dim]", f"{result.accuracy:.2%}")
    facts.add_row("[dim]loss[/dim]", f"{result.loss:.4f}")
    for name, accuracy in result.slices.items():
        kind, *bounds = name.removeprefix("accuracy_").split("_")
        facts.add_row(f"[dim]{kind} {' to '.join(bounds)}[/dim]", f"{accuracy:.2%}")
    return facts


def _images(result: Evaluation, split: str) -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_row("[dim]images[/dim]", f"{result.images:,} ({split}), {result.seconds:.1f} s")
    facts.add_row("[dim]top-1[/dim]", f"{result.top1:.2%}")
    if result.top5 is not None:
        facts.add_row("[dim]top-5[/dim]", f"{result.top5:.2%}")
    facts.add_row("[dim]loss[/dim]", f"{result.loss:.4f}")
    if result.skipped:
        facts.add_row("[dim]skipped[/dim]", f"{len(result.skipped)} unreadable images")
    classes = Table("class", "images", "accuracy", "most often taken for", box=None, padding=(0, 2, 0, 0))
    order = sorted(range(len(result.class_names)), key=lambda index: result.per_class[result.class_names[index]] or 0.0)
    for index in order[:_CLASSES_SHOWN]:
        name, row = result.class_names[index], result.confusion[index]
        accuracy = result.per_class[name]
        others = [(taken, other) for other, taken in enumerate(row) if other != index]
        taken, other = max(others, default=(0, 0))
        classes.add_row(
            name,
            str(sum(row)),
            "-" if accuracy is None else f"{accuracy:.1%}",
            f"{result.class_names[other]} ({taken})" if taken else "-",
        )
    hidden = len(order) - _CLASSES_SHOWN
    more = [f"... and {hidden} classes with higher accuracy (--json has all)"] if hidden > 0 else []
    return Group(facts, "", classes, *more)
