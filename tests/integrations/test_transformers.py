"""Speculative decoding of models of transformers, against their own generate, single passes, and exact laws."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from integrations.tiny_language_models import (
    FAMILIES,
    VOCABULARY,
    Peft,
    adapted,
    language_model,
    letters,
    like,
    pair,
    prompt,
)
from scipy import stats
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    StoppingCriteria,
    StopStringCriteria,
    T5Config,
    T5ForConditionalGeneration,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from workbench.integrations import transformers as drop_in
from workbench.integrations.transformers import BlockCount, Generated, generate, speculative_generation
from workbench.speculation import causal as causal_module
from workbench.speculation.causal import KeyValues, Layers, Stack, causal
from workbench.speculation.engine import LanguageModel, Session
from workbench.speculation.rules import RULES
from workbench.speculation.tracing import recording
from workbench.speculation.trees import Shape, sequoia

PARENTS = (-1, -1, 0, 0, 1, 2, 2, 5)  # a tree, its deepest path 0, 2, 5, 7
TREES: dict[str, dict[str, Any]] = {
    "one chain": {}, "chains": {"n_drafts": 3}, "chains, rrs": {"n_drafts": 3, "rule": "rrs"},
    "widths": {"tree": (2, 2, 1)},
    "sequoia": {"tree": sequoia((0.6, 0.2, 0.1), 6)}, "dynamic": {"tree": "dynamic", "n_drafts": 3},
}  # fmt: skip


def families_and_attentions() -> list[tuple[str, str]]:
    return [(f, a) for f in FAMILIES for a in ("eager", "sdpa") if (f, a) != ("gemma2", "sdpa")]  # which it lacks


def after(model: Any, tokens: Sequence[int]) -> Tensor:
    """The next token's logits, from a pass of this sequence alone."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0, -1]


def path(node: int) -> list[int]:
    return [] if node < 0 else [*path(PARENTS[node]), node]


def tree_error(model: Any, keep: int = 7) -> float:
    """Largest deviation of a tree's logits, before and after one of its paths is kept, from passes of single paths.

    In standard deviations of the logits, which is about 2.
    """
    session, begin = Session(causal(model, "target"), 1), prompt(9)[0].tolist()
    tokens, n = prompt(len(PARENTS), seed=3)[0].tolist(), len(begin)
    (found,) = session.extend([begin + tokens], [[*range(-1, n - 1), *(n - 1 if p < 0 else n + p for p in PARENTS)]],
                              [list(range(n - 1, n + len(tokens)))])
    wanted = [after(model, begin + [tokens[i] for i in path(node)]) for node in range(-1, len(tokens))]
    session.keep([[*range(n), *(n + node for node in path(keep))]])
    begin += [tokens[i] for i in path(keep)]
    (again,) = session.extend([[5, 6, 7]], [[-1, 0, -1]], [[0, 1, 2]])
    fresh = [after(model, begin + tail) for tail in ([5], [5, 6], [7])]
    right = torch.stack(wanted + fresh)
    return float((torch.cat([found, again]) - right).abs().max() / right.std())


def unrecorded(patch: pytest.MonkeyPatch) -> None:
    """From here on, passes are the modules' own."""
    patch.setattr(causal_module, "recording", lambda module, kinds: None)


