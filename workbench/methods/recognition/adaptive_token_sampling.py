"""Adaptive token sampling: a vision transformer goes on with the tokens that its class token looks at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor

from workbench.knob import Knob
from workbench.problems.recognition import Recognition
from workbench.registry import Step, method
from workbench.rng import Rng, of_samples

PICKS = ("sampled", "top", "random")


def significance(attention: Tensor, values: Tensor) -> Tensor:
    """Scores (b, N - 1) of all tokens but the class token, together 1: A_1j |V_j|, A_1j the class token's attention
    (b, heads, N) summed over heads, |V_j| the norm of the value over all heads (b, heads, N, width / heads).

    Source: arXiv 2111.15667, equation 3.
    """
    norms = values.square().sum((1, 3)).sqrt()
    scores = (attention.sum(1) * norms)[:, 1:]
    return scores / scores.sum(1, keepdim=True)


def sampled(scores: Tensor, cap: int) -> Tensor:
    """Which tokens (N,) bool inverse transform sampling keeps of scores (N,): those nearest to `cap` fixed heights.

    Scores are sorted, summed up and scaled so that the sums end at 1; the heights lie evenly from the least sum above 0
    to 1. Several heights may meet one token, so few tokens stay where scores are peaked. The class token is no part.
    Source: arXiv 2111.15667, section 3.2, with the heights of its authors' code.
    """
    order = scores.double().argsort(stable=True)
    sums = scores.double()[order].cumsum(0)
    sums = sums / sums[-1]
    heights = torch.linspace(float(sums[sums > 0][0]), 1.0, cap, dtype=torch.float64)
    nearest = (sums[None] - heights[:, None]).abs().argmin(1)
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    kept[order[nearest]] = True
    return kept


@method(version=1, source="ATS, arXiv 2111.15667, sec. 3",
        cost="1 + 2 * min(n_blocks, depth) + max(min(n_blocks, depth) - first_block, 0)")
def adaptive_token_sampling(
    problem: Recognition, rng: Rng, *,
    cap: Annotated[int, Knob(low=1, high=1024, soft=(1, 64), step=1, unit="tokens", small=5,
                             help="the most tokens that a block may go on with, the class token beside")] = 32,
    first_block: Annotated[int, Knob(low=0, high=48, soft=(0, 12), step=1, small=1, unit="blocks",
                                     help="blocks that all tokens go through before any is dropped")] = 2,
    pick: Annotated[str, Knob(choices=PICKS, help="by the paper's sampling, the best by score, or as many as the "
                                                  "sampling would keep, at random")] = "sampled",
    n_blocks: Annotated[int, Knob(low=1, high=48, soft=(1, 12), step=1, unit="blocks", small=3,
                                  help="blocks that are run; more than there are: all")] = 48,
) -> Iterator[Step]:
    """Adaptive token sampling: each block keeps the tokens that inverse sampling of its attention finds; untrained.

    In a block that samples, keys and values are those of all its tokens, so dropped ones contribute once more; queries,
    projection and MLP are of the class token and the kept ones alone. Images with as many tokens go through a block
    together, so nothing is filled up. "top" keeps as many as `cap`, the best by score; "random" as many as "sampled"
    would keep. State: logits (n_samples, n_classes), read after each block. info: i, kept (n_samples, patches) bool,
    logits' classes "read" (n_samples,); trace: tokens, kept patches of each image.
    Cost: ``1 + 2 * min(n_blocks, depth) + max(min(n_blocks, depth) - first_block, 0)`` evaluations per sample:
    embedding, a block and a head each, two calls in blocks that sample. FLOPs are of the tokens that are there.
    Raises ValueError never, beyond knobs out of their bounds.
    """
    n = rng.n_samples
    patches = problem.layers.n_tokens - 1
    with torch.no_grad():
        tokens = list(problem.embed(problem.cases_of(rng).pixels.to(problem.device, problem.dtype)))
    places = [torch.arange(patches) for _ in range(n)]  # of the patches that are left, by image
    for i in range(min(n_blocks, problem.layers.n_blocks)):
        logits = torch.empty((n, problem.layers.n_classes), dtype=problem.dtype, device=problem.device)
        with torch.no_grad():
            for group in _alike(tokens):
                batch = torch.stack([tokens[k] for k in group])
                with of_samples(group):
                    if i < first_block:
                        for k, row in zip(group, problem.block(batch, i), strict=True):
                            tokens[k] = row
                    else:
                        attention, keys, values = problem.look(batch, i)
                        for row, (k, scores) in enumerate(zip(group, significance(attention, values), strict=True)):
                            kept = _picked(scores, cap, pick, rng.stream(k))
                            places[k] = places[k][kept.cpu()]
                            rows = torch.cat((torch.ones(1, dtype=torch.bool, device=kept.device), kept))
                            tokens[k] = torch.cat((batch[row][rows], batch[row][:0]))
                        for smaller in _alike([tokens[k] for k in group]):
                            own = [group[j] for j in smaller]
                            with of_samples(own):
                                done = problem.attend(torch.stack([tokens[k] for k in own]), keys[smaller],
                                                      values[smaller], i)
                            for k, row_done in zip(own, done, strict=True):
                                tokens[k] = row_done
            for group in _alike(tokens):
                with of_samples(group):
                    logits[group] = problem.head(torch.stack([tokens[k] for k in group])).to(logits)
        left = torch.zeros((n, patches), dtype=torch.bool)
        for k, place in enumerate(places):
            left[k, place] = True
        yield Step(logits, {"i": i, "kept": left, "read": logits.argmax(1)}, "",
                   {"tokens": left.sum(1).double()})


def _alike(tokens: list[Tensor]) -> list[list[int]]:
    """The images that have as many tokens left, together."""
    groups: dict[int, list[int]] = {}
    for k, rows in enumerate(tokens):
        groups.setdefault(len(rows), []).append(k)
    return list(groups.values())


def _picked(scores: Tensor, cap: int, pick: str, stream: torch.Generator) -> Tensor:
    if pick == "top":
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.argsort(descending=True, stable=True)[:cap]] = True
        return kept
    kept = sampled(scores, cap)
    if pick == "random":
        kept = kept[torch.randperm(len(kept), generator=stream).to(kept.device)]
    return kept
