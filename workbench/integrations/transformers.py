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
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    ClassifierFreeGuidanceLogitsProcessor,
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from workbench.rng import Rng
from workbench.speculation.causal import causal, check_vocabularies, rotations, unwrapped
from workbench.speculation.drafting import Uniform
from workbench.speculation.engine import Ask, Contexts, LanguageModel, speculate
from workbench.speculation.growing import ConfidenceGrower, Grow, Grower, StaticGrower
from workbench.speculation.rules import RULES, Rule
from workbench.speculation.trees import Shape, k_chains, widths

__all__ = ["BlockCount", "Generated", "generate", "speculative_generation"]

# Processors that look at the scores only: all nodes of a pass go through them at once.
_CONTEXT_FREE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, TypicalLogitsWarper,
                 SuppressTokensLogitsProcessor, LogitNormalization)
# Those that treat all rows alike, or can be told which row it is (`_of_row`): nodes of one length go through them at
# once. Others may hold something for each row of the batch.
_ROW_FREE = (*_CONTEXT_FREE, MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor, NoRepeatNGramLogitsProcessor,
             RepetitionPenaltyLogitsProcessor, PrefixConstrainedLogitsProcessor, SequenceBiasLogitsProcessor,
             NoBadWordsLogitsProcessor, ForcedBOSTokenLogitsProcessor, ForcedEOSTokenLogitsProcessor,
             ExponentialDecayLengthPenalty, SuppressTokensAtBeginLogitsProcessor, InfNanRemoveLogitsProcessor,
             EpsilonLogitsWarper, EtaLogitsWarper)
# Those that remember what they were given, or take more rows than there are.
_UNUSABLE = (UnbatchedClassifierFreeGuidanceLogitsProcessor, ClassifierFreeGuidanceLogitsProcessor,
             SynthIDTextWatermarkLogitsProcessor)