@pytest.mark.parametrize(("family", "attention"), families_and_attentions())
@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_tree_in_one_pass_is_its_paths_and_a_kept_path_is_a_fresh_run(family: str, attention: str, is_recorded: bool,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_recorded:
        unrecorded(monkeypatch)
    model = language_model(family, attention=attention)
    assert isinstance(causal(model, "target").begin(1)._memory, Stack if is_recorded else Layers)
    assert tree_error(model) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_broken_twins_of_the_tree_pass_are_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model(family, attention="eager")
    causal(model, "target")  # tried out while the pass is whole
    unrecorded(monkeypatch)
    with monkeypatch.context() as broken:  # eager attention adds True as 1: it never tells that the mask is misread
        broken.setattr(causal_module, "_float_mask", lambda sees, dtype, device: torch.from_numpy(sees)[:, None])
        assert tree_error(model) > 1e-2
    with monkeypatch.context() as broken:  # positions of the tree off by one
        grow = KeyValues._grow

        def shifted(self: KeyValues, old: int, width: int, parents: Sequence[Sequence[int]]) -> None:
            grow(self, old, width, parents)
            self._depths[:, -1] += 1

        broken.setattr(KeyValues, "_grow", shifted)
        assert tree_error(model) > 1e-3
    for memory in (Layers, Stack):
        with monkeypatch.context() as broken:  # a cache cut to its first columns, not to the path's
            if memory is Stack:
                broken.setattr(causal_module, "recording", recording)
            cut = memory.compact
            broken.setattr(memory, "compact", lambda self, base, n, columns, cut=cut: cut(self, base, n, None))
            assert tree_error(model) > 1e-2
    assert tree_error(model) < 1e-5


def test_windows_in_the_mask_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("mistral", "gemma3", "qwen2-windows"):
        model = language_model(family)
        causal(model, "target")
        with monkeypatch.context() as broken:
            begin = KeyValues.__init__
            broken.setattr(KeyValues, "__init__",
                           lambda self, n, kinds, window, memory, begin=begin: begin(self, n, kinds, None, memory))
            assert tree_error(model) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_ragged_rows_do_not_see_each_other(family: str) -> None:
    model = language_model(family)
    prompts = [prompt(n, seed=n)[0].tolist() for n in (3, 8, 5)]
    kept = [[2, 1], [], [1]]  # lengths of the paths that rows keep of a chain of two, in two rounds
    session = Session(causal(model, "target"), 3)
    session.extend(prompts, [list(range(-1, len(p) - 1)) for p in prompts], [[len(p) - 1] for p in prompts])
    session.keep([list(range(len(p))) for p in prompts])
    for i in range(2):
        chains = [prompt(2, seed=10 * i + row)[0].tolist() for row in range(3)]
        found = session.extend(chains, [[-1, 0]] * 3, [[0, 1]] * 3)
        for row, chain in enumerate(chains):
            for n in (1, 2):
                assert torch.allclose(found[row][n - 1], after(model, prompts[row] + chain[:n]), atol=1e-5)
        n_kept = [lengths[i] if i < len(lengths) else 0 for lengths in kept]
        session.keep([list(range(n)) for n in n_kept])
        prompts = [p + chain[:n] for p, chain, n in zip(prompts, chains, n_kept, strict=True)]


def ragged() -> dict[str, Tensor]:
    """Three prompts of 5, 9 and 8 tokens, padded on the left."""
    ids = prompt(9, n_rows=3)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_is_token_for_token_that_of_transformers(family: str) -> None:
    target, draft = pair(family)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    made = generate(target, draft, ragged(), n_drafts=2, draft_length=3, **settings)
    assert torch.equal(made.sequences, target.generate(**ragged(), **settings))
    assert made.block_efficiency > 1


@pytest.mark.parametrize("how", TREES)
def test_greedy_decoding_with_every_kind_of_tree(how: str) -> None:
    target, draft = pair()
    wanted = target.generate(prompt(6), do_sample=False, max_new_tokens=16)
    made = generate(target, draft, prompt(6), do_sample=False, max_new_tokens=16, **TREES[how])
    assert torch.equal(made.sequences, wanted)


@pytest.mark.parametrize("settings", [
    {"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [7, 9, 11]}, {"min_new_tokens": 9},
    {"bad_words_ids": [[7], [9, 11]]}, {"repetition_penalty": 1.3, "min_length": 20},
    {"exponential_decay_length_penalty": (3, 1.5)},
], ids=lambda s: "+".join(s))
def test_processors_that_look_at_the_context_see_the_tokens_before_each_node(settings: dict[str, Any]) -> None:
    target, draft = pair()
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": [4, 30], "pad_token_id": 0, **settings}
    made = generate(target, draft, ragged(), n_drafts=2, draft_length=3, **settings)
    assert torch.equal(made.sequences, target.generate(**ragged(), **settings))


class Alternate(LogitsProcessor):
    """Only even tokens after odd ones, and the other way round."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        is_same = torch.arange(scores.shape[1])[None] % 2 == input_ids[:, -1:] % 2
        return scores.masked_fill(is_same, -math.inf)


def test_a_processor_of_ones_own() -> None:
    target, draft = pair()
    settings: dict[str, Any] = {"max_new_tokens": 16, "logits_processor": [Alternate()]}
    made = generate(target, draft, prompt(4), n_drafts=3, do_sample=True, **settings).sequences[0, 3:]
    assert (made[1:] % 2 != made[:-1] % 2).all()
    wanted = target.generate(prompt(4), do_sample=False, **settings)
    assert torch.equal(generate(target, draft, prompt(4), do_sample=False, **settings).sequences, wanted)


class Biased(LogitsProcessor):
    """A bias of its own for each row of the batch."""

    def __init__(self, n_rows: int) -> None:
        self.biases = 6 * torch.randn(n_rows, VOCABULARY, generator=torch.Generator().manual_seed(0))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.biases


class Bounded(StoppingCriteria):
    """A length of its own for each row of the batch."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= torch.tensor([12, 15, 17])


def by_row(row: int, tokens: Tensor) -> list[int]:
    """A third of the tokens, another one in each row, and then one that ends it, which only padding may follow."""
    if 4 in tokens[9:]:
        return [0]
    return [4] if len(tokens) == 16 + row else [token for token in range(5, VOCABULARY) if token % 3 == row]


ROWS: dict[str, dict[str, Any]] = {
    "a constraint": {"prefix_allowed_tokens_fn": by_row, "eos_token_id": 4},
    "a constraint beside others": {"prefix_allowed_tokens_fn": by_row, "eos_token_id": 4, "repetition_penalty": 1.3,
                                   "logits_processor": [Biased(3)]},
    "a processor": {"logits_processor": [Biased(3)]},
    "a criterion": {"stopping_criteria": [Bounded()], "eos_token_id": 2},
}  # fmt: skip


@pytest.mark.parametrize("what", ROWS)
@pytest.mark.parametrize("how", ["one chain", "chains", "dynamic"])
def test_what_is_asked_by_row_hears_of_the_true_row(what: str, how: str) -> None:
    target, draft = pair()
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, **ROWS[what]}
    made = generate(target, draft, ragged(), **settings, **TREES[how])
    assert torch.equal(made.sequences, target.generate(**ragged(), **settings))
    hook = speculative_generation(draft, **TREES[how])
    assert torch.equal(target.generate(**ragged(), **settings, custom_generate=hook), made.sequences)


def test_a_constraint_is_not_asked_what_may_follow_an_end() -> None:
    def ends(row: int, tokens: Tensor) -> list[int]:
        return [] if tokens[-1] == 4 else [4, 5] if len(tokens) > 6 else [5, 6]

    target, settings = pair()[0], {"do_sample": False, "eos_token_id": 4, "prefix_allowed_tokens_fn": ends}
    for how in TREES.values():
        made = generate(target, like(target, 0.5), prompt(5), max_new_tokens=12, **settings, **how)
        assert torch.equal(made.sequences, target.generate(prompt(5), max_new_tokens=12, **settings))


def test_a_constraint_that_hears_of_another_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = pair()
    monkeypatch.setattr(drop_in, "_of_row", lambda process, row: process)
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, **ROWS["a constraint"]}
    made = generate(target, draft, ragged(), **settings).sequences
    assert not torch.equal(made, target.generate(**ragged(), **settings))


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.drafting == "iid"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_draft_that_is_the_target_is_always_accepted(rule: str, do_sample: bool) -> None:
    target, length = pair()[0], 3
    n_drafts = 1 if rule == "single" else 2
    made = generate(target, target, prompt(5), n_drafts=n_drafts, draft_length=length, rule=rule, do_sample=do_sample,
                    max_new_tokens=3 * (length + 1))
    assert made.block_efficiency == length + 1
    assert all(block.n_accepted == length for block in made.blocks[0])


