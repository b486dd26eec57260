"""The embedded models: data, judge, autoencoder, the three denoisers, and the recipe that makes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from workbench import zoo
from workbench.cost import flops_per_row
from workbench.zoo import CLASSES, SIZES, WEIGHTS, load_classifier, load_pipeline, weights_digest
from workbench.zoo.glyphs import glyphs
from workbench.zoo.pipeline import GlyphPipeline

MSE_BOUND = 0.0015  # of values from -1 to 1; measured .0012
ACCURACY_BOUND = 0.97  # of the large model, 20 steps, guidance 2; measured .998


@pytest.fixture(scope="module")
def pipes() -> dict[str, GlyphPipeline]:
    loaded = {size: load_pipeline(size) for size in SIZES}
    for pipe in loaded.values():
        pipe.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    return glyphs(2000, "held_out", seed=40)


def test_import_is_light() -> None:
    code = (
        "import sys, workbench.zoo as z; z.WEIGHTS; "
        "assert not {'diffusers', 'matplotlib', 'PIL'} & set(sys.modules); "
        "assert callable(z.glyphs) and z.CLASSES[10] == 'A' and callable(z.glyphs)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60)


def test_package_names_win_over_submodules() -> None:
    assert callable(zoo.glyphs)
    assert set(zoo.__all__) <= set(dir(zoo))
    with pytest.raises(AttributeError, match="nothing"):
        zoo.nothing  # noqa: B018


def test_glyphs_shape_range_and_determinism() -> None:
    images, labels = glyphs(300, seed=3)
    assert images.shape == (300, 1, 24, 24) and images.dtype == torch.float32
    assert images.min() == -1 and 0.99 < images.max() <= 1
    assert labels.shape == (300,) and labels.dtype == torch.int64
    assert labels.min() >= 0 and labels.max() < len(CLASSES) == 36
    again, same = glyphs(100, seed=3)
    assert torch.equal(again, images[:100]) and torch.equal(same, labels[:100])
    assert not torch.equal(glyphs(300, seed=4)[0], images)


def test_glyphs_are_centred_and_whole() -> None:
    images, _ = glyphs(2000, seed=5)
    ink = (images[:, 0] + 1) / 2
    axis = torch.arange(24) - 11.5
    assert abs(((ink.sum(dim=1) * axis).sum(dim=1) / ink.sum(dim=(1, 2))).mean()) < 0.5
    assert abs(((ink.sum(dim=2) * axis).sum(dim=1) / ink.sum(dim=(1, 2))).mean()) < 0.5
    border = torch.cat([ink[:, 0], ink[:, -1], ink[:, :, 0], ink[:, :, -1]], dim=1)
    assert (border > 0.5).any(dim=1).double().mean() < 0.02  # the widest bold W may touch it


def test_splits_never_meet() -> None:
    def keys(images: torch.Tensor) -> set[bytes]:
        return {image.tobytes() for image in images.numpy()}

    train, held = keys(glyphs(20_000, "train")[0]), keys(glyphs(5_000, "held_out")[0])
    assert len(train) == 20_000 and len(held) == 5_000
    assert not train & held


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n is 0; it must be an integer of at least 1"),
        ({"n": 2.5}, "n is 2.5"),
        ({"n": True}, "n is True"),
        ({"n": 1, "split": "test"}, "split is 'test'; it must be one of 'train', 'held_out'"),
        ({"n": 1, "seed": -1}, "seed is -1; it must be an integer of at least 0"),
    ],
)
def test_glyphs_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glyphs(**arguments)


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="size is 'xl'; it must be one of 's', 'b', 'l'"):
        load_pipeline("xl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size is 'xl'"):
        weights_digest("xl")  # type: ignore[arg-type]


def test_classifier_accuracy_and_reference(held_out: tuple[torch.Tensor, torch.Tensor]) -> None:
    classifier = load_classifier()
    assert load_classifier() is classifier and not classifier.training
    images, labels = held_out
    features, guesses = classifier.judge(images)
    assert features.shape == (2000, 64)
    assert (guesses == labels).double().mean() > 0.99
    assert torch.equal(classifier(images[:10]).argmax(dim=1), guesses[:10])
    assert classifier.reference_n >= 20_000
    deviation = classifier.reference_cov.diagonal().sqrt()
    assert ((features.double().mean(dim=0) - classifier.reference_mean).abs() < 0.15 * deviation).all()


def test_autoencoder(pipes: dict[str, GlyphPipeline], held_out: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = held_out
    vae = pipes["l"].vae
    with torch.no_grad():
        latents = vae.encode(images[:1000]).latent_dist.mean
        decoded = vae.decode(latents).sample
    assert latents.shape == (1000, 8, 6, 6)
    assert abs((latents * vae.config.scaling_factor).std() - 1) < 0.02
    assert (decoded - images[:1000]).square().mean() < MSE_BOUND
    assert (load_classifier().judge(decoded)[1] == labels[:1000]).double().mean() > 0.99
    for size in "sb":  # one autoencoder for the family, so that latents can change hands
        for name, value in pipes[size].vae.state_dict().items():
            assert torch.equal(value, vae.state_dict()[name])


@pytest.mark.parametrize("size", SIZES)
def test_folder_is_a_complete_pipeline(size: str, pipes: dict[str, GlyphPipeline]) -> None:
    folder = WEIGHTS / f"glyphs-{size}"
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "GlyphPipeline"
    assert (folder / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")
    assert not [path for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]
    plain = GlyphPipeline.from_pretrained(folder)
    for module in (plain.unet, plain.vae, pipes[size].unet, pipes[size].vae):
        assert {value.dtype for value in module.parameters()} == {torch.float32}
    assert pipes[size].null_label == 36
    digest = weights_digest(size)  # type: ignore[arg-type]
    assert len(digest) == 64 and digest == weights_digest(size)  # type: ignore[arg-type]


def test_weights_fit() -> None:
    files = [path for folder in WEIGHTS.iterdir() if not folder.name.startswith("docs-") for path in folder.rglob("*")]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 16e6
    assert len({weights_digest(size) for size in SIZES}) == 3


def test_sizes_are_ordered(pipes: dict[str, GlyphPipeline]) -> None:
    row = torch.zeros(1, 8, 6, 6), torch.tensor([500]), torch.tensor([0])
    small, base, large = flops = [flops_per_row(pipes[size].unet, *row) for size in SIZES]
    assert small < base < large and large >= 10 * small
    scores = json.loads((WEIGHTS / "scores.json").read_text())
    assert [scores[f"costs_{size}"]["flops_per_row"] for size in SIZES] == flops


def test_costs_are_measured(pipes: dict[str, GlyphPipeline]) -> None:
    from workbench.zoo.evaluate import costs

    found = costs({"s": pipes["s"]}, repeats=3)["s"]
    low, middle, high = found["ms_per_row_16"]
    assert 0 < low <= middle <= high and found["flops_per_row"] > 1e6 and found["parameters"] > 1e5


def test_large_draws_its_labels(pipes: dict[str, GlyphPipeline]) -> None:
    labels = torch.arange(144) % 36
    generator = torch.Generator().manual_seed(0)
    images = pipes["l"](labels, 20, 2.0, generator=generator, output_type="pt").images
    assert images.shape == (144, 1, 24, 24) and images.min() >= 0 and images.max() <= 1
    assert (load_classifier().judge(images * 2 - 1)[1] == labels).double().mean() > ACCURACY_BOUND


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_pipeline_is_the_plain_loop(guidance: float, pipes: dict[str, GlyphPipeline]) -> None:
    pipe = pipes["b"]
    labels = torch.tensor([3, 17, 35])
    noise = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    found = pipe(labels, 10, guidance, latents=noise, output_type="latent").images

    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32)).cumprod(dim=0)
    times = [1000 - 100 * k - 1 for k in range(10)]
    x = noise
    with torch.no_grad():
        for now, after in zip(times, [*times[1:], -1], strict=True):
            with_label = pipe.unet(x, now, labels).sample
            without = pipe.unet(x, now, torch.full_like(labels, 36)).sample
            eps = without + guidance * (with_label - without)
            a, b = kept[now], kept[after] if after >= 0 else torch.tensor(1.0)
            x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


def test_guidance_of_one_evaluates_one_row_per_image(pipes: dict[str, GlyphPipeline]) -> None:
    rows: list[int] = []
    hook = pipes["s"].unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        pipes["s"](torch.arange(5), 2, 1.0, output_type="latent")
        pipes["s"](torch.arange(5), 2, 1.5, output_type="latent")
    finally:
        hook.remove()
    assert rows == [5, 5, 10, 10]


@pytest.mark.parametrize(
    "name",
    ["HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDPMScheduler"],
)
def test_other_schedulers_swap_in(name: str, pipes: dict[str, GlyphPipeline]) -> None:
    import diffusers

    pipe = GlyphPipeline(unet=pipes["b"].unet, vae=pipes["b"].vae, scheduler=pipes["b"].scheduler)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(36)
    images = pipe(labels, 12, 2.0, generator=torch.Generator().manual_seed(2), output_type="pt").images
    assert (load_classifier().judge(images * 2 - 1)[1] == labels).double().mean() > 0.6


def test_generators_outputs_and_callback(pipes: dict[str, GlyphPipeline]) -> None:
    pipe = pipes["s"]

    def seeds(*values: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(value) for value in values]

    pair = pipe([1, 2], 3, generator=seeds(5, 6), output_type="latent").images
    alone = pipe(2, 3, generator=seeds(6), output_type="latent", return_dict=False)[0]
    torch.testing.assert_close(pair[1:], alone, atol=1e-4, rtol=1e-4)

    seen: list[int] = []

    def stop_after_two(pipeline: GlyphPipeline, index: int, timestep: int, tensors: dict) -> dict:
        seen.append(index)
        assert tensors["latents"].shape == (1, 8, 6, 6)
        pipeline._interrupt = index == 1
        return tensors

    (image,) = pipe(4, 5, callback_on_step_end=stop_after_two).images
    assert seen == [0, 1] and image.size == (24, 24)
    assert pipe(4, 1, output_type="np").images.shape == (1, 24, 24, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [40]}, "class_labels span 40 to 40"),
        ({"class_labels": []}, "class_labels has shape"),
        ({"class_labels": [1], "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"class_labels": [1], "output_type": "jpeg"}, "output_type is 'jpeg'"),
        ({"class_labels": [1], "latents": torch.zeros(2, 8, 6, 6)}, "latents have shape"),
        ({"class_labels": [1], "generator": [torch.Generator()] * 2}, "generator is a list of 2"),
        ({"class_labels": [1], "callback_on_step_end_tensor_inputs": ["eps"]}, "allowed"),
    ],
)
def test_pipeline_refuses(arguments: dict, message: str, pipes: dict[str, GlyphPipeline]) -> None:
    with pytest.raises(ValueError, match=message):
        pipes["s"](**arguments)


def test_recipe_runs_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.zoo import evaluate, train

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    out = tmp_path / "weights"
    train.main(["all", "--steps", "3", "--draws", "300", "--out", str(out)])
    for size in SIZES:
        pipe = GlyphPipeline.from_pretrained(out / f"glyphs-{size}")
        assert pipe(0, 1, output_type="pt").images.isfinite().all()
        assert pipe.unet.config["block_out_channels"] == load_config(size)["block_out_channels"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]

    scores = tmp_path / "scores.json"
    options = ["--n", "80", "--steps", "2", "--guidance", "1.5", "--weights", str(out), "--out", str(scores)]
    evaluate.main(["--sizes", "s", "--skip-costs", *options])
    found = json.loads(scores.read_text())
    assert found["s"]["ddim2_w1.5"]["n"] == 80 and found["reconstructed"]["mse"] > 0


def load_config(size: str) -> dict:
    return json.loads((WEIGHTS / f"glyphs-{size}" / "unet" / "config.json").read_text())


def test_scores_are_of_these_weights() -> None:
    scores = json.loads((WEIGHTS / "scores.json").read_text())
    distances = {}
    for size in SIZES:
        entries = scores[size]
        assert entries and {entry["weights"] for entry in entries.values()} == {weights_digest(size)}  # type: ignore[arg-type]
        assert all(entry["n"] >= 5000 and entry["frechet_distance_se"] > 0 for entry in entries.values())
        card = (WEIGHTS / f"glyphs-{size}" / "README.md").read_text()
        for entry in entries.values():
            assert f"{entry['frechet_distance']:.2f} ± {entry['frechet_distance_se']:.2f}" in card
        distances[size] = min(entry["frechet_distance"] for entry in entries.values())
    assert distances["l"] < distances["b"] < distances["s"]
    assert distances["s"] >= 2.5 * distances["l"]