# Settings that another way of decoding or of returning would have to honour, and the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_return_sequences": (1,), "penalty_alpha": (), "dola_layers": (), "constraints": (),
    "force_words_ids": (), "prompt_lookup_num_tokens": (), "assistant_early_exit": (), "use_mtp": (False,),
    "guidance_scale": (1,), "watermarking_config": (), "token_healing": (False,), "cache_implementation": ("dynamic",),
    "encoder_repetition_penalty": (1.0,), "encoder_no_repeat_ngram_size": (0,), "return_dict_in_generate": (False,),
    "use_cache": (True,),
}  # fmt: skip
_ARGUMENTS = ("generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
# What transformers hands on beside input_ids. Anything else would change what a model answers.
_HANDED_ON = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep", "use_cache"}


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

    target, draft: of transformers, or of PEFT with adapters of layers. inputs: input_ids (B, n_prompt), or what a
    tokenizer returns: with attention_mask, rows may be padded on the left.
    n_drafts chains of draft_length tokens are drafted, independently of each other, and verified by SpecTr (arXiv
    2310.15141), whose rule for one chain is ordinary speculative decoding (arXiv 2211.17192). rule: another name of
    RULES. tree: instead of chains a Shape (such as `trees.sequoia` finds), or widths by level, drawn without
    replacement unless rule says otherwise; or "dynamic", EAGLE-2's tree of the draft's confidence (arXiv 2406.16858),
    n_drafts wide, draft_length deep and of at most n_drafts x draft_length nodes.
    Greedy decoding takes the draft's most likely tokens where a position has several drafts, by rule "top".
    generation_kwargs: as for target.generate, with target.generation_config behind them: lengths, do_sample and all
    processors of logits, which both models' logits go through alike; eos, pad, stop_strings (with tokenizer),
    logits_processor (functions of tokens and scores, without memory; one that is not of transformers' common ones is
    called once per node, which is the row of its prompt there), prefix_allowed_tokens_fn, stopping_criteria, max_time.
    seed: fixes what is written; row i draws from a stream of its own, torch's global generator is not touched.
    streamer: of transformers, batches of one row. tokenizer, draft_tokenizer: where both are given, their vocabularies
    must agree, and the models' numbers of logits need not.
    Cost: per block one target pass of nodes + 1 positions and a draft pass per level; keys and values of both models.
    Passes of small models are recorded at first (see `speculation.tracing`, some tenths of a second) and then replayed.
    Raises ValueError, naming the argument, for what is not supported: models of different vocabularies or devices, in
    training mode, offloaded, with memory other than keys and values (see `causal`); empty prompts, embeddings instead
    of tokens; more tokens than a context holds, or LongRoPE's change of factors in the midst of them; NaN logits.
    """
    target, draft = unwrapped(target, "target"), unwrapped(draft, "draft")
    known = {*vars(GenerationConfig()), *_ARGUMENTS}
    if unknown := sorted(set(generation_kwargs) - known):
        raise ValueError(f"{', '.join(unknown)}: not supported; expected settings of GenerationConfig, "
                         f"{', '.join(_ARGUMENTS)}")
    ids, mask = _read(inputs, target)
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
        draft = unwrapped(self._draft, "draft")
        if model.device != draft.device:
            raise ValueError(f"draft is on {draft.device}, target on {model.device}: expected one device")
        pair = causal(model, "target"), causal(draft, "draft")
        check_vocabularies(*pair, *self._tokenizers)
        for name, neutral in _UNSUPPORTED.items():
            value = getattr(generation_config, name, None)
            if value is not None and value not in neutral:
                raise ValueError(f"{name}={value!r}: not supported by speculative decoding; expected "
                                 f"{' or '.join(map(repr, neutral)) or 'it not to be set'}")
        if unusable := [type(p).__name__ for p in logits_processor if isinstance(p, _UNUSABLE)]:
            raise ValueError(f"logits_processor holds {unusable[0]}, which has a memory or takes other rows: expected "
                             f"functions of tokens and scores")
        _check_handed_on(input_ids, model_kwargs)
        prompts = _unpadded(input_ids, model_kwargs.get("attention_mask"))
        if self._streamer is not None:
            if len(prompts) > 1:
                raise ValueError(f"streamer: {len(prompts)} rows in the batch, expected 1")
            self._streamer.put(input_ids.cpu())
        rule, grow, is_soft = self._plan[not generation_config.do_sample]
        padded = input_ids.tolist()
        n_tokens = _n_tokens(stopping_criteria, input_ids.shape[1])
        _check_tokens(prompts, pair[0].vocab_size)
        eos = {int(token) for c in stopping_criteria if isinstance(c, EosTokenCriteria) for token in c.eos_token_id}
        law = _Processed(logits_processor, padded, [len(p) for p in prompts], not generation_config.do_sample, eos)
        models = [_Counted(each, len(prompts)) for each in pair]
        rng = Rng(self._seed, len(prompts))
        going = speculate(models[0].model, models[1].model, prompts, n_tokens, grow, rule,
                          [rng.uniforms(row) for row in range(len(prompts))], law=law,
                          draft_law=law.softened() if is_soft else None, ends=_ends(stopping_criteria, padded, eos))
        with _fast(model, draft):
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
    kinds = [kind["rope_type"] for module in modules for kind in rotations(module)]
    return torch.no_grad() if {"dynamic", "longrope"} & set(kinds) else torch.inference_mode()


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
                 is_greedy: bool, eos: set[int]) -> None:
        self._processors, self._is_greedy, self._lengths, self._eos = list(processors), is_greedy, lengths, eos
        self._is_context_free = all(type(p) in _CONTEXT_FREE for p in self._processors)
        self._is_row_free = all(type(p) in _ROW_FREE for p in self._processors)
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
        """Processors take tokens of one length, and may know each row's padding: a call per row and length, or, where
        one may look for its row of the batch, a call per node, which all rows of the batch are then.

        What follows an end is never written, and a constraint need not have an answer there.
        """
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (row, tokens) in enumerate(contexts):
            if self._eos.isdisjoint(tokens[self._lengths[row]:]):
                groups[(row, len(tokens)) if self._is_row_free else (row, len(tokens), i)].append(i)
        scores = logits.clone()
        for (row, *_), members in groups.items():
            own = slice(None)
            if not self._is_row_free:
                own, members = slice(row, row + 1), members * len(self._padding)
            ids = torch.tensor([self._padding[row] + contexts[i][1] for i in members], device=logits.device)
            part = logits[members]
            for process in self._processors:
                part = _of_row(process, row)(ids, part)
            scores[members[own]] = part[own]
        return scores


def _of_row(process: LogitsProcessor, row: int) -> LogitsProcessor:
    """For a batch that is one row of the true batch several times."""
    if type(process) is PrefixConstrainedLogitsProcessor:
        allowed = process._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
    if type(process) is not RepetitionPenaltyLogitsProcessor or not isinstance(process.prompt_ignore_length, Tensor):
        return process
    made = copy.copy(process)
    made.prompt_ignore_length = int(process.prompt_ignore_length[row])
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


def _ends(criteria: StoppingCriteriaList, padded: list[list[int]], eos: set[int]
          ) -> Callable[[int, list[int], int], int | None]:
    """See `speculate`: after which of the new tokens the first of the criteria is met. Criteria, too, may look for
    their row of the batch, which all of its rows are then."""
    others = [c for c in criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]

    def ends(row: int, tokens: list[int], n_new: int) -> int | None:
        for n in range(len(tokens) - n_new + 1, len(tokens) + 1):
            if tokens[n - 1] in eos:
                return n
            if others:
                ids = torch.tensor([padded[row] + tokens[:n]] * len(padded))
                if any(bool(torch.as_tensor(c(ids, None)).expand(len(padded))[row]) for c in others):
                    return n
        return None

    return ends


def _read(inputs: Tensor | Mapping[str, Any], target: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
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
    kinds = given.get("token_type_ids")  # zeros come of tokenizers, and say nothing to models that do not take them
    is_plain = kinds is None or not (kinds.any() or "token_type_ids" in signature(target.forward).parameters)
    if unknown := sorted(set(given) - {"input_ids", "attention_mask"} - ({"token_type_ids"} if is_plain else set())):
        raise ValueError(f"inputs holds {', '.join(unknown)}: expected input_ids and attention_mask only")
    return ids, mask


def _check_handed_on(ids: Tensor, given: Mapping[str, Any]) -> None:
    """Raises ValueError, naming it, for what transformers hands on and this does not honour."""
    if unknown := sorted(name for name in set(given) - _HANDED_ON if given[name] is not None):
        raise ValueError(f"{', '.join(unknown)}: not supported by speculative decoding; expected prompts as input_ids, "
                         f"with attention_mask")
    past = given.get("past_key_values")
    if past is not None and past.get_seq_length():
        raise ValueError(f"past_key_values holds {past.get_seq_length()} tokens: expected none")
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if positions is not None:
        mask = torch.ones_like(ids) if mask is None else mask.ne(0).long()
        if positions.shape != ids.shape or not ((positions - mask.cumsum(1) + 1) * mask == 0).all():
            raise ValueError("position_ids: expected none, tokens are counted from the first that is no padding")


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


def _check_tokens(prompts: list[list[int]], vocab_size: int) -> None:
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if not 0 <= low <= high < vocab_size:
        raise ValueError(f"input_ids from {low} to {high}: expected 0 to {vocab_size - 1}")