def test_counts_are_those_of_the_models_passes() -> None:
    target, draft = pair()
    seen: dict[str, list[int]] = {"target": [], "draft": []}
    hooks = [model.register_forward_pre_hook(
        lambda module, args, kwargs, name=name: seen[name].append(kwargs["input_ids"].shape[1]), with_kwargs=True)
        for name, model in (("target", target), ("draft", draft))]
    settings: dict[str, Any] = {"n_drafts": 2, "do_sample": True, "max_new_tokens": 21}
    made = generate(target, draft, prompt(5), **settings)
    for hook in hooks:
        hook.remove()
    assert generate(target, draft, prompt(5), **settings).blocks == made.blocks  # now by recordings, without hooks
    (row,) = made.blocks
    assert made.target_passes == len(row) == len(seen["target"])
    assert [b.target_tokens for b in row] == seen["target"]
    assert made.draft_passes == sum(b.draft_passes for b in row) == len(seen["draft"])
    assert sum(b.draft_tokens for b in row) == sum(seen["draft"])
    assert sum(b.n_tokens for b in row) == 21 == made.sequences.shape[1] - 5
    assert made.block_efficiency == 21 / len(row)
    assert [b.n_tokens for b in row] == [b.n_accepted + 1 for b in row]
    assert row[0] == BlockCount(row[0].n_drafted, row[0].n_accepted, row[0].n_accepted + 1, 5 + row[0].n_drafted,
                                row[0].draft_tokens, 4)
    assert f"21 tokens in {len(row)} target passes" in made.report and made.report.count("\n") == 0


@pytest.mark.parametrize("rows", [VOCABULARY - 5, VOCABULARY + 7])
def test_models_of_one_tokenizer_may_differ_in_spare_rows(rows: int) -> None:
    target, draft = language_model(), language_model(seed=1, vocab_size=rows)
    wanted = target.generate(prompt(5), do_sample=False, max_new_tokens=12)
    assert torch.equal(generate(target, draft, prompt(5), do_sample=False, max_new_tokens=12).sequences, wanted)
    made = generate(target, draft, prompt(5), n_drafts=3, do_sample=True, max_new_tokens=30, temperature=3.0)
    assert made.sequences.max() < VOCABULARY


