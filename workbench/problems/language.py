"""Causal language models as decoding problems: the embedded family, and users' own target and drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.problems.decoding import Decoding, efficiency, follow, surprise
from workbench.problems.pipelines import digest_of_modules
from workbench.quality import Drawn, Quality
from workbench.rng import Rng
from workbench.speculation.causal import causal, flops_per_token
from workbench.speculation.engine import speculate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.run import Inputs

DRAFTS = ("tiny", "small")
CALIBRATION = (4, 64)  # texts and tokens per text that the target writes to measure acceptance on


def docs(drafts: Sequence[str] = DRAFTS, seed: int = 0, n_prompt: int = 32) -> Decoding:
    """The embedded family: a target and drafts that continue Python's own documentation.

    drafts: which, cheapest first, of "tiny" and "small". Sample i continues the i-th of about 40 held-out documents, in
    an order that the seed decides, from its first n_prompt tokens. Raises ValueError for an unknown draft.
    """
    from workbench import zoo
    from workbench.zoo.text import END, load_language_model, prompts

    drafts = tuple(drafts)
    if not drafts or any(d not in DRAFTS for d in drafts) or list(drafts) != sorted(set(drafts), key=DRAFTS.index):
        raise ValueError(f"drafts={drafts}: expected some of {', '.join(DRAFTS)}, cheapest first")
    target, tokenizer = load_language_model("target")

    @cache
    def beginnings(n: int) -> list[list[int]]:
        return prompts(n, seed, n_prompt).tolist()

    return _problem(
        f"Python's documentation, {'-'.join(drafts)} and target", {"target": target} | {
            size: load_language_model(size)[0] for size in drafts}, tokenizer, beginnings, n_prompt,
        digest="-".join(zoo.weights_digest(size)[:12] for size in ("target", *drafts)) + f"-{seed}",
        end=tokenizer.convert_tokens_to_ids(END),
        source=f"from workbench.problems.language import docs\n\nproblem = docs({drafts}, seed={seed}, "
               f"n_prompt={n_prompt})",
        setup="from workbench.zoo import load_language_model\nfrom workbench.zoo.text import prompts\n\n"
              f"target, tokenizer = load_language_model('target')\n"
              f"drafts = [{', '.join(f'load_language_model({size!r})[0]' for size in drafts)}]\n"
              f"input_ids = prompts(N_SAMPLES, {seed}, {n_prompt})")


def from_models(target: PreTrainedModel, drafts: PreTrainedModel | Sequence[PreTrainedModel],
                tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, n_prompt: int | None = None,
                name: str = "your own models") -> Decoding:
    """A problem of your own causal models, which share one tokenizer; drafts cheapest first.

    Sample i continues prompts[i % len(prompts)], cut to n_prompt tokens (default: those of the shortest prompt).
    Judged by tokens per target pass and by the target's surprise. Nothing is moved, changed or downloaded.
    Raises ValueError where there is no prompt, one is empty or shorter than n_prompt, vocabularies differ by more than
    unused rows, or `causal` refuses a model.
    """
    drafts = list(drafts) if isinstance(drafts, Sequence) else [drafts]
    if not drafts or not prompts:
        raise ValueError(f"{len(drafts)} drafts, {len(prompts)} prompts: expected at least one of each")
    ids = [tokenizer(text)["input_ids"] for text in prompts]
    shortest = min(map(len, ids))
    n_prompt = shortest if n_prompt is None else n_prompt
    if not 1 <= n_prompt <= shortest:
        raise ValueError(f"n_prompt={n_prompt!r}: expected 1 to {shortest}, the tokens of the shortest prompt "
                         f"({prompts[[len(i) for i in ids].index(shortest)]!r})")
    for model in (target, *drafts):
        rows = model.get_output_embeddings().weight.shape[0]
        if rows < len(tokenizer):
            raise ValueError(f"{type(model).__name__} has logits of {rows} tokens, the tokenizer {len(tokenizer)}: "
                             f"expected models of one tokenizer")
    names = [f"draft {i + 1}" for i in range(len(drafts))] if len(drafts) > 1 else ["draft"]
    modules = {"target": target, **dict(zip(names, drafts, strict=True))}
    paths = [getattr(m.config, "_name_or_path", "") or "path/to/model" for m in modules.values()]
    setup = ("import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
             f"target = AutoModelForCausalLM.from_pretrained({paths[0]!r})\n"
             f"drafts = [{', '.join(f'AutoModelForCausalLM.from_pretrained({path!r})' for path in paths[1:])}]\n"
             f"tokenizer = AutoTokenizer.from_pretrained({paths[0]!r})")
    ask = (f"texts = {list(prompts)!r}\n"
           f"input_ids = torch.tensor([tokenizer(texts[i % len(texts)]).input_ids[:{n_prompt}]\n"
           "                          for i in range(N_SAMPLES)])")
    return _problem(
        name, modules, tokenizer, lambda n: [list(ids[i % len(ids)][:n_prompt]) for i in range(n)], n_prompt,
        digest=digest_of_modules((m, m.config.to_dict()) for m in modules.values()), end=tokenizer.eos_token_id,
        setup=f"{setup}\n{ask}", source=f"{setup}\n\nfrom workbench.problems.language import from_models\n\nproblem = "
                            f"from_models(target, drafts, tokenizer, {list(prompts)!r}, n_prompt={n_prompt})")


def _problem(name: str, modules: dict[str, Any], tokenizer: Any, prompts: Callable[[int], list[list[int]]],
             n_prompt: int, *, digest: str, end: int | None, source: str, setup: str) -> Decoding:
    """setup: lines that make target, drafts, tokenizer and, for N_SAMPLES prompts, input_ids."""
    target, *drafts = (causal(module.eval(), key) for key, module in modules.items())
    by_name = {m.name: m for m in (*drafts, target)}

    def judge(answer: Tensor, labels: Tensor | None) -> dict[str, Quality]:
        given = [tuple(prompt) for prompt in prompts(len(answer))]
        drawn = Drawn(len(given), clusters=torch.tensor([given.index(prompt) for prompt in given]))
        return {**efficiency(answer, drawn), "surprise": surprise(answer, log_probs, drawn)}

    def log_probs(rows: list[list[int]]) -> list[Tensor]:
        out = []
        for prompt, row in zip(prompts(len(rows)), rows, strict=True):
            laws = torch.log_softmax(follow(target, [[*prompt, *row]], len(prompt)).double(), dim=1)
            out.append(laws[range(len(row)), row])
        return out

    @cache
    def positions(draft: str) -> tuple[Tensor, Tensor]:
        return follow(target, _written(), n_prompt), follow(by_name[draft], _written(), n_prompt)

    @cache
    def _written() -> list[list[int]]:
        n_texts, n_tokens = CALIBRATION
        rows, rng = [list(prompt) for prompt in prompts(n_texts)], Rng(0, n_texts)
        uniforms = [rng.uniforms(i) for i in range(n_texts)]
        for blocks in speculate(target, None, prompts(n_texts), n_tokens, None, None, uniforms):
            for row, block in blocks.items():
                rows[row] += block.tokens
        return rows

    return Decoding(
        name, digest, target, tuple(drafts), prompts, n_prompt, judge, positions,
        lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=False),
        {key: flops_per_token(module, n_prompt) for key, module in modules.items()}, end=end,
        dtype=torch.float32, device=str(next(iter(modules.values())).device), source=source,
        code=lambda given: _code(given, setup, "target" if end is None else end))


def _code(given: Inputs, setup: str, end: int | str) -> str | None:
    """The script that writes the same tokens with transformers and the drop-in alone; None where it has no such way."""
    knobs = dict(given.knobs)
    t = knobs["temperature"]
    options = [f"max_new_tokens={knobs['n_tokens']}", f"do_sample={t > 0}"]
    options += [f"temperature={t}"] * (t > 0) + [f"top_k={knobs['top_k']}"] * (t > 0)
    options += [f"{name}={knobs[name]}" for name in ("top_p", "typical_p") if t > 0 and knobs[name] < 1]
    options += [f"eos_token_id={end}"] * (end != "target")
    arguments: list[str] = []
    if given.method == "speculative" and knobs["policy"] == "constant":
        arguments = [f"draft_length={knobs['draft_length']}"]
    elif given.method == "spectr":
        arguments = [f"{name}={knobs[name]!r}" for name in ("n_drafts", "draft_length", "rule")]
    elif given.method == "spec_infer":
        arguments = [f"tree={[int(w) for w in knobs['widths']]}", f"rule={knobs['rule']!r}"]
    elif given.method != "autoregressive" or t > 0:
        return None  # plain sampling draws from torch's own stream: another text of the same law
    lines = setup.replace("N_SAMPLES", str(given.n_samples))
    if given.method == "autoregressive":
        asked = "target" if knobs["model"] == "best" else "drafts[0]"
        return (f"{lines}\n\nwritten = {asked}.generate(input_ids, {', '.join(options)})[:, input_ids.shape[1]:]\n"
                "print(*tokenizer.batch_decode(written), sep='\\n\\n')\n")
    which = "drafts[-1]" if knobs["draft"] == "best" else "drafts[0]"
    return (f"from workbench.integrations.transformers import generate\n{lines}\n\n"
            f"made = generate(target, {which}, input_ids, {', '.join(arguments)},\n"
            f"                seed={given.seed}, {', '.join(options)})\nprint(made.report)\n"
            "written = made.sequences[:, input_ids.shape[1]:]\n"
            "print(*tokenizer.batch_decode(written), sep='\\n\\n')\n")
