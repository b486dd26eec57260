"""The recognition family: less computation per input. Here vision transformers, one block at a time, on fewer tokens.

A sample is an image of its own. Networks are priced by the tokens that a call really holds, so what is dropped is not
charged, and what only fills up a batch would be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.cost import Network, Price
from workbench.family import Family, register
from workbench.problem import Problem
from workbench.problems.fingerprint import Unchanged, digest_of_modules, digest_of_values
from workbench.quality import Drawn, Metric, Quality, proportion, register_metric

register_metric(Metric(
    "accuracy", "accuracy", "", True, 16, "share of images that are read right"))
register_metric(Metric(
    "lost_information", "distance from the full model's answer", "nats", False, 16,
    "Kullback-Leibler divergence of the answer's class probabilities from those of all tokens through all blocks"))


@dataclass(frozen=True)
class Images:
    """Test cases: pixels (n, channels, H, W) and labels (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, part: slice) -> Images:
        return Images(self.pixels[part], self.labels[part])


@dataclass(frozen=True, kw_only=True)
class Recognition(Problem):
    """Images to be read by a vision transformer whose parts are called one by one.

    draw(seed, n) -> Images, of which a smaller n is a prefix. embed(pixels) -> tokens (b, N, width), the class token
    first. block(tokens, i) -> tokens. look(tokens, i) -> (class token's attention (b, heads, N), keys, values).
    attend(kept (b, M, width), keys, values, i) -> the rest of block i for the rows that stay. head(tokens) -> logits.
    grid: patches down and across.
    """

    layers: Any
    draw: Callable[[int, int], Images]
    classes: Sequence[str]
    embed: Network
    block: Network
    look: Network
    attend: Network
    head: Network
    family: ClassVar[str] = "recognition"
    sharing: ClassVar[str] = "none"

    def wrapped(self, wrap: Callable[[str, Network], Network]) -> Recognition:
        return replace(self, embed=wrap("embed", self.embed), block=wrap("block", self.block),
                       look=wrap("look", self.look), attend=wrap("attend", self.attend), head=wrap("head", self.head))

    def cases(self, seed: int, n: int) -> Images:
        """The seed's images."""
        return self.draw(seed, n)

    def sizes(self, knobs: Mapping[str, Any]) -> dict[str, int]:
        """depth: blocks of the model."""
        return {"depth": self.layers.n_blocks}

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across; square images."""
        side = math.isqrt(self.layers.n_tokens - 1)
        return side, side

    @property
    def prices(self) -> Mapping[str, Price]:
        """Matrix products at the shapes of the call, two operations per multiply and add."""
        own = self.layers
        w, mlp = own.width, own.mlp_width

        def each(flops: Callable[..., float]) -> Price:
            return lambda first, *rest: (len(first), len(first) * flops(first, *rest))

        return {
            "embed": each(lambda pixels: own.embed_flops), "head": each(lambda tokens: own.head_flops),
            "block": each(lambda tokens, i: 4.0 * w * (2 * tokens.shape[1] * w + tokens.shape[1] ** 2
                                                       + tokens.shape[1] * mlp)),
            "look": each(lambda tokens, i: 4.0 * tokens.shape[1] * w * w + 2.0 * w * w + 2.0 * tokens.shape[1] * w),
            "attend": each(lambda kept, keys, values, i: 4.0 * w * kept.shape[1] * (w + keys.shape[2] + mlp))}


PARTS = ("embed", "block", "look", "attend", "head")


def glyphs_in_clutter() -> Recognition:
    """The embedded problem: a letter among fragments of others, 48 x 48 pixels, 36 classes, 64 patches.

    The embedded vision transformer reads it (`workbench.zoo.load_vision`). Test images are of the held-out stream.
    """
    from workbench.zoo import CLASSES
    from workbench.zoo.clutter import clutter
    from workbench.zoo.vision import load_vision

    source = "from workbench.problems.recognition import glyphs_in_clutter\n\nproblem = glyphs_in_clutter()"
    return from_vision(load_vision(), lambda seed, n: Images(*clutter(n, "held_out", seed)), list(CLASSES),
                       name="glyphs in clutter", source=source)


def tiny(n_blocks: int = 6, seed: int = 0) -> Recognition:
    """A random transformer of width 16 on random images of 16 patches: small, for tests of methods."""
    from transformers import ViTConfig, ViTForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = ViTForImageClassification(ViTConfig(
            hidden_size=16, num_hidden_layers=n_blocks, num_attention_heads=2, intermediate_size=32, image_size=16,
            patch_size=4, num_channels=1, num_labels=3, initializer_range=0.5)).eval()

    def draw(seed: int, n: int) -> Images:
        source = torch.Generator().manual_seed(seed)
        rows = [(torch.randn((1, 16, 16), generator=source), torch.randint(3, (), generator=source))
                for _ in range(n)]
        return Images(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))

    return from_vision(model, draw, ["a", "b", "c"], name=f"random transformer of {n_blocks} blocks")


def from_vision(model: Any, draw: Callable[[int, int], Images], classes: Sequence[str], *, name: str = "own model",
                source: str = "") -> Recognition:
    """A problem of one's own vision transformer: transformers' ViTForImageClassification, which DeiT's files fit too.

    draw(seed, n) -> Images, preprocessed as the model expects them; of one seed, a smaller n is a prefix. Nothing is
    moved or changed, and the model must stay as it is. Raises TypeError for another kind of model, ValueError where
    classes are not as many as the model tells apart, or it is in training mode.
    """
    from workbench.zoo.vision import Layers

    layers = Layers(model)
    if model.training:
        raise ValueError(f"{name} is in training mode, where dropout changes its answers: call .eval() first")
    if len(classes) != layers.n_classes:
        raise ValueError(f"{len(classes)} classes: expected {layers.n_classes}, as many as the model tells apart")

    def look(tokens: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
        normed = layers.norm(i, tokens)
        keys, values = layers.keys_values(i, normed)
        return layers.attention(layers.queries(i, normed[:, :1]), keys)[:, :, 0], keys, values

    def attend(kept: Tensor, keys: Tensor, values: Tensor, i: int) -> Tensor:
        queries = layers.queries(i, layers.norm(i, kept))
        return layers.finish(i, kept, layers.attention(queries, keys), values)

    def judge(answer: Tensor, cases: Images) -> dict[str, Quality]:
        with torch.no_grad():
            whole = torch.cat([layers(part) for part in cases.pixels.split(64)])
        ours, full = answer.double().log_softmax(1), whole.double().log_softmax(1)
        drawn = Drawn(len(answer))
        return {"accuracy": proportion(answer.argmax(1) == cases.labels, drawn),
                "lost_information": drawn.mean((full.exp() * (full - ours)).sum(1))}

    weight = next(model.parameters())
    depth = layers.n_blocks
    flops = {"embed": layers.embed_flops, "head": layers.head_flops,
             **dict.fromkeys(("block", "look", "attend"), layers.flops() / depth)}
    return Recognition(
        name=name, digest=digest_of_values(name, digest_of_modules([(model, model.config.to_dict())])), judge=judge,
        flops={part: flops[part] for part in PARTS}, layers=layers, draw=draw, classes=list(classes),
        embed=layers.embed, block=lambda tokens, i: layers.block(i, tokens), look=look, attend=attend, head=layers.head,
        dtype=weight.dtype, device=str(weight.device), source=source, check=Unchanged({"the model": model}),
        reference=("adaptive_token_sampling", {"first_block": depth}),
        baseline=("adaptive_token_sampling", {"pick": "random"}))


def _told(problem: Any, states: Sequence[Tensor], infos: Sequence[Mapping[str, Any]]) -> None:
    """Each step tells which patches are still there, of fewer and fewer."""
    for before, after in pairwise(infos):
        assert bool((after["kept"] <= before["kept"]).all())
    assert infos[-1]["kept"].shape == (2, problem.layers.n_tokens - 1)


register(Family(
    "recognition", "n_blocks", lambda problem, knobs: (problem.layers.n_classes,),
    [("workbench.problems.recognition:tiny", {"seed": 3}), ("workbench.problems.recognition:tiny", {"n_blocks": 5})],
    _told, question="How few tokens of an image are enough to read it?", sample="image", sizes=("depth",)))
