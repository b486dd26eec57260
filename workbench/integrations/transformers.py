"""Speculative decoding with one draft, several or a tree of them, as a drop-in for causal models of transformers.

    inputs = tokenizer("def ", return_tensors="pt")
    made = generate(target, draft, inputs, n_drafts=4, draft_length=5, max_new_tokens=64, do_sample=True)
    made.sequences          # as target.generate would return
    print(made.report)      # drafted and accepted tokens, passes, tokens per pass
    target.generate(**inputs, max_new_tokens=64, custom_generate=speculative_generation(draft, n_drafts=4))

What is written follows the law of target.generate with the same settings, whatever the draft; greedy decoding gives the
same tokens (in float32: rounding may turn near-ties in smaller types). Every block of drafts is one pass of the target.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitNormalization,
    LogitsProcessor,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from workbench.rng import Rng
from workbench.speculation.causal import causal
from workbench.speculation.drafting import Uniform
from workbench.speculation.engine import Ask, Contexts, LanguageModel, speculate
from workbench.speculation.growing import ConfidenceGrower, Grow, Grower, StaticGrower
from workbench.speculation.rules import RULES, Rule
from workbench.speculation.trees import Shape, k_chains, widths

__all__ = ["BlockCount", "Generated", "generate", "speculative_generation"]

PADDING = 512  # rows by which two models of one tokenizer may differ: sizes are rounded up for the hardware's sake

# Processors that look at the scores only: all nodes of a pass go through them at once.
_CONTEXT_FREE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, TypicalLogitsWarper,
                 SuppressTokensLogitsProcessor, LogitNormalization)
# Settings that another way of decoding or of returning would have to honour, and the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_return_sequences": (1,), "penalty_alpha": (), "dola_layers": (), "constraints": (),
    "force_words_ids": (), "prompt_lookup_num_tokens": (), "assistant_early_exit": (), "use_mtp": (False,),
    "guidance_scale": (1,), "watermarking_config": (), "token_healing": (False,), "cache_implementation": ("dynamic",),
    "encoder_repetition_penalty": (1.0,), "encoder_no_repeat_ngram_size": (0,), "return_dict_in_generate": (False,),
}  # fmt: skip
_ARGUMENTS = ("generation_config", "logits_processor", "stopping_criteria")


@dataclass(frozen=True)
class BlockCount:
    """One row's part in one target pass. *_tokens: positions that went through a model; the first block's hold the
    prompt. n_tokens: new ones, of which n_accepted were drafted (where the sequence ends, a few of these are cut)."""

    n_drafted: int
    n_accepted: int
    n_tokens: int
    target_tokens: int
    draft_tokens: int
    draft_passes: int


@dataclass(frozen=True)
class Generated:
    """What `generate` wrote. sequences (B, n_prompt + n_new): prompts as given, new tokens, then the pad token.

    blocks: of each row, its target passes in order. target_passes, draft_passes: of the whole batch.
    """

    sequences: Tensor
    blocks: tuple[tuple[BlockCount, ...], ...]
    target_passes: int
    draft_passes: int

    @property
    def block_efficiency(self) -> float:
        """New tokens per target pass, over all rows."""
        return sum(b.n_tokens for row in self.blocks for b in row) / sum(map(len, self.blocks))

    @property
    def report(self) -> str:
        """A line per row: tokens, passes, tokens per pass, how many tokens were drafted and accepted."""
        lines = []
        for i, row in enumerate(self.blocks):
            new, drafted, accepted, fed, read = (
                sum(getattr(b, name) for b in row)
                for name in ("n_tokens", "n_drafted", "n_accepted", "draft_tokens", "target_tokens"))
            share = f"{accepted / drafted:.0%}" if drafted else "none"
            lines.append(f"row {i}: {new} tokens in {len(row)} target passes, {new / len(row):.2f} per pass; {drafted} "
                         f"drafted in {sum(b.draft_passes for b in row)} draft passes, {accepted} accepted ({share}); "
                         f"positions: target {read}, draft {fed}")
        return "\n".join(lines)


def generate(target: PreTrainedModel, draft: PreTrainedModel, inputs: Tensor | Mapping[str, Any], *, n_drafts: int = 1,
             draft_length: int = 4, rule: str | None = None, tree: Shape | Sequence[int] | str | None = None,
             seed: int = 0, streamer: Any = None, tokenizer: Any = None, draft_tokenizer: Any = None,
             **generation_kwargs: Any) -> Generated:
    """Write on from prompts, several tokens per pass of the target.

    inputs: input_ids (B, n_prompt), or what a tokenizer returns: with attention_mask, rows may be padded on the left.
    n_drafts chains of draft_length tokens are drafted, independently of each other, and verified by SpecTr (arXiv
    2310.15141), whose rule for one chain is ordinary speculative decoding (arXiv 2211.17192). rule: another name of
    RULES. tree: instead of chains a Shape (such as `trees.sequoia` finds), or widths by level, drawn without
    replacement unless rule says otherwise; or "dynamic", EAGLE-2's tree of the draft's confidence (arXiv 2406.16858),
    n_drafts wide, draft_length deep and of at most n_drafts x draft_length nodes.
    Greedy decoding takes the draft's most likely tokens where a position has several drafts, by rule "top".
    generation_kwargs: as for target.generate, with target.generation_config behind them: lengths, do_sample and all
    processors of logits, which both models' logits go through alike; eos, pad, stop_strings (with tokenizer),
    logits_processor (functions of tokens and scores, without memory), stopping_criteria, max_time.
    seed: fixes what is written; row i draws from a stream of its own, torch's global generator is not touched.
    streamer: of transformers, batches of one row. tokenizer, draft_tokenizer: where both are given, their vocabularies
    must agree.
    Cost: per block one target pass of nodes + 1 positions and a draft pass per level; keys and values of both models.
    Passes of small models are recorded at first (see `speculation.tracing`, some tenths of a second) and then replayed.
    Raises ValueError, naming the argument, for what is not supported: models of different vocabularies or devices, in
    training mode, with memory other than keys and values; empty prompts; more tokens than a context holds; NaN logits.
    """
    known = {*vars(GenerationConfig()), *_ARGUMENTS}
    if unknown := sorted(set(generation_kwargs) - known):
        raise ValueError(f"{', '.join(unknown)}: not supported; expected settings of GenerationConfig, "
                         f"{', '.join(_ARGUMENTS)}")
    ids, mask = _read(inputs)
    ids = ids.to(target.device)
    config = generation_kwargs.get("generation_config") or target.generation_config
    stops = generation_kwargs.get("stop_strings", config.stop_strings)
    if stops:
        if tokenizer is None:
            raise ValueError(f"stop_strings={stops!r}: expected the tokenizer with them")
        others = generation_kwargs.get("stopping_criteria") or []
        generation_kwargs["stopping_criteria"] = StoppingCriteriaList([*others, StopStringCriteria(tokenizer, stops)])
        generation_kwargs["stop_strings"] = None
    hook = speculative_generation(draft, n_drafts=n_drafts, draft_length=draft_length, rule=rule, tree=tree, seed=seed,
                                  streamer=streamer, tokenizer=tokenizer, draft_tokenizer=draft_tokenizer)
    _check_pair(target, draft, tokenizer, draft_tokenizer)
    if mask is not None:
        generation_kwargs["attention_mask"] = mask.to(target.device)
    target.generate(ids, custom_generate=hook, **generation_kwargs)
    return hook.generated


class speculative_generation:
    """For target.generate(..., custom_generate=speculative_generation(draft, ...)); arguments as for `generate`.

    transformers does not hand its streamer and its stop strings' tokenizer on to such a function: give the streamer
    here, and stop strings as stopping_criteria=[StopStringCriteria(tokenizer, strings)].
    generated: what the last call wrote, with its counts.
    """

    generated: Generated

    def __init__(self, draft: PreTrainedModel, *, n_drafts: int = 1, draft_length: int = 4, rule: str | None = None,
                 tree: Shape | Sequence[int] | str | None = None, seed: int = 0, streamer: Any = None,
                 tokenizer: Any = None, draft_tokenizer: Any = None) -> None:
        self._draft, self._seed, self._streamer = draft, seed, streamer
        self._tokenizers = tokenizer, draft_tokenizer
        self._plan = {is_greedy: _plan(n_drafts, draft_length, rule, tree, is_greedy) for is_greedy in (False, True)}

    def __call__(self, model: PreTrainedModel, input_ids: Tensor, logits_processor: Sequence[LogitsProcessor],
                 stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig, **model_kwargs: Any
                 ) -> Tensor:
        _check_pair(model, self._draft, *self._tokenizers)
        for name, neutral in _UNSUPPORTED.items():
            value = getattr(generation_config, name, None)
            if value is not None and value not in neutral:
                raise ValueError(f"{name}={value!r}: not supported by speculative decoding; expected it not to be set")
        past = model_kwargs.get("past_key_values")
        if past is not None and past.get_seq_length():
            raise ValueError(f"past_key_values holds {past.get_seq_length()} tokens: expected none")
        prompts = _unpadded(input_ids, model_kwargs.get("attention_mask"))
        if self._streamer is not None:
            if len(prompts) > 1:
                raise ValueError(f"streamer: {len(prompts)} rows in the batch, expected 1")
            self._streamer.put(input_ids.cpu())
        rule, grow, is_soft = self._plan[not generation_config.do_sample]
        padded = input_ids.tolist()
        law = _Processed(logits_processor, padded, [len(p) for p in prompts], not generation_config.do_sample)
        n_tokens = _n_tokens(stopping_criteria, input_ids.shape[1])
        models = [_Counted(causal(m, name), len(prompts)) for m, name in ((model, "target"), (self._draft, "draft"))]
        for counted, prompt in ((c, p) for c in models for p in prompts):
            _check_room(counted.model, prompt, n_tokens)
        rng = Rng(self._seed, len(prompts))
        going = speculate(models[0].model, models[1].model, prompts, n_tokens, grow, rule,
                          [rng.uniforms(row) for row in range(len(prompts))], law=law,
                          draft_law=law.softened() if is_soft else None, ends=_ends(stopping_criteria, padded))
        with _fast(model, self._draft):
            self.generated = self._collect(going, models, input_ids, generation_config, stopping_criteria)
        return self.generated.sequences

    def _collect(self, going: Iterator[dict[int, Any]], models: list[_Counted], input_ids: Tensor,
                 config: GenerationConfig, criteria: StoppingCriteriaList) -> Generated:
        target, draft = models
        new: list[list[int]] = [[] for _ in range(len(input_ids))]
        counts: list[list[BlockCount]] = [[] for _ in new]
        n_passes = 0
        for blocks in going:
            n_passes += 1
            read, fed = target.take(), draft.take()
            for row, block in blocks.items():
                new[row] += block.tokens
                counts[row].append(BlockCount(block.tree.n_nodes, len(block.accepted), len(block.tokens), read[row],
                                              fed[row], block.n_draft_passes))
                if self._streamer is not None:
                    self._streamer.put(torch.tensor(block.tokens))
        if self._streamer is not None:
            self._streamer.end()
        pad = config.pad_token_id
        if pad is None:  # as in transformers: the first eos token
            pad = next((int(c.eos_token_id[0]) for c in criteria if isinstance(c, EosTokenCriteria)), 0)
        longest = max(map(len, new))
        rows = torch.tensor([row + [pad] * (longest - len(row)) for row in new], dtype=input_ids.dtype)
        return Generated(torch.cat([input_ids, rows.to(input_ids.device)], dim=1), tuple(map(tuple, counts)), n_passes,
                         draft.n_passes)


def _fast(*modules: PreTrainedModel) -> AbstractContextManager[Any]:
    """Inference mode, a tenth faster than without gradients; not for models whose forward keeps buffers of its own, as
    rotary embeddings that adapt to the length do: these would be unfit for training afterwards."""
    for module in modules:
        told = getattr(module.config.get_text_config(decoder=True), "rope_parameters", None) or {}
        kinds = [told, *(part for part in told.values() if isinstance(part, dict))]  # or a set per kind of layer
        if any(kind.get("rope_type", "default") in ("dynamic", "longrope") for kind in kinds):
            return torch.no_grad()
    return torch.inference_mode()


def _plan(n_drafts: int, draft_length: int, rule: str | None, tree: Shape | Sequence[int] | str | None, is_greedy: bool
          ) -> tuple[Rule, Grow, bool]:
    """The rule, what grows the trees, and whether the draft's tokens are picked from its law before the argmax."""
    for name, value in (("n_drafts", n_drafts), ("draft_length", draft_length)):
        if value != int(value) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
    if rule is not None and rule not in RULES:
        raise ValueError(f"rule={rule!r}: expected one of {', '.join(RULES)}")
    if isinstance(tree, str):
        if tree != "dynamic" or rule not in (None, "top"):
            raise ValueError(f"tree={tree!r}, rule={rule!r}: expected a Shape, widths, or 'dynamic' with rule 'top'")
        size = n_drafts, draft_length, n_drafts * draft_length
        return RULES["top"], lambda row, uniform: ConfidenceGrower(*size), True
    if tree is None:
        shape, several = k_chains(n_drafts, draft_length), "k_seq"
    else:
        shape, several = tree if isinstance(tree, Shape) else widths(tree), "rrs_without"
    widest = max((len(shape.children(node)) for node in range(-1, shape.n_nodes)), default=0)
    if rule is None:
        rule = "single" if widest <= 1 else "top" if is_greedy else several
    chosen = RULES[rule]
    if chosen.max_drafts is not None and widest > chosen.max_drafts:
        raise ValueError(f"rule={rule!r} takes at most {chosen.max_drafts} drafts of one position, n_drafts or tree "
                         f"asks for {widest}")
    is_pooled = tree is None

    def grow(row: int, uniform: Uniform) -> Grower:
        return StaticGrower(shape, chosen.drafting, uniform, is_pooled=is_pooled)

    return chosen, grow, is_greedy and widest > 1 and chosen.drafting != "iid"


