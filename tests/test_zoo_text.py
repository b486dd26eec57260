"""The embedded language models: their text, their tokenizer, what they know, and the recipe that makes them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from workbench.zoo import LANGUAGE_SIZES, WEIGHTS, load_language_model, text, weights_digest
from workbench.zoo.text import CONTEXT, END, PROMPT_TOKENS, corpus, documents, encoder, paragraphs, prompts

WINDOW = 256
N_WINDOWS = 12  # of held-out text, 3060 tokens
PERPLEXITY_BOUND = 50.0  # of the target on them; 27 on all of the held-out text, see docs-scores.json


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return {size: load_language_model(size)[0] for size in LANGUAGE_SIZES}


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    """Fixed windows (12, 256) of held-out text, from all over it."""
    encode = encoder()
    tokens = torch.tensor([token for document in corpus("held_out") for token in encode(document)])
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    return windows[:: len(windows) // N_WINDOWS][:N_WINDOWS]


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    logits = model(input_ids=windows).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp().item()


@torch.no_grad()
def acceptance(target: torch.nn.Module, draft: torch.nn.Module, windows: torch.Tensor) -> float:
    target_probs, draft_probs = (model(input_ids=windows).logits.softmax(dim=-1) for model in (target, draft))
    return torch.minimum(target_probs, draft_probs).sum(dim=-1).mean().item()


def test_importing_the_text_is_light() -> None:
    code = "import sys, workbench.zoo.text; assert not {'transformers', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60)


def read_again(split: str) -> tuple[tuple[str, str], ...]:
    return documents.__wrapped__(split)  # not what is remembered


def test_corpus_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for split in text.SPLITS:
        names = [name for name, _ in documents(split)]
        assert len(set(names)) == len(names)
    assert read_again("held_out") == documents("held_out")
    some = text._modules()[::10]
    monkeypatch.setattr(text, "_modules", lambda: some)
    first = read_again("train")
    assert first == read_again("train") and set(first) < set(documents("train"))
    assert sum(map(len, corpus("train"))) > 1_500_000 and sum(map(len, corpus("held_out"))) > 100_000
    assert len(corpus("held_out")) >= 30
    beginning = next(document for name, document in documents("train") if name == "json.decoder")
    assert beginning.startswith("Module json.decoder\n\n") and "\n\nclass JSONDecoder" in beginning
    with pytest.raises(ValueError, match="split is 'test'; it must be one of 'train', 'held_out'"):
        corpus("test")


def shared(train: list[str], held: list[str]) -> int:
    """How many long paragraphs stand in both."""
    known = {key for document in train for key in paragraphs(document)}
    return len(known & {key for document in held for key in paragraphs(document)})


def test_splits_never_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    train, held = ({name.removeprefix("comments ") for name, _ in documents(split)} for split in text.SPLITS)
    assert not train & held
    assert all(text.split_of(name) == "train" for name in train)
    assert all(text.split_of(name) == "held_out" for name in held)
    assert shared(corpus("train"), corpus("held_out")) == 0
    # The twin that divides whole documents only: topics contain other topics.
    held_out = corpus("held_out")
    monkeypatch.setattr(text, "_modules", list)
    assert shared([document for _, document in read_again("train")], held_out) == 0
    monkeypatch.setattr(text, "paragraphs", lambda _: set())
    topics = [document for _, document in read_again("train")]
    monkeypatch.undo()
    assert shared(topics, held_out) > 20


def test_a_document_keeps_its_split_in_every_python() -> None:
    """Frozen: another hash would let what the weights have read into the held-out text."""
    held = ["topic import", "topic comparisons", "difflib", "imaplib", "symtable", "json.decoder"]
    assert [text.split_of(name) for name in held] == ["held_out"] * 5 + ["train"]


def test_tokenizer_goes_round() -> None:
    from transformers import AutoTokenizer

    vocabularies = []
    for size in LANGUAGE_SIZES:
        tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / f"docs-{size}")
        assert len(tokenizer) == 2048 and tokenizer.eos_token == tokenizer.bos_token == END
        vocabularies.append(tokenizer.get_vocab())
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]
    generator = torch.Generator().manual_seed(0)
    points = torch.randint(1, 0x110000, (4000,), generator=generator).tolist()
    strange = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
    plain = "".join(chr(point) for point in torch.randint(1, 0x250, (4000,), generator=generator).tolist())
    samples = [strange, plain, *corpus("held_out")[::8], " \n\t  x\r\n", " , . 's n't", "\N{SNOWMAN}\u0301 ﬁ"]
    for sample in samples:
        ids = tokenizer(sample).input_ids
        assert tokenizer.decode(ids) == sample
        assert encoder()(sample) == [tokenizer.bos_token_id, *ids]
    # It is made for this text: more than 2.5 bytes a token, though not for text unlike it.
    document = corpus("held_out")[-1]
    assert len(document.encode()) / len(tokenizer(document).input_ids) > 2.5
    assert len(strange.encode()) / len(tokenizer(strange).input_ids) < 1.5


def test_models_load_as_any_folder_does(models: dict[str, torch.nn.Module]) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    for size, model in models.items():
        plain = AutoModelForCausalLM.from_pretrained(WEIGHTS / f"docs-{size}")
        assert isinstance(plain, LlamaForCausalLM) and isinstance(model, LlamaForCausalLM)
        assert {value.dtype for value in plain.parameters()} == {torch.float16}
        assert {value.dtype for value in model.parameters()} == {torch.float32}
        assert not model.training
        config = model.config
        assert config.vocab_size == 2048 and config.max_position_embeddings == CONTEXT and config.tie_word_embeddings
        assert model.lm_head.weight is model.model.embed_tokens.weight
    target, small, tiny = (model.num_parameters() for model in models.values())
    assert 6 < target / small < 12 and 30 < target / tiny < 50


def test_errors_name_what_is_allowed() -> None:
    allowed = "it must be one of 'target', 'small', 'tiny'"
    with pytest.raises(ValueError, match=f"size is 's'; {allowed}"):
        load_language_model("s")
    with pytest.raises(ValueError, match="size is 'huge'"):
        weights_digest("huge")
    with pytest.raises(ValueError, match="n is 0; it must be at least 1"):
        prompts(0, seed=0)
    with pytest.raises(ValueError, match=f"tokens is {CONTEXT}; it must be from 1 to {CONTEXT // 2}"):
        prompts(1, seed=0, tokens=CONTEXT)


def test_weights_are_small_and_told_apart() -> None:
    folders = [WEIGHTS / f"docs-{size}" for size in LANGUAGE_SIZES]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") < 12e6
    digests = {weights_digest(size) for size in LANGUAGE_SIZES}
    assert len(digests) == 3 and all(len(digest) == 64 for digest in digests)


def test_prompts_begin_held_out_documents() -> None:
    ids = prompts(8, seed=3)
    assert ids.shape == (8, PROMPT_TOKENS) and ids.dtype == torch.int64
    assert len(set(map(tuple, ids.tolist()))) == 8
    assert torch.equal(ids, prompts(8, seed=3)) and not torch.equal(ids, prompts(8, seed=4))
    tokenizer = load_language_model("tiny")[1]
    assert (ids[:, 0] == tokenizer.bos_token_id).all() and (ids[:, 1:] != tokenizer.bos_token_id).all()
    for row in ids:
        beginning = tokenizer.decode(row[1:]).rstrip("\N{REPLACEMENT CHARACTER}")
        assert any(document.startswith(beginning) for document in corpus("held_out"))
        assert not any(document.startswith(beginning) for document in corpus("train"))
    assert prompts(100, seed=0, tokens=8).shape == (100, 8)  # more than there are documents


def test_larger_models_know_more(models: dict[str, torch.nn.Module], held_out: torch.Tensor) -> None:
    target, small, tiny = (perplexity(model, held_out) for model in models.values())
    assert target < PERPLEXITY_BOUND
    assert 1.1 * target < small and 1.1 * small < tiny < 2048
    # The twins: weights out of order know nothing, and text out of order cannot be known.
    broken = load_language_model("target")[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in broken.model.layers:
            weight = layer.mlp.down_proj.weight
            weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight))
    assert perplexity(broken, held_out) > 2 * PERPLEXITY_BOUND
    shuffled = held_out[:, torch.randperm(WINDOW, generator=generator)]
    assert perplexity(models["target"], shuffled) > 2 * PERPLEXITY_BOUND


def test_drafts_agree_with_the_target(models: dict[str, torch.nn.Module], held_out: torch.Tensor) -> None:
    small = acceptance(models["target"], models["small"], held_out)
    tiny = acceptance(models["target"], models["tiny"], held_out)
    assert 0.25 < tiny < small < 0.95
    assert acceptance(models["target"], models["target"], held_out) == pytest.approx(1, abs=1e-5)


def test_context_is_learnt_to_its_end(models: dict[str, torch.nn.Module]) -> None:
    """Positions beyond those of most training windows still help: RoPE alone would not carry that far."""
    encode = encoder()
    document = max(corpus("held_out"), key=len)
    window = torch.tensor([encode(document)[:CONTEXT]])
    with torch.no_grad():
        far = models["target"](input_ids=window).logits[0, -257:-1]
        near = models["target"](input_ids=window[:, -512:]).logits[0, -257:-1]
    assert F.cross_entropy(far, window[0, -256:]) < F.cross_entropy(near, window[0, -256:]) + 0.05


def test_scores_are_of_these_weights() -> None:
    scores = json.loads((WEIGHTS / "docs-scores.json").read_text())
    assert scores["held_out"]["tokens"] > 30_000
    for size in LANGUAGE_SIZES:
        folder = WEIGHTS / f"docs-{size}"
        record = json.loads((folder / "training.json").read_text())
        assert record["corpus_sha256"] == scores["corpus_sha256"] and record["python"] == scores["python"]
        assert scores[size]["weights"] == weights_digest(size)
        assert scores[size]["weight_bytes"] == (folder / "model.safetensors").stat().st_size
        card = (folder / "README.md").read_text()
        assert record["python"] in card and record["corpus_sha256"] in card and "PSF-2.0" in card
        assert f"{scores[size]['perplexity']:.1f} ± {scores[size]['perplexity_se']:.1f}" in card
        assert f"{scores[size]['bits_per_byte']:.3f} ± {scores[size]['bits_per_byte_se']:.3f}" in card
        for name in [f"acceptance_t{t}" for t in ("1", "0.6") if size != "target"]:
            assert f"{scores[size][name]:.3f} ± {scores[size][name + '_se']:.3f}" in card
    assert scores["target"]["perplexity"] < scores["small"]["perplexity"] < scores["tiny"]["perplexity"]


def test_the_recipe_runs_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it on little text with few steps; a run in two parts takes the same number of steps as one."""
    from workbench.zoo import train_text

    whole = corpus("held_out")
    little = {"train": [document[:3000] for document in whole[4:9]],
              "held_out": [whole[12][:1500], whole[16][:1500], whole[22][:1500]]}
    monkeypatch.setattr(train_text, "corpus", little.__getitem__)
    for name, value in {"SHARDS": 2, "WINDOW": 64, "BATCH_TOKENS": 256, "CONTEXT": 128}.items():
        monkeypatch.setattr(train_text, name, value)
    monkeypatch.setattr(train_text, "WINDOWS", {"text": 5, "sampled": 2})
    monkeypatch.setattr(train_text, "pass_times", lambda models: dict.fromkeys(models))  # tells of time only
    options = {"out": tmp_path / "out", "work": tmp_path / "work"}
    given = [item for name, folder in options.items() for item in (f"--{name}", str(folder))]
    threads = str(torch.get_num_threads())
    for target in LANGUAGE_SIZES:
        monkeypatch.setitem(train_text.SHAPES, target, train_text.SHAPES["tiny"])
    train_text.main(["tokenizer", *given])
    train_text.main(["target", *given, "--steps", "40", "--stop", "0.5", "--threads", threads])
    record = tmp_path / "out" / "docs-target" / "training.json"
    assert json.loads(record.read_text())["steps"] == 20
    train_text.main(["target", *given, "--steps", "40"])
    assert json.loads(record.read_text())["steps"] == 40
    for size in ("small", "tiny"):
        train_text.main([size, *given, "--steps", "6"])
    assert len(list((tmp_path / "work").glob("target-*/*.safetensors"))) == 2
    scores = train_text.score(tmp_path / "out")
    assert scores["target"]["perplexity"] < scores["small"]["perplexity"]
    assert scores["target"]["weights"] != weights_digest("target")
    assert 0.3 < scores["tiny"]["acceptance_t1"] < 1
    assert scores["held_out"]["documents"] == 3
    for name in ("perplexity", "bits_per_byte", "acceptance_t0.6"):
        low, value, high = (scores["small"][name + end] for end in ("_low", "", "_high"))
        assert low < value < high and scores["small"][name + "_se"] > 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name.startswith(".")]


