"""Decoding problems of users' own models: prompts in every form, ends, digests, and what has changed in place."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.tiny_language_models import VOCABULARY, Peft, adapted, language_model, letters, like, prompt
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from workbench import METHODS, run
from workbench.cost import ATTENTION
from workbench.integrations.transformers import generate
from workbench.problems import language
from workbench.problems.decoding import Decoding, follow
from workbench.problems.language import docs, from_models
from workbench.speculation import causal as causal_module

TEXTS = ["CDEFGHIJK", "LMN", "OPQRST"]  # of 9, 3 and 6 tokens
SPECULATIVE = sorted(name for name, m in METHODS.items() if m.family == "decoding" and name != "autoregressive")
CHAT = ("{% for m in messages %}{{ bos_token + m.role[0] | upper + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token + 'Z' }}{% endif %}")


def problem(prompts: Any = TEXTS, target: Any = None, drafts: Any = None, tokenizer: Any = None, **options: Any
            ) -> Decoding:
    target = language_model() if target is None else target
    drafts = like(language_model(), 0.1) if drafts is None else drafts
    return from_models(target, drafts, tokenizer or letters(), prompts, **options)


def numbers(text: str) -> list[int]:
    return [ord(letter) - ord("A") for letter in text]


def test_prompts_are_continued_whole_or_cut_where_longer() -> None:
    whole = problem()
    assert whole.prompts(4) == [*map(numbers, TEXTS), numbers(TEXTS[0])] and whole.n_prompt == 9
    cut = problem(n_prompt=5)
    assert cut.prompts(3) == [numbers(text[:5]) for text in TEXTS] and cut.n_prompt == 5
    assert problem(n_prompt=50).prompts(3) == whole.prompts(3)


@pytest.mark.parametrize("method", ["autoregressive", *SPECULATIVE])
def test_a_text_does_not_depend_on_the_unequal_prompts_beside_it(method: str) -> None:
    knobs = {"n_tokens": 10, "temperature": 0.8}
    many = run(method, problem(), 3, 6, **knobs).answer
    assert torch.equal(run(method, problem(), 3, 2, **knobs).answer, many[:2])
    alone = language_model().generate(torch.tensor([numbers(TEXTS[1])]), do_sample=False, max_new_tokens=10)[0, 3:]
    assert torch.equal(run(method, problem(), 3, 3, n_tokens=10, temperature=0.0).answer[1, :, 0], alone)


@pytest.mark.parametrize("method", ["autoregressive", *SPECULATIVE])
def test_unequal_prompts_cost_what_is_computed_and_no_more_than_the_formula(method: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(causal_module, "recording", lambda module, kinds: None)
    monkeypatch.setattr(language, "CALIBRATION", (2, 4))
    asked = problem()
    asked.positions("draft")  # which sequoia measures on, at no cost to a run
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        for _ in METHODS[method].function(asked, language.Rng(0, 3), **METHODS[method].check({"n_tokens": 9})):
            pass
    made = run(method, asked, 0, 3, n_tokens=9)
    assert 0 < made.cost.total_flops <= counter.get_total_flops() <= 1.03 * made.cost.total_flops
    assert made.cost.total_evaluations <= 3 * METHODS[method].spends(made.knobs, asked.sizes(made.knobs))


def test_what_is_written_is_judged_row_by_row() -> None:
    asked = problem()
    made = run("speculative", asked, 0, 3, n_tokens=7)
    bits = []
    for begin, row in zip(asked.prompts(3), made.answer[..., 0].tolist(), strict=True):
        with torch.no_grad():
            laws = language_model()(torch.tensor([begin + row])).logits[0, len(begin) - 1:-1].double().log_softmax(1)
        bits.append(-float(laws[range(7), row].mean()) / torch.tensor(2.0).log())
    assert made.quality["surprise"].value == pytest.approx(float(sum(bits)) / 3, rel=1e-5)
    target, draft = asked.positions("draft")
    assert len(target) == len(draft) == 4 * 56  # four texts; a prompt of 9 leaves room for 56
    with torch.no_grad():
        first = language_model()(torch.tensor([numbers(TEXTS[0])])).logits[0, -1]
    assert torch.allclose(target[0], first, atol=1e-5)


def test_acceptance_is_measured_as_far_as_contexts_reach() -> None:
    small = language_model(seed=1, max_position_embeddings=12)
    assert len(problem(drafts=small).positions("draft")[0]) == 4 * 4
    with pytest.raises(ValueError, match="after a prompt of 13, draft has room for 0, as its context is 12"):
        problem(["C" * 13], drafts=small).positions("draft")
    asked = problem(["C" * 64])
    assert run("speculative", asked, 0, 1, n_tokens=1).answer.shape == (1, 1, 2)  # the last token is never read
    with pytest.raises(ValueError, match="n_tokens=2: after a prompt of 64, target has room for 1"):
        run("speculative", asked, 0, 1, n_tokens=2)


@pytest.mark.parametrize("rows", [VOCABULARY - 5, VOCABULARY + 7])
def test_drafts_of_other_spare_rows_are_measured_and_drafted_with(rows: int) -> None:
    asked = problem(drafts=language_model(seed=1, vocab_size=rows))
    assert {part.shape[1] for part in asked.positions("draft")} == {VOCABULARY}
    plain = run("autoregressive", asked, 0, 3, n_tokens=8, temperature=0.0).answer[..., 0]
    assert torch.equal(run("sequoia", asked, 0, 3, n_tokens=8, temperature=0.0).answer[..., 0], plain)


def test_prompts_in_every_form_have_one_bos() -> None:
    from tokenizers import processors

    plain, adding = letters(bos_token="B", chat_template=CHAT), letters(bos_token="B", chat_template=CHAT)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(single="B $A", special_tokens=[("B", 1)])
    chat = [{"role": "user", "content": "CD"}, {"role": "assistant", "content": "EF"}, {"role": "user", "content": "G"}]
    given = ["CDE", "BCDE", numbers("CDE"), torch.tensor(numbers("CDE")), chat, tuple(chat[:1])]
    wanted = ["BCDE", "BCDE", "CDE", "CDE", "BUCDBAEFBUGBZ", "BUCDBZ"]
    assert problem(given, tokenizer=adding).prompts(6) == list(map(numbers, wanted))
    assert problem(given, tokenizer=plain).prompts(6)[:2] == [numbers("CDE"), numbers("BCDE")]
    scope: dict[str, Any] = {"target": language_model(), "drafts": [language_model()], "tokenizer": adding}
    source = problem(given, tokenizer=adding, n_prompt=4).source.partition("from workbench")
    exec("from workbench" + source[2], scope)  # the lines before load the models
    assert scope["problem"].prompts(6) == [numbers(text[:4]) for text in wanted]


def test_a_text_ends_at_any_of_the_targets_ends_or_at_the_tokenizers() -> None:
    target, tokenizer = language_model(), letters(eos_token="C")
    asked: list[tuple[Any, tuple[int, ...]]] = [(None, (2,)), (7, (7,)), ([7, 30, 12], (7, 30, 12))]
    for told, ends in asked:
        target.generation_config.eos_token_id = told
        assert problem(target=target, tokenizer=tokenizer).ends == ends
    assert problem(target=language_model()).ends == ()
    found = problem(target=target, tokenizer=tokenizer)
    tokens = run("spectr", found, 0, 12, n_tokens=20, temperature=2.0).answer[..., 0]
    assert all((tokens == end).any() for end in found.ends)
    for row in tokens.tolist():
        ends_at = [i for i, token in enumerate(row) if token in found.ends]
        assert not ends_at or set(row[ends_at[0] + 1:]) <= {-1}


KNOBS: list[tuple[str, dict[str, Any]]] = [
    ("autoregressive", {"temperature": 0.0}), ("speculative", {"draft_length": 3, "temperature": 0.0}),
    ("speculative", {"draft_length": 2}), ("spectr", {"n_drafts": 2, "draft_length": 2, "top_p": 0.9}),
    ("spec_infer", {"widths": (2, 2), "top_k": 9, "temperature": 1.5})]


def saved(folder: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """Target, draft and tokenizer, loaded from the disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = language_model()
    target.generation_config.eos_token_id, target.generation_config.repetition_penalty = [7, 30], 3.0
    for name, model in (("target", target), ("draft", language_model(seed=0, **changes))):
        model.save_pretrained(folder / name)
        letters().save_pretrained(folder / name)
    return (*(AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("target", "draft")),
            AutoTokenizer.from_pretrained(folder / "target"))


