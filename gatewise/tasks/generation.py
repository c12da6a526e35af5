"""Text from a trained language model, as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gatewise.data.text.tokenizers import StreamDecoder, Tokenizer
from gatewise.tasks.evaluation import best_device
from gatewise.tasks.language_modeling import prompt_tokens


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 200,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Iterator[str]:
    """What a language model writes after a prompt, piece by piece, until it ends the document.

    Args:
        prompt: if empty, a new document is begun.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw from so many most likely tokens only.
        top_p: draw from the fewest most likely tokens that together have this probability.
        seed: what is drawn from.
        device: where to run; None: the accelerator if there is one.
    Raises:
        ValueError: for an option out of its range, or a prompt with tokens that the network does not know.
    """
    device = torch.device(device) if device is not None else best_device()
    network: Any = model.eval().to(device)
    decoder = StreamDecoder(tokenizer)
    new = network.stream(
        prompt_tokens(tokenizer, prompt).to(device),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=(tokenizer.end_of_text,),
        generator=torch.Generator(device).manual_seed(seed),
    )
    for token in new:
        if text := decoder.push(int(token)):
            yield text
    if rest := decoder.flush():
        yield rest