def test_eos_inside_an_accepted_path_ends_a_row() -> None:
    target = pair()[0]
    plain = target.generate(prompt(5), do_sample=False, max_new_tokens=8)[0, 5:].tolist()
    eos = plain[2]
    assert eos not in plain[:2]
    made = generate(target, target, prompt(5), draft_length=6, do_sample=False, max_new_tokens=8, eos_token_id=eos)
    assert made.sequences[0, 5:].tolist() == plain[:3]
    assert (made.target_passes, made.blocks[0][0].n_tokens, made.blocks[0][0].n_accepted) == (1, 3, 6)
    rows = torch.cat([prompt(5), prompt(5, seed=9)])
    wanted = target.generate(rows, do_sample=False, max_new_tokens=8, eos_token_id=[eos, 3], pad_token_id=0)
    assert torch.equal(generate(target, target, rows, do_sample=False, max_new_tokens=8, eos_token_id=[eos, 3],
                                pad_token_id=0).sequences, wanted)


def test_stop_strings_inside_an_accepted_path() -> None:
    target, tokenizer = pair()[0], letters()
    plain = target.generate(prompt(5), do_sample=False, max_new_tokens=10)[0].tolist()
    stop = tokenizer.decode(plain[7:9])
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "stop_strings": stop, "tokenizer": tokenizer}
    wanted = target.generate(prompt(5), **settings)
    assert wanted.shape[1] < 15
    assert torch.equal(generate(target, target, prompt(5), draft_length=5, **settings).sequences, wanted)
    hook = speculative_generation(pair()[1])
    made = target.generate(prompt(5), do_sample=False, max_new_tokens=10, custom_generate=hook,
                           stopping_criteria=[StopStringCriteria(tokenizer, stop)])
    assert torch.equal(made, wanted)
    with pytest.raises(ValueError, match=r"stop_strings.*tokenizer"):
        generate(target, target, prompt(5), stop_strings=stop)


SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 4, "max_new_tokens": 3}


def exact_law(model: Any, begin: list[int], warp: Callable[[Tensor], Tensor]) -> np.ndarray:
    """(V, V, V): of the next three tokens, from the model's own logits."""
    size = model.config.vocab_size
    law = np.zeros((size,) * 3)
    first = warp(after(model, begin))
    for a in range(size):
        second = warp(after(model, [*begin, a]))
        for b in range(size):
            law[a, b] = (first[a] * second[b]) * warp(after(model, [*begin, a, b]))
    return law


def four_best(logits: Tensor) -> Tensor:
    """Temperature .8 over the four largest."""
    values, places = torch.topk(logits.double() / 0.8, 4)
    return torch.zeros_like(logits, dtype=torch.float64).scatter(0, places, values.softmax(0))


