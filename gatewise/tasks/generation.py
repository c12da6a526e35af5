"""Streaming text generation with a trained language model."""

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
    """Yield the continuation of a prompt piece by piece, until the model ends the document.

    Args:
        prompt: text to continue; empty: start a new document.
        max_new_tokens: maximum number of generated tokens.
        temperature: divisor of the logits; 0 picks the most likely token.
        top_k: number of most likely tokens to sample from; None: all.
        top_p: total probability of the smallest set of tokens to sample from; None: all.
        seed: random seed of the sampling.
        device: device to run on; None: the accelerator if there is one.
    Raises:
        ValueError: if an option is out of range, or the prompt has tokens that are unknown to the network.
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
