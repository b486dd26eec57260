"""Causal language models as decoding problems: the embedded family, and users' own target and drafts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.problems.decoding import Decoding, efficiency, follow, surprise
from workbench.problems.fingerprint import Unchanged, digest_of_modules, digest_of_values
from workbench.quality import Drawn, Quality
from workbench.rng import Rng
from workbench.speculation.causal import causal, check_vocabularies, flops_per_token
from workbench.speculation.engine import LanguageModel, State, check_room, fitted, speculate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from workbench.runs import Inputs

DRAFTS = ("tiny", "small")
CALIBRATION = (4, 64)  # texts and tokens per text that the target writes to measure acceptance on
PROMPT = 32  # tokens of the documents' beginnings


def docs(drafts: Sequence[str] = DRAFTS, seed: int = 0, n_prompt: int = PROMPT) -> Decoding:
    """The embedded family: a target and drafts that continue Python's own documentation.

    drafts: which, cheapest first, of "tiny" and "small". Sample i continues the i-th of about 40 held-out documents, in
    an order that the seed decides, from its first n_prompt tokens. The documents are the running Python's own, and so
    part of the digest. Raises ValueError for an unknown draft.
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

    ends = (tokenizer.convert_tokens_to_ids(END),)
    name = f"Python's documentation, {'-'.join(drafts)} and target"
    return _problem(
        name if n_prompt == PROMPT else f"{name}, after {n_prompt} tokens",
        [*(causal(load_language_model(size)[0], size) for size in drafts), causal(target, "target")],
        tokenizer, beginnings, n_prompt, ends,
        digest=digest_of_values([zoo.weights_digest(size) for size in ("target", *drafts)], seed, beginnings(256),
                                ends),
        source=f"from workbench.problems.language import docs\n\nproblem = docs({drafts}, seed={seed}, "
               f"n_prompt={n_prompt})",
        setup="from workbench.zoo import load_language_model\nfrom workbench.zoo.text import prompts\n\n"
              f"target, tokenizer = load_language_model('target')\n"
              f"drafts = [{', '.join(f'load_language_model({size!r})[0]' for size in drafts)}]\n"
              f"inputs = {{'input_ids': prompts(N_SAMPLES, {seed}, {n_prompt})}}")