def p_value(made: Generated, law: np.ndarray) -> float:
    """Of the chi-square test that rows follow the law; cells of fewer than 5 expected rows are taken together."""
    new = made.sequences[:, -3:].numpy()
    counts = np.zeros_like(law)
    np.add.at(counts, tuple(new.T), 1)
    expected = len(new) * law
    if counts[expected == 0].any():
        return 0.0
    is_rare = expected < 5
    observed = np.append(counts[~is_rare], counts[is_rare].sum())
    wanted = np.append(expected[~is_rare], expected[is_rare].sum())
    return float(stats.chi2.sf(((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1))


@pytest.fixture(scope="module")
def five() -> tuple[Any, Any, Tensor, np.ndarray]:
    """A target of five tokens, a draft, many rows of one prompt, and the exact law of what follows."""
    target = language_model(vocab_size=5)
    begin = [2, 4, 3]
    return target, like(target, 0.3), torch.tensor([begin] * 600), exact_law(target, begin, four_best)


@pytest.mark.parametrize("how", TREES)
def test_samples_follow_the_exact_law(how: str, five: tuple[Any, Any, Tensor, np.ndarray]) -> None:
    target, draft, rows, law = five
    assert p_value(generate(target, draft, rows, **SAMPLING, **TREES[how]), law) > 1e-3


def test_broken_twins_of_sampling_are_seen(five: tuple[Any, Any, Tensor, np.ndarray], monkeypatch: pytest.MonkeyPatch
                                           ) -> None:
    target, draft, rows, law = five

    def undivided(p: np.ndarray, q: np.ndarray, tokens: Sequence[int], uniform: Callable[[], float]) -> int:
        """k-SEQ without its division of the target by rho."""
        rest = np.maximum(p - q, 0.0)
        return next((x for x in tokens if uniform() * q[x] < p[x]), int(np.searchsorted(rest.cumsum(), uniform()
                                                                                         * rest.sum(), side="right")))

    for how, decide in (("single", lambda p, q, tokens, uniform: tokens[0]), ("k_seq", undivided)):
        with monkeypatch.context() as broken:
            broken.setitem(RULES, how, replace(RULES[how], decide=decide))
            assert p_value(generate(target, draft, rows, rule=how, n_drafts=1 if how == "single" else 3, **SAMPLING),
                           law) < 1e-6
    unwarped = {**SAMPLING, "temperature": 1.3}
    assert p_value(generate(target, draft, rows, **unwarped), law) < 1e-6


def test_rows_have_random_numbers_of_their_own_and_the_global_generator_is_left_alone() -> None:
    target, draft = pair()
    before = torch.random.get_rng_state()
    made = generate(target, draft, ragged(), n_drafts=2, do_sample=True, max_new_tokens=12, seed=5).sequences
    assert torch.equal(torch.random.get_rng_state(), before)
    again = generate(target, draft, ragged(), n_drafts=2, do_sample=True, max_new_tokens=12, seed=5).sequences
    assert torch.equal(made, again)
    alone = generate(target, draft, ragged()["input_ids"][:1, 4:], n_drafts=2, do_sample=True, max_new_tokens=12,
                     seed=5)
    assert torch.equal(alone.sequences[0], made[0, 4:])
    assert not torch.equal(made, generate(target, draft, ragged(), n_drafts=2, do_sample=True, max_new_tokens=12,
                                          seed=6).sequences)


class Heard:
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.n_ends = 0

    def put(self, value: Tensor) -> None:
        self.puts.append(value.flatten().tolist())

    def end(self) -> None:
        self.n_ends += 1


def test_a_streamer_hears_the_prompt_then_each_block() -> None:
    (target, draft), heard = pair(), Heard()
    made = generate(target, draft, prompt(5), n_drafts=2, do_sample=True, max_new_tokens=14, streamer=heard)
    assert heard.puts[0] == prompt(5)[0].tolist() and heard.n_ends == 1
    assert [len(p) for p in heard.puts[1:]] == [b.n_tokens for b in made.blocks[0]]
    assert list(itertools.chain(*heard.puts)) == made.sequences[0].tolist()
    with pytest.raises(ValueError, match="streamer: 3 rows"):
        generate(target, target, ragged(), streamer=heard)


def test_transformers_own_hook_writes_the_same() -> None:
    target, draft = pair()
    hook = speculative_generation(draft, n_drafts=3, seed=4)
    settings: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2, "max_new_tokens": 12}
    sequences = target.generate(**ragged(), custom_generate=hook, **settings)
    made = generate(target, draft, ragged(), n_drafts=3, seed=4, **settings)
    assert torch.equal(sequences, made.sequences) and hook.generated.blocks == made.blocks
    with pytest.raises(ValueError, match="num_beams=2"):
        target.generate(prompt(5), custom_generate=hook, num_beams=2, max_new_tokens=4)


def test_settings_come_from_the_targets_generation_config() -> None:
    target = language_model()
    target.generation_config.max_new_tokens, target.generation_config.repetition_penalty = 9, 1.5
    made = generate(target, like(target, 0.1), prompt(5))
    assert torch.equal(made.sequences, target.generate(prompt(5))) and made.sequences.shape == (1, 14)


def nan_model() -> Any:
    model = language_model()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    return model


BAD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "n_drafts": (lambda: {"n_drafts": 0}, "n_drafts=0: expected a whole number of at least 1"),
    "draft_length": (lambda: {"draft_length": 1.5}, "draft_length=1.5"),
    "rule": (lambda: {"rule": "best"}, "rule='best': expected one of single"),
    "rule for fewer": (lambda: {"rule": "single", "n_drafts": 2}, "'single' takes at most 1"),
    "tree": (lambda: {"tree": "eagle"}, "tree='eagle'.*'dynamic'"),
    "widths": (lambda: {"tree": (2, 0)}, "0"),
    "empty prompt": (lambda: {"inputs": torch.zeros(1, 0, dtype=torch.int64)}, "a prompt is empty"),
    "nothing but padding": (lambda: {"inputs": {"input_ids": prompt(4), "attention_mask": torch.zeros(1, 4)}},
                            "row 0.*prompt is empty"),
    "padding on the right": (lambda: {"inputs": {"input_ids": prompt(3), "attention_mask": torch.tensor([[1, 1, 0]])}},
                             "padding on the left"),
    "inputs": (lambda: {"inputs": [1, 2]}, "inputs of type list"),
    "ids": (lambda: {"inputs": torch.tensor([[2, VOCABULARY]])}, f"expected 0 to {VOCABULARY - 1}"),
    "beams": (lambda: {"num_beams": 3}, "num_beams=3: not supported"),
    "returns": (lambda: {"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2: not supported"),
    "assistant": (lambda: {"assistant_model": language_model()}, "assistant_model: not supported"),
    "typo": (lambda: {"temprature": 2.0}, "temprature: not supported"),
    "target's context": (lambda: {"max_new_tokens": 61},
                         "n_tokens=61: after a prompt of 5, target has room for 60, as its context is 64"),
    "draft's context": (lambda: {"draft": language_model(max_position_embeddings=20), "max_new_tokens": 18},
                        "n_tokens=18: after a prompt of 5, draft has room for 17, as its context is 20"),
    "target's NaN": (lambda: {"target": nan_model()}, "logits of target hold NaN"),
    "draft's NaN": (lambda: {"draft": nan_model()}, "logits of draft hold NaN"),
    "vocabularies": (lambda: {"draft": language_model(vocab_size=2000)}, "vocabulary of 2000 tokens, target of 41"),
    "tokenizers": (lambda: {"tokenizer": letters(), "draft_tokenizer": letters(30)},
                   "draft_tokenizer: .*'_' is 30 and None"),
    "training": (lambda: {"draft": language_model().train()}, "draft is in training mode"),
    "no model": (lambda: {"draft": None}, "draft is a NoneType"),
    "no weights": (lambda: {"draft": language_model().to("meta")}, "draft has weights on the meta device"),
    "offloaded": (lambda: {"target": cpu_offload(language_model())}, "target has weights .*offloaded by accelerate"),
    "embeddings": (lambda: {"inputs_embeds": torch.zeros(1, 5, 16)}, "inputs_embeds: not supported"),
    "more inputs": (lambda: {"inputs": {"input_ids": prompt(4), "pixel_values": torch.zeros(1)}},
                    "inputs holds pixel_values: expected input_ids and attention_mask only"),
    "kinds of tokens": (lambda: {"inputs": {"input_ids": prompt(4), "token_type_ids": torch.ones(1, 4)}},
                        "inputs holds token_type_ids"),
    "no cache": (lambda: {"use_cache": False}, "use_cache=False: not supported by speculative decoding; expected True"),
    "a processor with a memory": (lambda: {"logits_processor": [UnbatchedClassifierFreeGuidanceLogitsProcessor(
        1.5, language_model())]}, "logits_processor holds UnbatchedClassifierFreeGuidance"),
    "encoder": (lambda: {"draft": T5ForConditionalGeneration(T5Config(
        vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).eval()},
        "draft: T5.*decoder-only"),
    "state space": (lambda: {"draft": MambaForCausalLM(MambaConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, state_size=4)).eval()}, "draft: .*keys and values"),
    "hybrid": (lambda: {"draft": JambaForCausalLM(JambaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1,
        use_mamba_kernels=False, mamba_d_state=4)).eval()}, "draft: .*keys and values"),
    "no positions": (lambda: {"draft": BloomForCausalLM(BloomConfig(
        vocab_size=VOCABULARY, hidden_size=8, n_layer=1, n_head=2)).eval()}, "draft: Bloom.*takes no position_ids"),
    "biases by distance": (lambda: {"draft": FalconForCausalLM(FalconConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, alibi=True)).eval()},
        "draft: FalconForCausalLM has alibi=True"),
    "local layers": (lambda: {"draft": GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]))
        .eval()}, "draft: GPTNeoForCausalLM has attention_layers of kind 'local'"),
    "chunks": (lambda: {"draft": Llama4ForCausalLM(Llama4TextConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, intermediate_size_mlp=8, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, head_dim=4, num_local_experts=1, pad_token_id=None)).eval()},
        "draft: layers of kind chunked_attention"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_by_name(what: str) -> None:
    make, message = BAD[what]
    target = language_model()
    given = {"target": target, "draft": target, "inputs": prompt(5), "max_new_tokens": 8, **make()}
    models_given = [m for m in (given["target"], given["draft"]) if m is not None and m.device.type == "cpu"]
    before = [{name: weight.clone() for name, weight in m.state_dict().items()} for m in models_given]
    kept = [{name: set(vars(part)) for name, part in m.named_modules()} for m in models_given]
    with pytest.raises(ValueError, match=message):
        generate(given.pop("target"), given.pop("draft"), given.pop("inputs"), **given)
    for model, weights, attributes in zip(models_given, before, kept, strict=True):
        assert all(torch.equal(w, weights[name]) or w.isnan().any() for name, w in model.state_dict().items())
        assert {name: set(vars(part)) for name, part in model.named_modules()} == attributes
    wanted = target.generate(prompt(5), do_sample=False, max_new_tokens=4)
    assert torch.equal(generate(target, target, prompt(5), do_sample=False, max_new_tokens=4).sequences, wanted)