def test_errors_are_those_of_documents() -> None:
    """Documents differ by what they are: errors over their windows, taken for independent, are far too small."""
    from workbench.zoo.train_text import figures, token_mean

    stream = torch.Generator().manual_seed(0)
    sizes = [128 * (1 + i % 7) for i in range(45)]
    document = torch.arange(45).repeat_interleave(torch.tensor(sizes))
    level = torch.randn(45, generator=stream, dtype=torch.float64)
    nats = 3 + level[document] + torch.randn(len(document), generator=stream, dtype=torch.float64)
    made = token_mean(nats, document)
    share = torch.tensor(sizes, dtype=torch.float64) / len(document)
    assert made.value == pytest.approx(nats.mean().item())
    assert made.stderr == pytest.approx(share.square().sum().sqrt().item(), rel=0.3)  # of levels of deviation 1
    windows = nats.view(-1, 128).mean(1)
    assert (windows.std() / len(windows) ** 0.5).item() < 0.6 * made.stderr  # the broken twin
    assert made.df < 44  # some documents are long: fewer units than documents make the error
    scaled = figures("perplexity", made, math.exp)
    assert scaled["perplexity_se"] == pytest.approx(math.exp(made.value) * made.stderr, rel=1e-6)
    assert scaled["perplexity_low"] == math.exp(made.low) and scaled["perplexity_high"] == math.exp(made.high)


def test_updates_are_made_orthogonal() -> None:
    from workbench.zoo.train_text import orthogonal

    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 60), (3, 60, 24)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=generator)))
        assert values.min() > 0.5 and values.max() < 1.3
    plain = torch.randn(1, 24, 60, generator=generator)
    left, _, right = torch.linalg.svd(plain, full_matrices=False)
    nearest = left @ right
    assert F.cosine_similarity(orthogonal(plain).flatten(), nearest.flatten(), dim=0) > 0.97
    assert F.cosine_similarity(plain.flatten(), nearest.flatten(), dim=0) < 0.97