def printed(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    return out.getvalue()


@pytest.mark.parametrize(("method", "knobs"), KNOBS)
def test_the_script_of_a_run_writes_the_same_texts(method: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    target, draft, tokenizer = saved(tmp_path)
    asked = from_models(target, draft, tokenizer, [*TEXTS, numbers("CC")], n_prompt=7)
    made = run(method, asked, 4, 5, n_tokens=12, **knobs)
    assert asked.code is not None
    code = asked.code(made.inputs)
    assert code is not None and "Sampling" not in code
    texts = [asked.text([t for t in row if t >= 0]) for row in made.answer[..., 0].tolist()]
    longest = max(map(len, texts))
    pad = "H" if min(asked.ends) == 7 else ""  # after its end a row is filled with the first of the ends
    wanted = "\n\n".join(text + pad * (longest - len(text)) for text in texts)
    assert printed(code).endswith(wanted + "\n")
    if method == "speculative":
        broken = code.replace("generation_config = type(model.generation_config)()", "generation_config")
        assert not printed(broken).endswith(wanted + "\n")  # the target's own penalty would change the texts


def test_one_rule_tells_which_models_are_of_one_tokenizer(tmp_path: Path) -> None:
    wide, tokenizer = language_model(seed=1, vocab_size=3000), letters()
    for settings in ({}, {"tokenizer": tokenizer}):
        with pytest.raises(ValueError, match=r"draft has a vocabulary of 3000 tokens, target of 41: .*draft_tokenizer"):
            generate(language_model(), wide, prompt(4), max_new_tokens=4, **settings)
    with pytest.raises(ValueError, match=r"draft has a vocabulary of 3000 tokens, target of 41: .*draft_tokenizer"):
        problem(drafts=wide)
    with pytest.raises(ValueError, match="draft_tokenizer: expected the vocabulary of tokenizer"):
        problem(drafts=wide, draft_tokenizer=letters(30))
    for what in (problem, lambda **k: generate(language_model(), language_model(), prompt(4), **k)):
        with pytest.raises(ValueError, match="tokenizer has 700 tokens, target logits of 41"):
            what(tokenizer=letters(700))
    target, draft, tokenizer = saved(tmp_path, vocab_size=3000)
    asked = from_models(target, draft, tokenizer, TEXTS, draft_tokenizer=letters())
    made = run("speculative", asked, 0, 1, n_tokens=8, temperature=0.0)
    assert asked.code is not None
    tokens = [t for t in made.answer[0, :, 0].tolist() if t >= 0]
    assert printed(asked.code(made.inputs) or "").endswith(asked.text(tokens) + "\n")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a bare text": ({"prompts": "CDE"}, "prompts='CDE': expected at least one of each, and a list"),
    "no prompt": ({"prompts": []}, r"prompts=\[\]: expected at least one"),
    "an empty prompt": ({"prompts": ["CD", ""]}, r"prompts\[1\]='': expected a text, token ids from 0 to 40 or a list"),
    "no tokens": ({"prompts": [[1, 2], [3, 41]]}, r"prompts\[1\]=\[3, 41\]: expected"),
    "numbers": ({"prompts": [1, 2]}, r"prompts\[0\]=1: expected"),
    "one chat": ({"prompts": [{"role": "user", "content": "CD"}]}, r"prompts\[0\]={'role'.*a list of chat messages"),
    "no numbers": ({"prompts": [torch.tensor([0.5])]}, r"prompts\[0\]=tensor"),
    "n_prompt": ({"n_prompt": 0}, "n_prompt=0: expected a whole number of at least 1, or None"),
    "half a token": ({"n_prompt": 2.5}, "n_prompt=2.5"),
    "training": ({"drafts": language_model().train()}, "draft is in training mode.*call draft.eval"),
    "no model": ({"drafts": nn.Linear(2, 2).eval()}, "draft is a Linear: expected a causal model"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_named(what: str) -> None:
    given, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        problem(**given)


def test_models_are_left_as_they_are() -> None:
    target, draft = language_model(), language_model(seed=1)
    target.model.layers[0].train()  # a part that somebody trains
    before = [{name: dict(vars(part)) for name, part in m.named_modules()} for m in (target, draft)]
    run("speculative", problem(target=target, drafts=draft), 0, 2, n_tokens=4)
    assert [{name: dict(vars(part)) for name, part in m.named_modules()} for m in (target, draft)] == before
    draft.train()
    with pytest.raises(ValueError):
        problem(target=target, drafts=draft)
    assert draft.training


def scaled(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.5


def with_ends(model: Any) -> None:
    model.generation_config.eos_token_id = [3, 5]


def rewritten(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[3] += 1


def adapters(name: str) -> Callable[[], Decoding]:
    def make() -> Decoding:
        model = Peft(language_model())
        adapted(model.model)
        model.set_adapter(name)
        return problem(target=model)

    return make


def changed(change: Callable[[Any], object]) -> Callable[[], Decoding]:
    def make() -> Decoding:
        model = language_model()
        change(model)
        return problem(target=model)

    return make


OTHERS: dict[str, Callable[[], Decoding]] = {
    "a prompt": lambda: problem([*TEXTS[:2], "OPQRSU"]), "another prompt": lambda: problem([*TEXTS, "C"]),
    "their order": lambda: problem(TEXTS[::-1]), "cut prompts": lambda: problem(n_prompt=4),
    "the tokenizer's end": lambda: problem(tokenizer=letters(eos_token="C")), "the target's ends": changed(with_ends),
    "a weight": changed(rewritten), "an attribute": changed(scaled),
    "the type": changed(lambda model: model.to(torch.bfloat16)),
    "configuration": changed(lambda model: setattr(model.config, "rms_norm_eps", 1e-3)),
    "a hook": changed(lambda model: model.model.register_forward_hook(lambda *given: None)),
    "the draft": lambda: problem(drafts=language_model(seed=3)),
    "another draft": lambda: problem(drafts=[language_model(seed=3), like(language_model(), 0.1)]),
    "an adapter": adapters("a"), "another adapter": adapters("b"),
}  # fmt: skip


def test_the_digest_tells_apart_whatever_changes_answers() -> None:
    first = problem().digest
    digests = {name: make().digest for name, make in OTHERS.items()}
    assert len({first, *digests.values()}) == 1 + len(OTHERS)
    assert problem(name="another name").digest == first == problem([numbers(text) for text in TEXTS]).digest


def test_the_embedded_familys_digest_and_name_tell_the_length_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [docs(("tiny",)), docs(("tiny",), n_prompt=8), docs(("tiny",), seed=1), docs(("small",))]
    assert len({each.digest for each in made}) == 4
    assert made[1].name.endswith("after 8 tokens") and made[0].name != made[1].name and made[1].n_prompt == 8
    from workbench.zoo import text

    beginnings = text._beginnings
    monkeypatch.setattr(text, "_beginnings", lambda tokens: beginnings(tokens).flip(0))  # another Python's documents
    assert docs(("tiny",)).digest != made[0].digest


IN_PLACE: dict[str, Callable[[Any], object]] = {
    "weights": rewritten, "attributes": scaled, "mode": lambda model: model.train(),
    "a hook": lambda model: model.lm_head.register_forward_hook(lambda *given: None),
    "type": lambda model: model.to(torch.bfloat16), "configuration": lambda model: setattr(model.config, "head_dim", 8),
    "a part": lambda model: setattr(model.model.layers[0].mlp, "up_proj", nn.Linear(16, 24, bias=False)),
}  # fmt: skip


@pytest.mark.parametrize("what", IN_PLACE)
@pytest.mark.parametrize("which", ["target", "draft"])
def test_a_model_that_changes_in_place_is_told_not_used(what: str, which: str) -> None:
    target, draft = language_model(), language_model(seed=1)
    asked = problem(target=target, drafts=draft)
    made = run("speculative", asked, 0, 2, n_tokens=4)
    assert asked.positions("draft") is asked.positions("draft")
    assert torch.equal(run("speculative", asked, 0, 2, n_tokens=4).answer, made.answer)
    generate(target, draft, prompt(4), max_new_tokens=4, eos_token_id=3, pad_token_id=0)  # changes nothing
    target.generate(prompt(4), max_new_tokens=4, do_sample=False)
    IN_PLACE[what]({"target": target, "draft": draft}[which])
    uses: list[Callable[[], object]] = [
        lambda: run("speculative", asked, 0, 2, n_tokens=4), lambda: asked.positions("draft"),
        *([lambda: asked.judge(made.answer, asked.prompts(len(made.answer)))] if which == "target" else [])]
    for use in uses:
        with pytest.raises(Exception, match=f"{which} has changed since this problem was made"):
            use()
    if what != "mode" and what != "configuration":
        assert problem(target=target, drafts=draft).digest != asked.digest


def test_an_adapter_that_is_switched_is_told() -> None:
    target = Peft(language_model())
    adapted(target.model)
    asked = problem(target=target)
    run("speculative", asked, 0, 1, n_tokens=4)
    target.set_adapter("b")
    with pytest.raises(ValueError, match="target has changed"):
        run("speculative", asked, 0, 1, n_tokens=4)
    target.set_adapter("a")
    run("speculative", asked, 0, 1, n_tokens=4)
    target.set_adapter("b")
    assert problem(target=target).digest != asked.digest
    assert asked.code is None  # adapters lie in no model's path


def test_follow_takes_each_rows_own_first() -> None:
    asked = problem()
    rows = [numbers("CDEFG"), numbers("HIJ")]
    both = follow(asked.target, rows, [2, 1])
    assert torch.equal(both, torch.cat([follow(asked.target, rows[:1], [2]), follow(asked.target, rows[1:], [1])]))
    assert len(both) == 3 + 2