def test_attention_without_masks_is_refused() -> None:
    model = language_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2.*'sdpa' or 'eager'"):
        causal(model, "target")


def test_equal_tokenizers_vouch_for_models_of_any_width() -> None:
    target, draft = language_model(), language_model(seed=1, vocab_size=2000)
    wanted = target.generate(prompt(5), do_sample=False, max_new_tokens=6)
    made = generate(target, draft, prompt(5), do_sample=False, max_new_tokens=6, tokenizer=letters(),
                    draft_tokenizer=letters())
    assert torch.equal(made.sequences, wanted)


def test_a_tree_that_drafts_nothing_is_plain_decoding() -> None:
    target = language_model()
    made = generate(target, target, prompt(5), tree=Shape(()), do_sample=False, max_new_tokens=6)
    assert torch.equal(made.sequences, target.generate(prompt(5), do_sample=False, max_new_tokens=6))
    assert made.block_efficiency == 1


def rotating(kind: str, **more: Any) -> Any:
    """A model whose rotary positions change with the length, from 16 on."""
    return language_model(rope_parameters={"rope_type": kind, "rope_theta": 1e4, **more},
                          max_position_embeddings=16 if kind == "dynamic" else 64)


def longrope() -> Any:
    return rotating("longrope", short_factor=[1.0, 1.5], long_factor=[6.0, 9.0], original_max_position_embeddings=16)


