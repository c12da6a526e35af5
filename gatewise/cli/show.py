"""Show one network: its card, and the output shape and cost of each stage."""

from __future__ import annotations

import argparse

from gatewise.cli._network import add_network_arguments, find_network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="registered name or trained checkpoint")
    add_network_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from gatewise.efficiency.card import model_card
    from gatewise.efficiency.cost.count import count

    if args.checkpoint is None:
        # Without storage, even the largest networks cost neither memory nor time.
        with torch.device("meta"):
            found = find_network(args.model, args)
    else:
        found = find_network(args.model, args)
    cost = count(found.model, found.example())
    console = Console(highlight=False)
    console.print(_card(model_card(found.name)))
    console.print(_stages(cost, found.input_size))
    return 0


def _card(card):
    from rich.table import Table

    from gatewise.catalog.papers import arxiv_url

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("name", card.name)
    table.add_row("paper", f"{card.paper_title} ({card.paper})")
    if card.arxiv:
        table.add_row("", arxiv_url(card.arxiv))
    table.add_row("task", card.task)
    table.add_row("input", " x ".join(map(str, card.input_size)))
    if card.weights is None:
        table.add_row("weights", "none published")
    else:
        table.add_row("weights", f"{card.weights.source} ({card.weights.license})")
        table.add_row("score", card.weights.score)
    return table


def _stages(cost, input_size):
    from rich.table import Table

    table = Table(title=f"cost of one sample of {' x '.join(map(str, input_size))}", title_justify="left")
    table.add_column("stage")
    table.add_column("output", no_wrap=True)
    for title in ("parameters", "MACs", "activations"):
        table.add_column(title, justify="right", no_wrap=True)
    for stage in cost.stages:
        shape = " x ".join(map(str, stage.output_shape[1:])) if stage.output_shape else "-"
        table.add_row(stage.name, shape, *_numbers(stage))
    table.add_section()
    table.add_row("whole", "", *_numbers(cost))
    return table


def _numbers(cost) -> list[str]:
    return [f"{cost.parameters:,}", f"{cost.macs:,}", f"{cost.activation_bytes / 2**20:.1f} MiB"]
