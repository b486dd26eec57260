"""The embedded vision transformer: its pictures, what it knows, its layers one by one, and the recipe that makes it."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from workbench.cost import flops_per_row
from workbench.zoo import WEIGHTS, folder_digest, load_vision
from workbench.zoo.clutter import FRAGMENTS, NOISE, SIDE, clutter, patches_of, scenes
from workbench.zoo.glyphs import CLASSES
from workbench.zoo.vision import FOLDER, Layers, block_flops

N = 600  # fresh images for the scores
FRESH = 7_000_003  # their seed, which neither the recipe nor its scores use


@pytest.fixture(scope="module")
def scores() -> dict[str, Any]:
    return json.loads((WEIGHTS / "clutter-scores.json").read_text())


@pytest.fixture(scope="module")
def model() -> Any:
    return load_vision()


@pytest.fixture(scope="module")
def exact() -> Any:
    """A model in float64 of another shape than the embedded one, with weights large enough that every part tells."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=24, patch_size=8, num_channels=3, hidden_size=40, num_hidden_layers=3,
                       num_attention_heads=5, intermediate_size=56, num_labels=7, attn_implementation="sdpa",
                       layer_norm_eps=1e-3)  # transformers' eager attention has a softmax in float32
    torch.manual_seed(0)
    model = ViTForImageClassification(config).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    return model


def pictures(n: int, **options: Any) -> torch.Tensor:
    return torch.randn(n, 3, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64, **options)