class _Processed:
    """The law that transformers' processors make of logits; one-hot at the largest score in greedy decoding."""

    def __init__(self, processors: Sequence[LogitsProcessor], prompts: list[list[int]], lengths: list[int],
                 is_greedy: bool) -> None:
        self._processors, self._is_greedy = list(processors), is_greedy
        self._is_context_free = all(type(p) in _CONTEXT_FREE for p in self._processors)
        self._padding = [prompt[: len(prompt) - n] for prompt, n in zip(prompts, lengths, strict=True)]

    def softened(self) -> _Processed:
        """The law before the largest score is taken."""
        made = copy.copy(self)
        made._is_greedy = False
        return made

    def __call__(self, logits: Tensor, contexts: Contexts) -> np.ndarray:
        scores = logits
        if self._is_context_free:
            for process in self._processors:
                scores = process(None, scores)
        else:
            scores = self._in_context(logits, contexts())
        if not self._is_greedy:
            return torch.softmax(scores.double(), dim=-1).cpu().numpy()
        probs = np.zeros(tuple(scores.shape))
        probs[np.arange(len(probs)), scores.argmax(dim=-1).cpu().numpy()] = 1.0
        return probs

    def _in_context(self, logits: Tensor, contexts: list[tuple[int, list[int]]]) -> Tensor:
        """Processors take tokens of one length, and may know each row's padding: a call per row and length."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, (row, tokens) in enumerate(contexts):
            groups[row, len(tokens)].append(i)
        scores = torch.empty_like(logits)
        for (row, _), members in groups.items():
            ids = torch.tensor([self._padding[row] + contexts[i][1] for i in members], device=logits.device)
            part = logits[members]
            for process in self._processors:
                if isinstance(process, RepetitionPenaltyLogitsProcessor):
                    process = _of_row(process, row)
                part = process(ids, part)
            scores[members] = part
        return scores


def _of_row(process: RepetitionPenaltyLogitsProcessor, row: int) -> RepetitionPenaltyLogitsProcessor:
    ignored = process.prompt_ignore_length
    if not isinstance(ignored, Tensor):
        return process
    made = copy.copy(process)
    made.prompt_ignore_length = int(ignored[row])
    return made


class _Counted:
    """A model whose passes, and positions by row, are counted."""

    def __init__(self, model: LanguageModel, n_rows: int) -> None:
        self._network, self._n_rows, self.n_passes = model.network, n_rows, 0
        self._tokens = [0] * n_rows
        self.model = replace(model, network=self._count)

    def _count(self, tokens: Tensor, ask: Ask) -> list[Tensor]:
        self.n_passes += 1
        self._tokens = [n + len(row) for n, row in zip(self._tokens, ask.tokens, strict=True)]
        return self._network(tokens, ask)

    def take(self) -> list[int]:
        """Positions by row since the last call."""
        taken, self._tokens = self._tokens, [0] * self._n_rows
        return taken


def _ends(criteria: StoppingCriteriaList, padded: list[list[int]]) -> Callable[[int, list[int], int], int | None]:
    """See `speculate`: after which of the new tokens the first of the criteria is met."""
    eos = {int(token) for c in criteria if isinstance(c, EosTokenCriteria) for token in c.eos_token_id}
    others = [c for c in criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]

    def ends(row: int, tokens: list[int], n_new: int) -> int | None:
        for n in range(len(tokens) - n_new + 1, len(tokens) + 1):
            if tokens[n - 1] in eos:
                return n
            if others:
                ids = torch.tensor([padded[row] + tokens[:n]])
                if any(bool(torch.as_tensor(c(ids, None)).all()) for c in others):
                    return n
        return None

    return ends


def _read(inputs: Tensor | Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """input_ids and attention_mask, where there is one."""
    given: Mapping[str, Any] = inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}
    if not isinstance(given.get("input_ids"), Tensor):
        raise ValueError(f"inputs of type {type(inputs).__name__}: expected input_ids, a tensor (B, n_prompt), or a "
                         f"mapping with input_ids and attention_mask")
    ids, mask = given["input_ids"], given.get("attention_mask")
    if ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(f"input_ids of shape {tuple(ids.shape)}, {ids.dtype}: expected token ids (B, n_prompt)")
    if not ids.numel():
        raise ValueError(f"input_ids of shape {tuple(ids.shape)}: a prompt is empty, expected at least one token")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"attention_mask of shape {tuple(mask.shape)}: expected the shape of input_ids, "
                         f"{tuple(ids.shape)}")
    return ids, mask


def _unpadded(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    rows = ids.tolist()
    if mask is None:
        return rows
    lengths = mask.ne(0).sum(dim=1).tolist()
    for row, n in enumerate(lengths):
        if n == 0:
            raise ValueError(f"attention_mask leaves nothing of row {row}: a prompt is empty, expected a token")
        if not mask[row, -n:].all():
            raise ValueError(f"attention_mask of row {row} has zeros after ones: expected padding on the left only")
    return [row[-n:] for row, n in zip(rows, lengths, strict=True)]


def _n_tokens(criteria: StoppingCriteriaList, n_prompt: int) -> int:
    if criteria.max_length is None:
        raise ValueError("max_length=None: expected max_new_tokens or max_length")
    return criteria.max_length - n_prompt


def _check_room(model: LanguageModel, prompt: list[int], n_tokens: int) -> None:
    if model.context is not None and len(prompt) + n_tokens > model.context:
        raise ValueError(f"a prompt of {len(prompt)} and {n_tokens} new tokens are more than the context of the "
                         f"{model.name}, {model.context}")
    if model.name == "target" and not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
        raise ValueError(f"input_ids from {min(prompt)} to {max(prompt)}: expected 0 to {model.vocab_size - 1}")


def _check_pair(target: PreTrainedModel, draft: PreTrainedModel, tokenizer: Any, draft_tokenizer: Any) -> None:
    for name, model in (("target", target), ("draft", draft)):
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"{name} is a {type(model).__name__}: expected a causal model of transformers")
        if model.training:
            raise ValueError(f"{name} is in training mode, where dropout changes its laws: call {name}.eval() first")
    if target.device != draft.device:
        raise ValueError(f"draft is on {draft.device}, target on {target.device}: expected one device")
    if tokenizer is not None and draft_tokenizer is not None:
        ours, theirs = tokenizer.get_vocab(), draft_tokenizer.get_vocab()
        if differing := sorted((t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t)), key=str)[:3]:
            told = ", ".join(f"{t!r} is {ours.get(t)} and {theirs.get(t)}" for t in differing)
            raise ValueError(f"draft_tokenizer: expected the vocabulary of tokenizer, but {told}")
        return
    sizes = [m.config.get_text_config(decoder=True).vocab_size for m in (target, draft)]
    if abs(sizes[0] - sizes[1]) > PADDING:
        raise ValueError(f"draft has a vocabulary of {sizes[1]} tokens, target of {sizes[0]}: expected one tokenizer; "
                         f"if it is the same, pass tokenizer and draft_tokenizer to show it")