@pytest.mark.parametrize(("length", "n_tokens"), [(5, 12), (16, 1), (17, 8)])
def test_positions_that_are_coded_by_the_length_are_right_on_either_side(length: int, n_tokens: int) -> None:
    target = longrope()
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": n_tokens}
    made = generate(target, like(target, 0.1), prompt(length), n_drafts=2, **settings).sequences
    assert torch.equal(made, target.generate(prompt(length), **settings))


def test_positions_that_would_be_coded_anew_in_the_midst_of_a_text_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target = longrope()
    for rows, n_tokens in ((prompt(5), 13), (prompt(16), 2)):
        with pytest.raises(ValueError, match=r"target has room for .* beyond original_max_position_embeddings=16"):
            generate(target, target, rows, max_new_tokens=n_tokens)
    mixed = {"input_ids": prompt(18, n_rows=2), "attention_mask": torch.ones(2, 18, dtype=torch.int64)}
    mixed["attention_mask"][0, :4] = 0
    with pytest.raises(ValueError, match=r"original_max_position_embeddings=16"):
        generate(target, target, mixed, max_new_tokens=1)
    monkeypatch.setattr(LanguageModel, "room", lambda self, lengths: math.inf)  # the broken twin
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 30}
    rows = torch.cat([prompt(10, seed=seed) for seed in range(6)])
    assert not torch.equal(generate(target, target, rows, **settings).sequences, target.generate(rows, **settings))


def test_dynamic_positions_are_right_within_the_context_and_refused_beyond() -> None:
    target = rotating("dynamic", factor=4.0)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    made = generate(target, like(target, 0.1), prompt(5), n_drafts=2, **settings).sequences
    assert torch.equal(made, target.generate(prompt(5), **settings))
    with pytest.raises(ValueError, match="target has room for 12, as its context is 16"):
        generate(target, target, prompt(5), max_new_tokens=13)


@pytest.mark.parametrize("how", TREES)
def test_the_context_is_used_to_its_last_position(how: str) -> None:
    """Positions beyond it have no embedding: whatever were read there would be an error."""
    target, draft = language_model("gpt2"), language_model("gpt2", seed=1)
    draft.config.n_positions = 63  # what is drafted last is never read by the draft
    draft.transformer.wpe = torch.nn.Embedding.from_pretrained(draft.transformer.wpe.weight[:63].detach())
    rows = ragged()
    for given, longest in ((rows, 9), (prompt(64), 64), (prompt(63), 63)):
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 65 - longest, "pad_token_id": 0}
        plain = given if isinstance(given, dict) else {"input_ids": given}
        wanted = target.generate(**plain, **settings)
        for drafting in (draft, like(target, 0.05)):
            assert torch.equal(generate(target, drafting, given, **settings, **TREES[how]).sequences, wanted)
        settings["max_new_tokens"] += 1
        with pytest.raises(ValueError, match="target has room for"):
            generate(target, draft, given, **settings, **TREES[how])


