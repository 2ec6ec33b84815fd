"""Token by token with Megatron's own caches: keys and values, convolution and SSM states."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Choose = Callable[[Tensor], int]


class Cache:
    """What a model remembers of one sequence, in the submodel that is running.

    ``megatron.core.inference.contexts.StaticInferenceContext`` holds it: the prompt goes in at once, then one token at
    a time, each at the cost of one token. Another submodel has other states and needs a cache of its own.

    Args:
        model: whole on this process's device, in evaluation mode.
        capacity: tokens that it can hold.
    """

    def __init__(self, model: nn.Module, capacity: int) -> None:
        from megatron.core.inference.contexts import StaticInferenceContext

        self.model = model
        self.context = StaticInferenceContext(max_batch_size=1, max_sequence_length=capacity)
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Logits [vocabulary] of the token after ``tokens``: one or more in the first call, one in later ones."""
        from megatron.core.inference.utils import InferenceMode

        start = self.context.sequence_len_offset
        assert tokens and (start == 0 or len(tokens) == 1)
        ids = torch.tensor([list(tokens)], device=self.device)
        positions = torch.arange(start, start + len(tokens), device=self.device)[None]
        if start:
            self.context.enable_decode_mode()
        with InferenceMode.active():
            logits = self.model(
                ids, positions, None, inference_context=self.context, runtime_gather_output=True
            )
        self.context.sequence_len_offset += len(tokens)
        return logits[0, -1]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the most probable at temperature 0, else drawn from the ``top_p`` nucleus.

    Draws are made on the CPU from a generator of that seed: the same on every device.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def chooser(self) -> Choose:
        """A function from logits [vocabulary] to a token; its draws continue from call to call."""
        generator = torch.Generator().manual_seed(self.seed)

        def choose(logits: Tensor) -> int:
            if self.temperature == 0:
                return int(logits.argmax())
            probs = torch.softmax(logits.double().cpu() / self.temperature, -1)
            return int(torch.multinomial(nucleus(probs, self.top_p), 1, generator=generator))

        return choose


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Without the least probable tokens, whose sum stays below 1 - ``top_p``; the most probable always stays.

    Not normalised again. Holtzman et al., arXiv 1904.09751.
    """
    ordered, index = probs.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probs).scatter(-1, index, ordered * (before < top_p))


@dataclass(frozen=True)
class Written:
    """Tokens that a model wrote, and the one with which it stopped, which is not among them.

    ``stopped_at`` is ``None`` where the limit was reached.
    """

    tokens: list[int]
    stopped_at: int | None


def write(
    model: nn.Module,
    prompt: Sequence[int],
    limit: int,
    *,
    stops: Container[int],
    choose: Choose,
    watch: Callable[[int], object] = lambda token: None,
) -> Written:
    """Continue a prompt by at most ``limit`` tokens.

    Args:
        stops: tokens that end it.
        watch: called with every token as it is written.
    """
    tokens: list[int] = []
    if limit == 0:
        return Written(tokens, None)
    cache = Cache(model, len(prompt) + limit)
    logits = cache.advance(prompt)
    while True:
        token = choose(logits)
        if token in stops:
            return Written(tokens, token)
        tokens.append(token)
        watch(token)
        if len(tokens) == limit:
            return Written(tokens, None)
        logits = cache.advance([token])