def from_models(target: Any, drafts: Any | Sequence[Any], tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], *,
                n_prompt: int | None = None, name: str = "your own models",
                draft_tokenizer: PreTrainedTokenizerBase | None = None) -> Decoding:
    """A problem of your own causal models of transformers (or of PEFT around them), drafts cheapest first.

    Sample i continues prompts[i % len(prompts)]: a text, token ids (a sequence or 1-d tensor) or a chat, a list of
    {"role", "content"}, through the tokenizer's template. A text that begins with the tokenizer's BOS gets no other.
    Prompts are continued whole; with n_prompt, longer ones are cut to their first n_prompt tokens. A text ends at the
    eos tokens of target.generation_config, or at the tokenizer's where that has none; all else that configuration says
    (penalties, top_p) is left out: knobs say it. draft_tokenizer: the drafts' own, where their numbers of logits are
    not the target's: its vocabulary must be the tokenizer's.
    Judged by tokens per target pass and by the target's surprise. Nothing is moved, changed or downloaded, and models
    must stay as they are: where weights, adapters, mode or hooks have changed in place (`fingerprint.Unchanged`), runs
    and acceptance are refused. The digest is of weights, configurations, adapters, prompts and ends, and takes .9 s per
    GB of weights.
    Raises ValueError, by name, where there is no prompt, one is empty, nothing of the above or no token of the target,
    vocabularies differ (see `check_vocabularies`), or `causal` refuses a model.
    """
    drafts = list(drafts) if isinstance(drafts, Sequence) else [drafts]
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not drafts or not len(prompts):
        raise ValueError(f"{len(drafts)} drafts, prompts={prompts!r:.80}: expected at least one of each, and a list of "
                         f"prompts")
    if n_prompt is not None and (not isinstance(n_prompt, Integral) or isinstance(n_prompt, bool) or n_prompt < 1):
        raise ValueError(f"n_prompt={n_prompt!r}: expected a whole number of at least 1, or None for whole prompts")
    names = [f"draft {i + 1}" for i in range(len(drafts))] if len(drafts) > 1 else ["draft"]
    models = [causal(module, key) for key, module in zip((*names, "target"), (*drafts, target), strict=True)]
    for draft in models[:-1]:
        check_vocabularies(models[-1], draft, tokenizer, draft_tokenizer)
    ids = [_tokens(i, prompt, tokenizer, models[-1].vocab_size)[:n_prompt] for i, prompt in enumerate(prompts)]
    modules = [model.module for model in models]
    ends = getattr(modules[-1].generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = () if ends is None else tuple(map(int, ends)) if isinstance(ends, Sequence | Tensor) else (int(ends),)
    loads = [f"AutoModelForCausalLM.from_pretrained({_path(m)!r}, dtype={m.dtype})" +
             (f".to({str(m.device)!r})" if m.device.type != "cpu" else "") for m in modules]
    setup = ("import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
             f"target = {loads[-1]}\ndrafts = [{', '.join(loads[:-1])}]\n"
             f"tokenizer = AutoTokenizer.from_pretrained({_path(modules[-1])!r})\n")
    shown = [prompt if isinstance(prompt, str) or _is_chat(prompt) else _ids(prompt) for prompt in prompts]
    more = "" if n_prompt is None else f", n_prompt={n_prompt}"
    if draft_tokenizer is not None:
        setup += f"draft_tokenizer = AutoTokenizer.from_pretrained({_path(modules[0])!r})\n"
        more += ", draft_tokenizer=draft_tokenizer"
    ask = (f"prompts = {ids}\nrows = [prompts[i % len(prompts)] for i in range(N_SAMPLES)]\n"
           "longest = max(map(len, rows))\n"
           "inputs = {'input_ids': [[0] * (longest - len(row)) + row for row in rows],\n"
           "          'attention_mask': [[0] * (longest - len(row)) + [1] * len(row) for row in rows]}\n"
           "inputs = {name: torch.tensor(rows, device=target.device) for name, rows in inputs.items()}\n"
           "for model in (target, *drafts):  # all settings are below\n"
           "    model.generation_config = type(model.generation_config)()")
    is_told = not any(getattr(module, "peft_config", None) for module in modules)
    return _problem(
        name, models, tokenizer, lambda n: [ids[i % len(ids)] for i in range(n)], max(map(len, ids)), ends,
        digest=digest_of_values(digest_of_modules((m, m.config.to_dict()) for m in modules), ids, ends),
        setup=f"{setup}{ask}" if is_told else None,
        source=f"{setup}\nfrom workbench.problems.language import from_models\n\nproblem = from_models(target, drafts, "
               f"tokenizer, {shown!r}{more})",
        vouched=", tokenizer=tokenizer, draft_tokenizer=draft_tokenizer" if draft_tokenizer is not None else "")


def _path(module: Any) -> str:
    # adapters lie in no model's path
    own = "" if getattr(module, "peft_config", None) else getattr(module.config, "_name_or_path", "")
    return own or "path/to/model"


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(part, Mapping) for part in prompt)


def _ids(prompt: Any) -> list[Any]:
    """What a sequence or 1-d tensor holds; of anything else nothing."""
    if isinstance(prompt, Tensor) and prompt.ndim == 1:
        return prompt.tolist()
    return list(prompt) if isinstance(prompt, Sequence) else []


def _tokens(i: int, prompt: Any, tokenizer: Any, vocab_size: int) -> list[int]:
    """Token ids of a prompt in any of the forms that `from_models` takes, with one BOS at most."""
    if isinstance(prompt, str):
        has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        given = tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]
    elif _is_chat(prompt):
        given = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
                                              )["input_ids"]
    else:
        given = _ids(prompt)
    are_tokens = all(isinstance(t, Integral) and not isinstance(t, bool) and 0 <= int(t) < vocab_size for t in given)
    if not given or not are_tokens:
        raise ValueError(f"prompts[{i}]={prompt!r:.80}: expected a text, token ids from 0 to {vocab_size - 1} or a "
                         f"list of chat messages, at least one token")
    return [int(token) for token in given]