def test_importing_is_light() -> None:
    code = ("import sys, workbench.zoo, workbench.zoo.clutter, workbench.zoo.vision; "
            "assert not {'transformers', 'matplotlib', 'PIL'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60)


# ---- the pictures ----


def test_clutter_is_the_same_stream_each_time() -> None:
    images, labels = clutter(300, "train", seed=3)
    assert images.shape == (300, 1, SIDE, SIDE) and images.dtype == torch.float32
    assert labels.shape == (300,) and labels.dtype == torch.int64
    assert images.min() >= -1 and images.max() <= 1
    again, same = clutter(300, "train", seed=3)
    assert torch.equal(images, again) and torch.equal(labels, same)
    for other in (clutter(300, "held_out", seed=3), clutter(300, "train", seed=4)):
        assert (other[1] != labels).double().mean() > 0.9
        assert (other[0] - images).abs().amax(dim=(1, 2, 3)).min() > 0.1  # not one image shared
    for arguments, complaint in (
        ({"n": 0}, "n is 0; it must be an integer of at least 1"),
        ({"n": 2, "split": "test"}, "split is 'test'; it must be one of 'train', 'held_out'"),
        ({"n": 2, "seed": -1}, "seed is -1; it must be an integer of at least 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            clutter(**arguments)


def test_an_image_does_not_depend_on_those_drawn_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller draw is a prefix, also across the pieces in which large ones are made."""
    images, labels = clutter(200, seed=1)
    few = clutter(23, seed=1)
    assert torch.equal(few[1], labels[:23])
    torch.testing.assert_close(few[0], images[:23], rtol=0, atol=1e-5)
    monkeypatch.setattr("workbench.zoo.clutter._CHUNK", 64)
    pieces = clutter(200, seed=1)
    assert torch.equal(pieces[1], labels)
    torch.testing.assert_close(pieces[0], images, rtol=0, atol=1e-5)


def test_letters_lie_anywhere_in_clutter() -> None:
    n = 3600
    images, ink, labels = scenes(n, seed=5)
    counts = labels.bincount(minlength=len(CLASSES)).double()
    freedom = len(CLASSES) - 1
    chi_square = ((counts - n / len(CLASSES)) ** 2).sum().item() / (n / len(CLASSES))
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)
    is_letter = patches_of(ink)
    assert is_letter.sum(dim=1).min() >= 2 and 8 < is_letter.sum(dim=1).double().mean() < 14
    assert is_letter.any(dim=0).all()  # of 64 patches there is none that no letter touches
    # The letter covers what it lies on, noise aside: its ink is at least .75 of the range from -1 to 1.
    assert images[ink > 0.99].quantile(0.05) > 0.5 - 2 * 1.645 * NOISE - 0.05
    # Away from the letter only fragments are brighter than the ground, at most .45, and five deviations of noise; one
    # image in eleven has none of them.
    bright = images[:, 0] > 2 * (0.45 + 5 * NOISE) - 1
    strewn = (bright & (F.max_pool2d(ink, 3, 1, 1)[:, 0] == 0)).sum(dim=(1, 2))
    assert (strewn == 0).double().mean() > 1 / (FRAGMENTS + 1) - 5 * math.sqrt(0.1 / n)
    assert (strewn > 9).double().mean() > 0.5


def upright(ink: torch.Tensor) -> torch.Tensor:
    """Each letter of ink (n, 1, 48, 48) cut out along its bounds and brought to 14.5 pixels of height in 24 x 24."""
    images = []
    for letter in ink[:, 0]:
        rows, columns = (torch.nonzero((letter > 0.3).any(dim=dim))[:, 0] for dim in (1, 0))
        height = (rows[-1] - rows[0] + 1).item()
        scale = height / 14.5 * 24 / SIDE
        middle = [(edge[0] + edge[-1] + 1).item() / SIDE - 1 for edge in (columns, rows)]
        theta = torch.tensor([[[scale, 0.0, middle[0]], [0.0, scale, middle[1]]]])
        at = F.affine_grid(theta, [1, 1, 24, 24], align_corners=False)
        images.append(F.grid_sample(letter[None, None], at, align_corners=False)[0])
    return 2 * torch.stack(images) - 1


def test_the_ink_is_the_letter_of_the_label() -> None:
    """The judge of `glyphs`, trained on other pictures, reads it, and no longer once pictures are transposed."""
    from workbench.zoo import load_classifier

    _, ink, labels = scenes(400, "held_out", seed=2)
    read = (load_classifier().judge(upright(ink))[1] == labels).double().mean()
    assert read > 0.9
    assert (load_classifier().judge(upright(ink.mT))[1] == labels).double().mean() < 0.5


# ---- the model ----


def test_the_folder_loads_as_any_does(model: Any) -> None:
    from transformers import AutoModelForImageClassification, ViTForImageClassification

    assert isinstance(model, ViTForImageClassification) and not model.training
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    plain = AutoModelForImageClassification.from_pretrained(FOLDER)
    assert {value.dtype for value in plain.parameters()} == {torch.float16}
    for name, value in plain.state_dict().items():
        assert torch.equal(value.float(), model.state_dict()[name])
    assert "".join(plain.config.id2label[i] for i in range(36)) == CLASSES
    assert load_vision() is not load_vision()
    images = clutter(3)[0]
    with torch.no_grad():
        seen = model(images, output_attentions=True)
        fused = load_vision(attn_implementation="sdpa")(images)
    assert [a.shape for a in seen.attentions] == [(3, 3, 65, 65)] * 6
    torch.testing.assert_close(seen.logits, fused.logits, rtol=1e-4, atol=1e-4)


def test_weights_are_small_and_the_scores_are_theirs(scores: dict[str, Any], model: Any) -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors", "training.json"}
    assert files["model.safetensors"] == scores["weight_bytes"] < 4e6
    assert scores["weights"] == folder_digest(FOLDER)
    assert scores["parameters"] == model.num_parameters()
    assert scores["flops_per_row"] == Layers(model).flops()
    assert scores["n"] >= 10_000 and scores["split"] == "held_out"
    card, record = (FOLDER / "README.md").read_text(), json.loads((FOLDER / "training.json").read_text())
    for name in ("accuracy", "accuracy_letter", "accuracy_others"):
        spread = math.sqrt(scores[name] * (1 - scores[name]) / scores["n"])
        assert scores[f"{name}_se"] == pytest.approx(spread, rel=0.01)
        assert f"{scores[name]:.4f} ± {scores[name + '_se']:.4f}" in card
    for number in (scores["n"], scores["parameters"], record["steps"], record["images"], record["seconds"]):
        assert f"{number:,}" in card


def right(model: Any, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return (model(images).logits.argmax(dim=1) == labels).double().mean().item()


@pytest.mark.numeric
def test_fresh_images_are_read_as_the_card_says(model: Any, scores: dict[str, Any]) -> None:
    images, labels = clutter(N, "held_out", FRESH)
    claimed = scores["accuracy"]
    bound = 5 * math.sqrt(claimed * (1 - claimed) / N + scores["accuracy_se"] ** 2)
    assert abs(right(model, images, labels) - claimed) < bound
    # The twins: pictures transposed, and a block whose weights are out of order.
    assert right(model, images.mT, labels) < claimed - bound
    broken = copy.deepcopy(model)
    with torch.no_grad():
        weight: Any = Layers(broken).blocks[1].out.weight
        order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0))
        weight.copy_(weight.flatten()[order].view_as(weight))
    assert right(broken, images, labels) < claimed - bound


@pytest.mark.numeric
def test_few_patches_matter(model: Any, scores: dict[str, Any]) -> None:
    from workbench.zoo.train_vision import guess

    images, ink, labels = scenes(N, "held_out", FRESH)
    is_letter = patches_of(ink)
    for name, shown in (("accuracy_letter", is_letter), ("accuracy_others", ~is_letter)):
        with torch.no_grad():
            found = (guess(Layers(model), images, shown) == labels).double().mean().item()
        claimed = scores[name]
        assert abs(found - claimed) < 5 * math.sqrt(claimed * (1 - claimed) / N + scores[f"{name}_se"] ** 2)
    assert scores["accuracy_letter"] > 0.85 and scores["accuracy_others"] < 0.2


# ---- its layers ----


class Unscaled(Layers):
    def queries(self, i: int, normed: torch.Tensor) -> torch.Tensor:
        return 1.1 * super().queries(i, normed)


class OneNorm(Layers):
    def finish(self, i: int, tokens: torch.Tensor, attention: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        block = self.blocks[i]
        tokens = tokens + block.out((attention @ values).transpose(1, 2).flatten(2))
        return tokens + block.mlp(block.norm(tokens))


class HeadsMixed(Layers):
    def _heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(2, (-1, self.n_heads)).movedim(3, 1)


class NoLastNorm(Layers):
    def head(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.classifier(tokens[:, 0])


@torch.no_grad()
def gap(layers: Layers, pixels: torch.Tensor) -> float:
    return (layers(pixels) - layers.model(pixels).logits).abs().max().item()


def test_layers_one_by_one_are_the_model(exact: Any) -> None:
    embedded = load_vision(attn_implementation="sdpa").double()
    assert gap(Layers(embedded), clutter(4)[0].double()) < 1e-10
    pixels = pictures(4)
    assert gap(Layers(exact), pixels) < 1e-10
    for twin in (Unscaled, OneNorm, HeadsMixed, NoLastNorm):
        assert gap(twin(exact), pixels) > 1e-3
    layers = Layers(exact)
    assert (layers.n_blocks, layers.n_heads, layers.width, layers.mlp_width) == (3, 5, 40, 56)
    assert (layers.n_tokens, layers.patch_values, layers.n_classes) == (10, 192, 7)
    with torch.no_grad():
        inside = exact(pixels, output_hidden_states=True).hidden_states
        tokens = layers.embed(pixels)
        assert tokens.shape == (4, 10, 40)
        for i in range(layers.n_blocks):
            assert (tokens - inside[i]).abs().max() < 1e-10
            tokens = layers.block(i, tokens)


@torch.no_grad()
def test_the_attention_map_is_the_models(model: Any) -> None:
    layers, images = Layers(model), clutter(4)[0]
    inside = model(images, output_attentions=True, output_hidden_states=True)
    for i, theirs in enumerate(inside.attentions):
        normed = layers.norm(i, inside.hidden_states[i])
        queries, keys = layers.queries(i, normed), layers.keys_values(i, normed)[0]
        ours = layers.attention(queries, keys)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        assert (layers.attention(keys, queries) - theirs).abs().max() > 1e-3  # the twin that asks the other way round


@torch.no_grad()
def test_rows_that_stay_are_those_of_the_whole_block(exact: Any) -> None:
    layers, stay = Layers(exact), torch.tensor([0, 7, 3])
    tokens = layers.embed(pictures(2))
    whole = layers.block(1, tokens)
    normed = layers.norm(1, tokens)
    keys, values = layers.keys_values(1, normed)
    attention = layers.attention(layers.queries(1, normed[:, stay]), keys)
    assert attention.shape == (2, 5, 3, 10) and values.shape == (2, 5, 10, 8)
    assert (layers.finish(1, tokens[:, stay], attention, values) - whole[:, stay]).abs().max() < 1e-10
    # The twin: tokens that go are no longer asked either.
    assert (layers.block(1, tokens[:, stay]) - whole[:, stay]).abs().max() > 1e-3


@torch.no_grad()
def test_what_fills_up_a_batch_changes_nothing(exact: Any) -> None:
    layers = Layers(exact)
    tokens = layers.embed(pictures(2))
    is_token = torch.arange(10) < torch.tensor([[10], [6]])
    padded = tokens.masked_fill(~is_token[:, :, None], 9.0)
    together, alone = layers.block(0, padded, is_token), layers.block(0, tokens[1:, :6])
    assert (together[0] - layers.block(0, tokens[:1])[0]).abs().max() < 1e-10
    assert (together[1, :6] - alone[0]).abs().max() < 1e-10
    assert (layers.block(0, padded)[1, :6] - alone[0]).abs().max() > 1e-3  # the twin that knows of no filling


def test_layers_share_the_weights_and_pass_gradients(exact: Any) -> None:
    model = copy.deepcopy(exact)
    layers, pixels = Layers(model), pictures(2)
    before = layers(pixels)
    layers(pixels).square().sum().backward()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model(pixels).logits.square().sum().backward()
    for name, weight in model.named_parameters():
        assert (ours[name] - weight.grad).abs().max() <= 1e-10 * (1 + weight.grad.abs().max())
    with torch.no_grad():
        layers.blocks[0].query.weight.mul_(2)
    assert (layers(pixels) - before).abs().max() > 1e-3 and gap(layers, pixels) < 1e-10


def test_names_of_earlier_releases(exact: Any) -> None:
    """transformers 5.0 keeps the same parts under the names of the published files; here they are given those."""

    def earlier(layer: Any) -> SimpleNamespace:
        heads = {name: getattr(layer.attention, f"{name[0]}_proj") for name in ("query", "key", "value")}
        attention = SimpleNamespace(attention=SimpleNamespace(**heads),
                                    output=SimpleNamespace(dense=layer.attention.o_proj))
        return SimpleNamespace(attention=attention, output=SimpleNamespace(dense=layer.mlp.fc2),
                               intermediate=lambda tokens: layer.mlp.activation_fn(layer.mlp.fc1(tokens)),
                               layernorm_before=layer.layernorm_before, layernorm_after=layer.layernorm_after)

    encoder = SimpleNamespace(layer=[earlier(layer) for layer in exact.vit.layers])
    vit = SimpleNamespace(embeddings=exact.vit.embeddings, layernorm=exact.vit.layernorm, encoder=encoder)
    layers = Layers(SimpleNamespace(vit=vit, classifier=exact.classifier, config=exact.config))
    pixels = pictures(2)
    with torch.no_grad():
        assert (layers(pixels) - exact(pixels).logits).abs().max() < 1e-10


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="model is a Linear; it must be transformers' ViTForImageClassification"):
        Layers(torch.nn.Linear(2, 2))


# ---- what they cost ----


@torch.no_grad()
def test_flops_are_those_that_are_counted(exact: Any, model: Any) -> None:
    for whole, pixels in ((exact, pictures(1)), (model, clutter(1)[0]),
                          (load_vision(attn_implementation="sdpa"), clutter(1)[0])):
        layers = Layers(whole)
        assert layers.flops() == flops_per_row(lambda x, model=whole: model(x).logits, pixels)
        assert layers.flops() == flops_per_row(layers, pixels)
        assert layers.embed_flops == flops_per_row(layers.embed, pixels)
        tokens = layers.embed(pixels)
        assert layers.head_flops == flops_per_row(layers.head, tokens)
        n = layers.n_tokens
        assert block_flops(n, n, layers.width, layers.mlp_width) == flops_per_row(partial(layers.block, 0), tokens)

    layers, stay = Layers(exact), 4
    tokens = layers.embed(pictures(1))

    def pruned(x: torch.Tensor) -> torch.Tensor:
        normed = layers.norm(0, x)
        keys, values = layers.keys_values(0, normed)
        return layers.finish(0, x[:, :stay], layers.attention(layers.queries(0, normed[:, :stay]), keys), values)

    counted = flops_per_row(pruned, tokens)
    assert counted == block_flops(stay, layers.n_tokens, layers.width, layers.mlp_width)
    # The twins: as if keys went with the queries, or as if nothing had gone.
    assert block_flops(stay, stay, 40, 56) < counted < block_flops(10, 10, 40, 56)
    rows = [(stay, 10), (stay, stay), (stay, stay)]
    after = 2 * block_flops(stay, stay, 40, 56)
    assert layers.flops(rows) == layers.embed_flops + counted + after + layers.head_flops
    with pytest.raises(ValueError, match="rows has 2 entries; it must have one for each of the 3 blocks"):
        layers.flops(rows[:2])


# ---- the recipe ----


def test_the_recipe_runs_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one: the loss falls, and a run in two parts takes the same number of steps as one."""
    from workbench.zoo import train_vision

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setattr(train_vision, "SHAPE", shape)
    monkeypatch.setattr(train_vision, "BATCH", 16)
    monkeypatch.setattr(train_vision, "SHARD", 8)
    monkeypatch.setattr(train_vision, "SCORED", 50)
    given = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--steps", "20"]
    folder = tmp_path / "out" / "clutter-vit"
    train_vision.main(["train", *given, "--stop", "0.5", "--threads", str(torch.get_num_threads())])
    assert json.loads((folder / "training.json").read_text())["steps"] == 10
    paused = folder_digest(folder)
    train_vision.main(["all", *given])
    record = json.loads((folder / "training.json").read_text())
    assert record["steps"] == 20 and record["images"] == 320 and folder_digest(folder) != paused
    scores = json.loads((tmp_path / "out" / "clutter-scores.json").read_text())
    assert scores["weights"] == folder_digest(folder) and scores["n"] == 50 and 0 <= scores["accuracy"] < 0.5
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name.startswith(".")]


def test_positions_begin_apart() -> None:
    """Sines and cosines tell all 64 places apart, and near places are more alike than far ones."""
    from workbench.zoo.train_vision import waves

    places = waves(8, 96)
    assert places.shape == (64, 96)
    alike = F.cosine_similarity(places[:, None], places[None], dim=-1)
    assert (alike - torch.eye(64)).max() < 0.999
    assert alike[0, 1] > alike[0, 4] and alike[0, 8] > alike[0, 32]
    torch.testing.assert_close(places.square().sum(dim=1), torch.full((64,), 48.0))