def heedless(what: str) -> Any:
    """A model that does not heed a mask, or positions, that it is given."""
    model = language_model()

    class Heedless(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None,
                    past_key_values: Any = None, **kwargs: Any) -> Any:
            given = {"attention_mask": attention_mask, "position_ids": position_ids}
            return super().forward(input_ids, past_key_values=past_key_values, **given | {what: None}, **kwargs)

    model.__class__ = Heedless
    return model


@pytest.mark.parametrize("what", ["attention_mask", "position_ids"])
def test_a_model_that_does_not_heed_what_it_is_given_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = heedless(what)
    with pytest.raises(ValueError, match="draft: Heedless's logits of a tree of tokens differ from plain passes by"):
        generate(language_model(), model, prompt(5), max_new_tokens=4)
    monkeypatch.setattr(causal_module, "_try_out", lambda *given: None)
    assert tree_error(model) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_trial_in_every_type_even_with_a_short_context(family: str, dtype: torch.dtype) -> None:
    for changes in ({}, {"n_positions" if family == "gpt2" else "max_position_embeddings": 3}):
        model = language_model(family, **changes).to(dtype)
        assert causal(model, "target").module is model
        assert model in causal_module._CHECKED


def test_the_trial_is_made_once_and_unheard_by_the_modules_hooks() -> None:
    model, heard, passes = language_model(), [], 0
    model.register_forward_hook(lambda *given: heard.append(given))

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        return forward(*args, **kwargs)

    counted.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    forward, model.forward = model.forward, counted
    for _ in range(3):
        causal(model, "target")
    assert passes == 3 and not heard
    model.set_attn_implementation("eager")
    causal(model, "target")
    assert passes == 6


def test_models_of_peft_write_with_their_active_adapter() -> None:
    target, draft = Peft(language_model()), Peft(language_model(seed=1))
    for model in (target, draft):
        adapted(model.model)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    made = []
    for name in ("a", "b"):
        target.set_adapter(name)
        made.append(generate(target, draft, prompt(5), **settings).sequences)
        assert torch.equal(made[-1], target.model.generate(prompt(5), **settings))
        hook = speculative_generation(draft)
        assert torch.equal(target.model.generate(prompt(5), custom_generate=hook, **settings), made[-1])
    assert not torch.equal(*made)
    target.peft_config["a"].is_prompt_learning = True
    with pytest.raises(ValueError, match=r"target: adapter 'a' .* acts on the prompt"):
        generate(target, draft, prompt(5), **settings)


def test_models_of_the_peft_library() -> None:
    peft = pytest.importorskip("peft")
    target = language_model()
    wrapped = peft.get_peft_model(target, peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    wrapped.eval()
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    made = generate(wrapped, language_model(seed=1), prompt(5), **settings).sequences
    assert torch.equal(made, wrapped.generate(input_ids=prompt(5), **settings))
    with wrapped.disable_adapter():
        plain = generate(wrapped, language_model(seed=1), prompt(5), **settings).sequences
    assert not torch.equal(made, plain) and torch.equal(plain, language_model().generate(prompt(5), **settings))


def test_models_on_two_devices_are_refused() -> None:
    draft = language_model()
    draft.__class__ = type("Elsewhere", (type(draft),), {"device": torch.device("cuda:1")})
    with pytest.raises(ValueError, match="draft is on cuda:1, target on cpu: expected one device"):
        generate(language_model(), draft, prompt(5), max_new_tokens=4)


def test_what_transformers_hands_on_is_honoured_or_refused() -> None:
    target, draft = pair()
    hook = speculative_generation(draft)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    wanted = target.generate(**ragged(), **settings)
    counted = (ragged()["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert torch.equal(target.generate(**ragged(), position_ids=counted, custom_generate=hook, **settings), wanted)
    with pytest.raises(ValueError, match="position_ids: expected none"):
        target.generate(**ragged(), position_ids=counted + 1, custom_generate=hook, **settings)
    with pytest.raises(ValueError, match="inputs_embeds: not supported"):
        target.generate(inputs_embeds=torch.zeros(1, 4, 16), custom_generate=hook, **settings)
    with pytest.raises(ValueError, match="use_cache=False: not supported"):
        target.generate(prompt(4), use_cache=False, custom_generate=hook, **settings)
    zeros = {**ragged(), "token_type_ids": torch.zeros(3, 9, dtype=torch.int64)}
    assert torch.equal(generate(target, draft, zeros, **settings).sequences, wanted)
    gpt2 = language_model("gpt2")  # takes them, and adds the embedding of token 0
    with pytest.raises(ValueError, match="inputs holds token_type_ids"):
        generate(gpt2, gpt2, zeros, **settings)