def _problem(name: str, models: list[LanguageModel], tokenizer: Any, prompts: Callable[[int], list[list[int]]],
             n_prompt: int, ends: tuple[int, ...], *, digest: str, source: str, setup: str | None, vouched: str = ""
             ) -> Decoding:
    """setup: lines that make target, drafts, tokenizer and, for N_SAMPLES prompts, inputs. vouched: what to tell the
    drop-in of tokenizers."""
    bare = {model.name: model for model in models}
    *drafts, target = models
    unchanged = Unchanged({model.name: model.module for model in models})

    def guarded(model: LanguageModel) -> LanguageModel:
        def begin(n_rows: int) -> State:
            unchanged(model.name)
            return model.begin(n_rows)

        return replace(model, begin=begin)

    def judge(answer: Tensor, given: list[list[int]]) -> dict[str, Quality]:
        numbers = [given.index(prompt) for prompt in given]
        drawn = Drawn(len(given), clusters=torch.tensor(numbers))
        return {**efficiency(answer, drawn), "surprise": surprise(answer, log_probs, drawn)}

    def log_probs(rows: list[list[int]]) -> list[Tensor]:
        unchanged(target.name)
        out = []
        for prompt, row in zip(prompts(len(rows)), rows, strict=True):
            laws = torch.log_softmax(follow(target, [[*prompt, *row]], [len(prompt)]).double(), dim=1)
            out.append(laws[range(len(row)), row])
        return out

    def positions(draft: str) -> tuple[Tensor, Tensor]:
        unchanged(target.name, draft)
        return _positions(draft)

    @cache
    def _positions(draft: str) -> tuple[Tensor, Tensor]:
        firsts = list(map(len, prompts(CALIBRATION[0])))
        ours, theirs = (follow(bare[key], _written(), firsts) for key in (target.name, draft))
        return ours, fitted(theirs, target.vocab_size)

    @cache
    def _written() -> list[list[int]]:
        n_texts, n_tokens = CALIBRATION
        rows, rng = [list(prompt) for prompt in prompts(n_texts)], Rng(0, n_texts)
        lengths = list(map(len, rows))
        n_tokens = int(min(n_tokens, *(model.room(lengths) for model in models)))
        for model in models:
            check_room(model, None, lengths, max(n_tokens, 1))
        uniforms = [rng.uniforms(i) for i in range(n_texts)]
        for blocks in speculate(target, None, prompts(n_texts), n_tokens, None, None, uniforms):
            for row, block in blocks.items():
                rows[row] += block.tokens
        return rows

    return Decoding(
        name=name, digest=digest, target=guarded(target), drafts=tuple(map(guarded, drafts)), prompts=prompts,
        n_prompt=n_prompt, judge=judge, positions=positions,
        text=lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=False),
        flops={model.name: flops_per_token(model.module, n_prompt) for model in models}, ends=ends,
        dtype=torch.float32, device=str(target.module.device), source=source,
        code=None if setup is None else lambda given: _code(given, setup, ends, vouched))


def _code(given: Inputs, setup: str, ends: tuple[int, ...], vouched: str) -> str | None:
    """The script that writes the same tokens with transformers and the drop-in alone; None where it has no such way."""
    knobs = dict(given.knobs)
    t = knobs["temperature"]
    options = [f"max_new_tokens={knobs['n_tokens']}", f"do_sample={t > 0}"]
    options += [f"temperature={t}"] * (t > 0) + [f"top_k={knobs['top_k']}"] * (t > 0)
    options += [f"{name}={knobs[name]}" for name in ("top_p", "typical_p") if t > 0 and knobs[name] < 1]
    options += [f"eos_token_id={list(ends)}"] * bool(ends)
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
        return (f"{lines}\n\nwritten = {asked}.generate(**inputs, {', '.join(options)})"
                "[:, inputs['input_ids'].shape[1]:]\n"
                "print(*tokenizer.batch_decode(written), sep='\\n\\n')\n")
    which = "drafts[-1]" if knobs["draft"] == "best" else "drafts[0]"
    return (f"from workbench.integrations.transformers import generate\n{lines}\n\n"
            f"made = generate(target, {which}, inputs, {', '.join(arguments)},\n"
            f"                seed={given.seed}, {', '.join(options)}{vouched})\nprint(made.report)\n"
            "written = made.sequences[:, inputs['input_ids'].shape[1]:]\n"
            "print(*tokenizer.batch_decode(written), sep='\\n\\n')\n")
