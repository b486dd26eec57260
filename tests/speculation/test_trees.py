"""Draft trees: shapes against their definitions, and the best trees against every tree there is."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from workbench.speculation import trees as module
from workbench.speculation.acceptance import k_seq_rho, optimal
from workbench.speculation.trees import (
    ConfidenceTree,
    DraftLength,
    Shape,
    best_tree,
    chain,
    chains_bound,
    confidence_tree,
    expected_tokens,
    k_chains,
    optimal_length,
    optimal_tokens,
    sequoia,
    widths,
)

FALLING = (0.6, 0.2, 0.1, 0.05)
# The second and third are laws where a later child is accepted more often than an earlier one.
LAWS = (FALLING, (0.1, 0.5, 0.3), (0.3, 0.0, 0.6, 0.1), (0.25, 0.25, 0.25, 0.25), (1.0,), (0.9, 0.1), (0.0, 0.7))


@functools.cache
def forests(n):
    """Every ordered forest of n nodes, a node being the tuple of its children: the leftmost tree, then the rest."""
    if n == 0:
        return [()]
    return [(inner, *rest) for size in range(1, n + 1) for inner in forests(size - 1) for rest in forests(n - size)]


def height(forest):
    return 1 + max(map(height, forest)) if forest else 0


def worth(forest, a):
    """What the nodes of a forest add to F, by its definition on nested tuples."""
    return sum((a[k] if k < len(a) else 0.0) * (1 + worth(child, a)) for k, child in enumerate(forest))


def shape_of(forest):
    parents, queue = [], [(-1, forest)]
    for node, children in queue:
        for child in children:
            queue.append((len(parents), child))
            parents.append(node)
    return Shape(tuple(parents))


def best_worth(a, n, max_depth=math.inf):
    """Among trees whose nodes have at most len(a) children; -inf where there is none."""
    def fits(forest):
        return len(forest) <= len(a) and all(map(fits, forest))
    return max((worth(f, a) for f in forests(n) if height(f) <= max_depth and fits(f)), default=-math.inf)


def random_shape(rng, n):
    return Shape(tuple(np.sort([rng.integers(-1, node) for node in range(n)]).tolist()))


# ---- shapes ----------------------------------------------------------------------------------------------------------

def test_all_ordered_trees_are_there():
    catalan = [1, 1, 2, 5, 14, 42, 132, 429]
    assert [len(set(forests(n))) for n in range(8)] == catalan
    assert len({shape_of(f).parents for f in forests(7)}) == 429  # and a shape tells them apart


def test_a_small_tree_by_hand():
    shape = Shape((-1, -1, 0, 0, 1, 3))
    assert (shape.n_nodes, shape.depth, shape.depths, shape.ranks) == (6, 3, (1, 1, 2, 2, 2, 3), (0, 1, 0, 1, 0, 0))
    assert [shape.children(v) for v in range(-1, 6)] == [(0, 1), (2, 3), (4,), (), (5,), (), ()]
    assert (shape.widths, shape.draft_widths) == ((2, 3, 1), (1, 2, 1))
    assert [shape.path(v) for v in (-1, 1, 5)] == [(), (1,), (0, 3, 5)]
    empty = Shape(())
    assert (empty.n_nodes, empty.depth, empty.widths, empty.draft_widths, empty.mask.shape) == (0, 0, (), (), (0, 0))
    assert empty.children(-1) == ()


def assert_mask_is_reachability(shape, mask):
    """Ancestors by walking up, and as the transitive closure of the parent relation by a matrix inverse."""
    n = shape.n_nodes
    walked = np.zeros((n, n), dtype=bool)
    steps = np.zeros((n, n))
    for node, parent in enumerate(shape.parents):
        walked[node, list(shape.path(node))] = True
        if parent >= 0:
            steps[node, parent] = 1
    assert np.array_equal(mask, walked)
    assert np.array_equal(mask, np.linalg.inv(np.eye(n) - steps) > 0.5)
    assert np.array_equal(mask.sum(1), shape.depths)


def test_mask_is_ancestors_and_self():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 30, 60):
        shape = random_shape(rng, n)
        assert_mask_is_reachability(shape, shape.mask)
        assert not np.triu(shape.mask, 1).any()
        assert not shape.mask.flags.writeable


def test_the_mask_check_fails_for_parents_only_and_for_a_causal_mask():
    shape = widths((2, 2, 1))
    parents_only = np.eye(shape.n_nodes, dtype=bool)
    for node, parent in enumerate(shape.parents):
        if parent >= 0:
            parents_only[node, parent] = True
    for wrong in (parents_only, np.tril(np.ones_like(parents_only))):
        with pytest.raises(AssertionError):
            assert_mask_is_reachability(shape, wrong)


def test_fixed_trees_count_as_their_papers_say():
    for expansion in ((1,) * 8, (1, 1, 3, 1, 1, 1, 1, 1), (3, 2, 2), (4,)):
        shape = widths(expansion)
        assert shape.widths == tuple(itertools.accumulate(expansion, lambda a, b: a * b))
        leaves = sum(not shape.children(v) for v in range(shape.n_nodes))
        assert leaves == math.prod(expansion)
        for depth, width in enumerate(expansion):
            assert {len(shape.children(v)) for v in range(-1, shape.n_nodes)
                    if (shape.depths[v] if v >= 0 else 0) == depth} == {width}
    shape = k_chains(3, 4)
    assert (shape.widths, len(shape.children(-1))) == ((3,) * 4, 3)
    assert {len(shape.children(v)) for v in range(9)} == {1}
    assert [shape.path(v) for v in (9, 10, 11)] == [(0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11)]
    assert (chain(4), k_chains(1, 4), widths((1,) * 4)) == (Shape((-1, 0, 1, 2)),) * 3
    assert chain(0) == widths(()) == Shape(())


@pytest.mark.parametrize(("make", "named"), [
    (lambda: Shape((-1, 1)), r"parents\[1\]=1"),
    (lambda: Shape((-2,)), r"parents\[0\]=-2"),
    (lambda: Shape((-1, 0, -1)), r"parents\[2\]=-1 after 0"),
    (lambda: chain(3).children(3), "node=3"),
    (lambda: chain(3).path(-2), "node=-2"),
    (lambda: widths((2, 0)), r"expansion\[1\]=0"),
    (lambda: k_chains(0, 2), "n_chains=0"),
    (lambda: chain(-1), "length=-1"),
    (lambda: sequoia(FALLING, 2.5), "n_nodes=2.5"),
    (lambda: sequoia((0.7, 0.7), 3), "sums to 1.4"),
    (lambda: sequoia((0.7, -0.1), 3), "expected probabilities"),
    (lambda: sequoia((math.nan,), 3), "expected probabilities"),
    (lambda: sequoia([[0.5]], 3), "shape"),
    (lambda: sequoia((0.5, 0.2), 15, 3), "n_nodes=15: 2 ranks and 3 levels hold at most 14"),
    (lambda: sequoia((), 1), "hold at most 0"),
    (lambda: best_tree(FALLING, lambda n: 1.0, 0.1, 0, 2), "max_nodes=0"),
    (lambda: best_tree(FALLING, lambda n: 0.0, 0.1, 4, 2), r"target_seconds\(1\)=0.0"),
    (lambda: best_tree(FALLING, lambda n: 1.0, math.nan, 4, 2), "draft_seconds=nan"),
    (lambda: best_tree(FALLING, lambda n: 1.0, lambda n: -n, 4, 2), r"draft_seconds\(1\)=-1"),
    (lambda: ConfidenceTree(0, 2, 3), "top_k=0"),
    (lambda: ConfidenceTree(2, 2, 3).next_level([]), "0 laws"),
    (lambda: ConfidenceTree(2, 2, 3).next_level([[0.5, -0.5]]), r"draft_probs\[0\]"),
    (lambda: ConfidenceTree(2, 2, 3).next_level([[3.0, 2.0]]), "sum 5"),
    (lambda: ConfidenceTree(2, 2, 3).next_level([[math.nan, 0.1]]), r"draft_probs\[0\]"),
    (lambda: DraftLength("fixed", 3), "policy='fixed'"),
    (lambda: DraftLength("constant", 0), "length=0"),
    (lambda: DraftLength("confidence", 3, 1.5), "threshold=1.5"),
    (lambda: optimal_length(1.2, lambda n: 1.0, 0.1, 4), "acceptance=1.2"),
    (lambda: optimal_length(0.5, lambda n: 1.0, 0.0, 4), "draft_seconds=0.0"),
])
def test_bad_input_is_named(make, named):
    with pytest.raises((ValueError, IndexError), match=named):
        make()


# ---- expected tokens -------------------------------------------------------------------------------------------------

def emitted(shape, a, rng):
    """Tokens of one block: walk down from the context by which child, if any, is accepted."""
    node, tokens = -1, 1
    while True:
        rank = int(np.searchsorted(np.cumsum(a), rng.random(), side="right"))
        if rank >= len(shape.children(node)):
            return tokens
        node, tokens = shape.children(node)[rank], tokens + 1


def assert_mean_is_expected(tokens, expected):
    assert abs(np.mean(tokens) - expected) < 4 * np.std(tokens) / math.sqrt(len(tokens))


def test_expected_tokens_by_definition_and_by_simulation():
    for a in LAWS:
        for forest in forests(5):
            assert expected_tokens(shape_of(forest), a) == pytest.approx(1 + worth(forest, a), rel=1e-13)
    rng = np.random.default_rng(1)
    for shape in (widths((3, 2, 1)), random_shape(rng, 12), chain(6)):
        tokens = [emitted(shape, FALLING, rng) for _ in range(4000)]
        assert_mean_is_expected(tokens, expected_tokens(shape, FALLING))
        with pytest.raises(AssertionError):  # the ranks of siblings exchanged
            assert_mean_is_expected(tokens, expected_tokens(shape, FALLING[1::-1]))


def test_expected_tokens_of_chains_is_leviathans_sum():
    for length, alpha in itertools.product((0, 1, 5), (0.0, 0.3, 0.8)):
        expected = (1 - alpha ** (length + 1)) / (1 - alpha)
        assert expected_tokens(chain(length), [alpha]) == pytest.approx(expected, rel=1e-14)
    assert expected_tokens(chain(5), [1.0]) == 6
    assert expected_tokens(k_chains(3, 2), (0.5, 0.3)) == pytest.approx(1 + 0.8 * 1.5)  # a third rank counts 0


# ---- Sequoia ---------------------------------------------------------------------------------------------------------

def assert_is_the_best_tree():
    for a in LAWS:
        for n, depth in itertools.product(range(8), (None, 1, 2, 3, 5)):
            wanted = best_worth(a, n, math.inf if depth is None else depth)
            if wanted == -math.inf:
                with pytest.raises(ValueError, match="hold at most"):
                    sequoia(a, n, depth)
                continue
            shape = sequoia(a, n, depth)
            assert (shape.n_nodes, shape.depth <= (depth or n)) == (n, True)
            assert max(shape.ranks, default=0) < max(len(a), 1)
            assert expected_tokens(shape, a) == pytest.approx(1 + wanted, rel=1e-12)


def test_sequoia_is_the_best_of_all_ordered_trees():
    assert_is_the_best_tree()


def test_reconstruction_attains_what_the_programme_promises():
    rng = np.random.default_rng(2)
    for a in (*LAWS, rng.dirichlet(np.ones(12))[:9]):
        a = np.asarray(a)
        for max_depth in (None, 4, 9):
            best, choice = module._programme(a, 40, max_depth)
            for row, n in itertools.product(range(len(best)), (1, 7, 23, 40)):
                if best[row, n] > -math.inf:
                    shape = module._rebuild(choice, n, row)
                    assert shape.n_nodes == n
                    assert max_depth is None or shape.depth <= row
                    assert expected_tokens(shape, a) == pytest.approx(1 + best[row, n], rel=1e-12)


def richest(a, n):
    """n nodes of largest product along their path, one after the other: optimal where ranks fall, by exchange."""
    heap, values = [(-a[0], 1, 0, 1.0)], []  # minus value, tie, rank, value of the parent
    for tie in itertools.count(2):
        value, _, rank, parent = heapq.heappop(heap)
        values.append(-value)
        if len(values) == n:
            return 1 + math.fsum(values)
        heapq.heappush(heap, (value * a[0], 2 * tie, 0, -value))
        if rank + 1 < len(a):
            heapq.heappush(heap, (-parent * a[rank + 1], 2 * tie + 1, rank + 1, parent))


def assert_is_as_rich():
    rng = np.random.default_rng(3)
    for n_ranks, n in itertools.product((1, 3, 8), (10, 64, 128)):
        a = np.sort(rng.dirichlet(np.full(n_ranks + 1, 0.7))[:n_ranks])[::-1]
        assert expected_tokens(sequoia(a, n), a) == pytest.approx(richest(a, n), rel=1e-12)


def test_sequoia_is_greedy_choice_where_ranks_fall():
    assert_is_as_rich()


def test_greedy_choice_is_not_optimal_where_ranks_do_not_fall():
    """So the programme's split over ranks is needed: an early child of no worth opens the way to a later one."""
    a = (0.3, 0.0, 0.6, 0.1)
    assert expected_tokens(sequoia(a, 7), a) > richest(a, 7) + 0.1


@pytest.mark.parametrize("broken", ["first child takes all", "no split", "levels off by one"])
def test_both_checks_fail_for_a_broken_programme(monkeypatch, broken):
    true = module._programme

    def twin(a, n_nodes, max_depth):
        if broken == "levels off by one":
            return true(a, n_nodes, (n_nodes if max_depth is None else max_depth) + 1)
        best, choice = true(a, n_nodes, max_depth)
        sizes = np.arange(n_nodes + 1)
        if broken == "no split":
            choice = np.minimum(1, np.broadcast_to(sizes, choice.shape))
            return np.where(sizes <= choice.shape[1], best, -math.inf), choice
        deep = len(choice) - 1 or n_nodes
        chosen = np.where(sizes <= deep, sizes, 0)
        return np.where(sizes <= deep, best, -math.inf), np.broadcast_to(chosen, choice.shape)

    monkeypatch.setattr(module, "_programme", twin)
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception, IndexError)):
        assert_is_the_best_tree()
    if broken != "levels off by one":  # without a limit a spare level does no harm
        with pytest.raises((AssertionError, ValueError)):
            assert_is_as_rich()


def test_sequoia_beats_fixed_trees_of_its_size():
    for a in (FALLING, (0.5, 0.2, 0.1, 0.05, 0.02)):
        for rival in (widths((2, 2, 2)), widths((4, 2, 1, 1)), widths((1, 1, 3, 1, 1, 1, 1, 1)), k_chains(4, 4),
                      chain(14), widths((3, 3))):
            ours = expected_tokens(sequoia(a, rival.n_nodes), a)
            within = expected_tokens(sequoia(a, rival.n_nodes, rival.depth), a)
            theirs = expected_tokens(rival, a)
            assert ours > theirs + 0.01
            assert ours >= within >= theirs - 1e-12
    assert sequoia((1.0, 0.0), 9) == chain(9)
    assert sequoia((0.4, 0.3, 0.2), 3, 1) == widths((3,))


# ---- the tree for a machine ------------------------------------------------------------------------------------------

def target(n):
    return 1.0 + 0.03 * n + (0.2 if n > 8 else 0.0)


def draft_by_width(n):
    return 0.02 + 0.03 * n


@pytest.mark.parametrize("draft", [0.05, draft_by_width], ids=["per pass", "by width"])
def test_best_tree_is_the_best_of_sizes_and_depths(draft):
    for a in (FALLING, (0.1, 0.5, 0.3)):
        shape, speed = best_tree(a, target, draft, 30, 6)

        def speed_of(shape, a=a):
            cost = sum(draft(n) if callable(draft) else draft for n in shape.draft_widths)
            return expected_tokens(shape, a) / (target(shape.n_nodes + 1) + cost)

        assert speed == pytest.approx(speed_of(shape), rel=1e-12)
        room = {d: sum(len(a)**i for i in range(1, d + 1)) for d in range(1, 7)}
        tried = [speed_of(sequoia(a, n, d)) for n in range(1, 31) for d in range(1, 7) if n <= room[d]]
        assert speed == pytest.approx(max(tried), rel=1e-12)
        if not callable(draft):  # then it is also the best of all trees
            everything = [shape_of(f) for n in range(7) for f in forests(n)]
            small, small_speed = best_tree(a, target, draft, 6, 6)
            assert small_speed == pytest.approx(max(map(speed_of, everything)), rel=1e-12)
            assert speed_of(small) == pytest.approx(small_speed, rel=1e-12)


def test_best_tree_heeds_the_machine():
    flat, _ = best_tree(FALLING, lambda n: 1.0, 0.01, 64, 12)
    linear, _ = best_tree(FALLING, lambda n: 0.1 + 0.05 * n, 0.01, 64, 12)
    slow_draft, _ = best_tree(FALLING, lambda n: 1.0, 0.5, 64, 12)
    assert flat.n_nodes == 64 > linear.n_nodes > 0
    assert slow_draft.depth < flat.depth
    assert best_tree(FALLING, lambda n: float(n), 0.5, 64, 12) == (Shape(()), 1.0)  # does not pay: draft nothing


# ---- EAGLE-2 ---------------------------------------------------------------------------------------------------------

def law(path, v=4, sharpness=2.0):
    """A draft's next-token law after a path, fixed by the path."""
    logits = sharpness * np.random.default_rng([v, *path]).normal(size=v)
    return np.exp(logits) / np.exp(logits).sum()


def offers(top_k, depth, v=4):
    """Every offer of the method by its description: path -> product of confidences."""
    level, found = [()], {}
    value = {(): 1.0}
    for _ in range(depth):
        fresh = {}
        for path in level:
            probs = law(path, v)
            for token in sorted(range(v), key=lambda t: -probs[t])[:top_k]:
                fresh[(*path, token)] = value[path] * probs[token]
        found |= fresh
        value |= fresh
        level = sorted(fresh, key=lambda path: -fresh[path])[:top_k]
    return found


def paths_of(shape, tokens):
    return [tuple(tokens[v] for v in shape.path(node)) for node in range(shape.n_nodes)]


def assert_best_offers_are_kept(kept, top_k, depth, n_nodes):
    found = offers(top_k, depth)
    best = sorted(found, key=lambda path: -found[path])[:n_nodes]
    assert set(kept) == set(best)
    assert len(kept) == len(best)
    assert all(len(path) == 1 or path[:-1] in kept for path in kept)


def grown(top_k, depth, n_nodes, v=4):
    return paths_of(*confidence_tree(lambda paths: [law(path, v) for path in paths], top_k, depth, n_nodes))


CASES = [(top_k, depth, n_nodes) for top_k in (1, 2, 3, 4) for depth in (1, 2, 4) for n_nodes in (1, 3, 8, 20)]


def test_confidence_tree_keeps_the_best_offers():
    for case in CASES:
        assert_best_offers_are_kept(grown(*case), *case)


def test_confidence_tree_is_the_best_of_all_paths_where_nothing_is_pruned():
    """V = 3, depth 2, top_k 3 expands every path, so no ancestor-closed set of n paths has a larger sum of values."""
    value = {}
    for path in itertools.chain(itertools.product(range(3), repeat=1), itertools.product(range(3), repeat=2)):
        value[path] = math.prod(law(path[:i], 3)[path[i]] for i in range(len(path)))
    for n in (1, 2, 4, 6):
        closed = [s for s in itertools.combinations(value, n) if all(len(p) == 1 or p[:-1] in s for p in s)]
        most = max(sum(value[p] for p in s) for s in closed)
        assert sum(value[p] for p in grown(3, 2, n, 3)) == pytest.approx(most, rel=1e-13)


@pytest.mark.parametrize("broken", ["own confidence", "last level only"])
def test_the_offer_check_fails_for_broken_values(monkeypatch, broken):
    true = ConfidenceTree.next_level

    def twin(self, draft_probs):
        if broken == "own confidence":
            self._values = [1.0] * len(self._values)
        out = true(self, draft_probs)
        if broken == "last level only":
            self._offers = [(p, t, v + self._level) for p, t, v in self._offers]
        return out

    monkeypatch.setattr(ConfidenceTree, "next_level", twin)
    with pytest.raises((AssertionError, KeyError)):
        for case in CASES:
            assert_best_offers_are_kept(grown(*case), *case)


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 2.0])
def test_what_a_level_returns_names_its_frontier(sharpness):
    tree, nodes = ConfidenceTree(3, 5, 12), []
    while tree.frontier:
        nodes += tree.next_level([law(path, 4, sharpness) for path in tree.frontier])
        at = []
        for i in range(len(nodes)):
            path, node = [], i
            while node >= 0:
                path.append(nodes[node][1])
                node = nodes[node][0]
            at.append(tuple(reversed(path)))
        assert tree.frontier == (at[-3:] if tree.frontier else [])
    assert len(nodes) == 3 * 4
    with pytest.raises(ValueError, match="after the last level"):
        tree.next_level([])
    parents, tokens = tree.finish()
    assert len(parents) == len(tokens) == 12
    shape = Shape(parents)
    for node in range(-1, 12):  # children by falling confidence
        path = tuple(tokens[v] for v in shape.path(node))
        own = [law(path, 4, sharpness)[tokens[child]] for child in shape.children(node)]
        assert own == sorted(own, reverse=True)


def test_paths_end_and_ties_keep_ancestors():
    """Token 0 ends its path; a sure draft gives every node of its chain the value 1."""
    def ends(paths):
        return [np.zeros(3) if path[-1:] == (0,) else np.array([0.5, 0.3, 0.2]) for path in paths]

    shape, tokens = confidence_tree(ends, 3, 5, 500)
    assert all(not shape.children(v) for v in range(shape.n_nodes) if tokens[v] == 0)
    assert confidence_tree(lambda paths: [np.eye(3)[1]] * len(paths), 3, 5, 3) == (chain(3), (1, 1, 1))
    assert confidence_tree(lambda paths: [np.eye(3)[1]] * len(paths), 3, 5, 30) == (chain(5), (1,) * 5)
    rounded_up = np.array([0.0, 1.00001, 0.0])  # in single precision, say
    assert confidence_tree(lambda paths: [rounded_up] * len(paths), 3, 5, 3) == (chain(3), (1, 1, 1))
    ended = ConfidenceTree(2, 5, 5)
    ended.next_level([np.array([1.0, 0.0])])
    assert ended.next_level([np.zeros(2)]) == ended.frontier == []
    assert ended.finish() == ((-1,), (0,))


# ---- draft length ----------------------------------------------------------------------------------------------------

def lengths_in_transformers(blocks, schedule="heuristic"):
    from transformers.generation.candidate_generator import AssistedCandidateGenerator

    theirs = AssistedCandidateGenerator.__new__(AssistedCandidateGenerator)
    theirs.assistant_generation_config = SimpleNamespace(
        num_assistant_tokens_schedule=schedule, assistant_confidence_threshold=0.0)
    theirs.num_assistant_tokens, lengths = 3, []
    for accepted, drafted in blocks:
        theirs.update_candidate_strategy(None, torch.zeros(1, drafted + 1, 5), accepted)
        lengths.append(theirs.num_assistant_tokens)
    return lengths


def test_heuristic_length_is_transformers():
    rng = np.random.default_rng(4)
    blocks = [(int(rng.integers(0, drafted + 1)), int(drafted)) for drafted in rng.integers(1, 4, size=60)]
    for policy in ("heuristic", "constant"):
        ours, lengths = DraftLength(policy, 3), []
        for block in blocks:
            ours.observe(*block)
            lengths.append(ours.length)
        assert lengths == lengths_in_transformers(blocks, policy)
        assert (min(lengths) == 1) == (policy == "heuristic")
        assert lengths != lengths_in_transformers([(0, d) for _, d in blocks], "heuristic")


def test_confidence_stops_where_transformers_stops():
    from transformers.generation.stopping_criteria import ConfidenceCriteria

    rng = np.random.default_rng(5)
    for threshold in (0.0, 0.4, 0.9, 1.0):
        ours, theirs = DraftLength("confidence", 10**6, threshold), ConfidenceCriteria(threshold)
        agree, inverted = [], []
        for _ in range(50):
            logits = torch.from_numpy(rng.normal(size=(1, 6)) * 3)
            token = int(rng.integers(6))
            stop = theirs(torch.tensor([[token]]), (logits,))
            goes_on = ours.goes_on(1, logits.softmax(-1)[0, token].item())
            agree.append(goes_on is not stop)
            inverted.append(goes_on is stop)
        assert all(agree) and not all(inverted)
        assert ours.goes_on(1, threshold)  # reached is enough
    assert [DraftLength("confidence", 3).goes_on(n, 0.9) for n in (1, 2, 3)] == [True, True, False]
    assert [DraftLength("constant", 3).goes_on(n, 0.0) for n in (1, 2, 3)] == [True, True, False]


def test_optimal_length_by_simulation_of_its_blocks_and_by_hand():
    rng = np.random.default_rng(6)
    for alpha, slope, draft in ((0.8, 0.02, 0.05), (0.5, 0.1, 0.1), (0.9, 0.3, 0.02), (0.3, 0.5, 0.3)):
        def seconds(n, slope=slope):
            return 1 + slope * n

        # the run of acceptances of a block, had it no end; a block of length g emits 1 + min(run, g)
        runs = rng.geometric(1 - alpha, size=200_000) - 1
        speeds = [np.minimum(runs, g).mean() + 1 for g in range(13)]
        speeds = [tokens / (seconds(g + 1) + g * draft) for g, tokens in enumerate(speeds)]
        best = optimal_length(alpha, seconds, draft, 12)
        assert speeds[best] >= max(speeds) * (1 - 2e-3)
        flat = optimal_length(alpha, lambda n: 1.0, draft, 12)
        if alpha == 0.9:  # a target taken for flat drafts too much
            assert speeds[flat] < 0.92 * speeds[best]
    assert optimal_length(1.0, lambda n: 1.0, 1e-3, 9) == 9
    assert optimal_length(0.2, lambda n: 1.0, 0.3, 9) == 0  # pays only where acceptance exceeds the cost ratio
    assert optimal_length(0.31, lambda n: 1.0, 0.3, 9) >= 1


# ---- pooled chains ---------------------------------------------------------------------------------------------------

def block_laws(laws, length):
    """{block: (target, draft)} of all blocks of a length, by the chain rule."""
    blocks = {(): (1.0, 1.0)}
    for _ in range(length):
        blocks = {(*block, x): (t * laws(block)[0][x], d * laws(block)[1][x])
                  for block, (t, d) in blocks.items() for x in range(len(laws(block)[0]))}
    return blocks


def shared(chains, block):
    """How many tokens of the block the chains hold as a beginning of one of them."""
    return max(next((i for i, (a, b) in enumerate(zip(c, block, strict=True)) if a != b), len(block)) for c in chains)


def coupled(laws, n_chains, length):
    """The largest mean of 1 + `shared` over all couplings of i.i.d. chains and the target's block: a linear program."""
    blocks = block_laws(laws, length)
    drawn = list(itertools.combinations_with_replacement(blocks, n_chains))
    mass = [math.prod(blocks[c][1] for c in chains) * math.factorial(n_chains)
            / math.prod(math.factorial(chains.count(c)) for c in set(chains)) for chains in drawn]
    gain = np.array([[shared(chains, block) for block in blocks] for chains in drawn], dtype=np.float64)
    rows = np.concatenate([np.kron(np.eye(len(drawn)), np.ones(len(blocks))),
                           np.kron(np.ones(len(drawn)), np.eye(len(blocks)))])
    answer = linprog(-gain.ravel(), rows, [*mass, *(t for t, _ in blocks.values())])  # at most: the rest adds 0
    return 1 - answer.fun


def pooled(laws, n_chains, length):
    """SpecTr's tokens per pass with k-SEQ, by enumeration: a token's successors are those of all chains with it."""
    def accepted(chains, path):
        if len(path) == length:
            return 0.0
        target, draft = laws(path)
        rho = k_seq_rho(target, draft, len(chains))
        kept = np.minimum(draft, target / rho)
        share, reached = np.zeros(len(target)), 1.0
        for chain_ in chains:
            x = chain_[len(path)]
            share[x] += reached * kept[x] / draft[x]
            reached *= 1 - kept[x] / draft[x]
        left = target - kept * (1 - (1 - kept.sum()) ** len(chains)) / kept.sum()
        share += reached * left / left.sum()
        return sum(share[x] * (1 + accepted([c for c in chains if c[len(path)] == x], (*path, x)))
                   for x in {c[len(path)] for c in chains})

    blocks = block_laws(laws, length)
    return 1 + sum(math.prod(blocks[c][1] for c in chains) * accepted(chains, ())
                   for chains in itertools.product(blocks, repeat=n_chains))


def random_laws(size, seed):
    def laws(path):
        return np.random.default_rng([seed, len(path), *path]).dirichlet(np.ones(size), 2)
    return laws


@pytest.mark.parametrize(("size", "n_chains", "length"),
                         [(2, 1, 3), (3, 1, 2), (2, 2, 2), (2, 3, 2), (2, 2, 3), (3, 2, 2)])
def test_no_verification_of_chains_exceeds_their_bound(size, n_chains, length):
    """Against the linear program over all couplings, which no exact rule exceeds; for one chain they are equal."""
    for seed in range(5):
        laws = random_laws(size, seed)
        bound, best = chains_bound(laws, n_chains, length), coupled(laws, n_chains, length)
        assert pooled(laws, n_chains, length) <= best + 1e-9 <= bound + 2e-9
        if n_chains == 1:
            assert best == pytest.approx(bound, abs=1e-9)


def test_pooled_chains_exceed_what_single_positions_allow():
    """So `optimal_tokens` of separate chains is no bound for them, as its docstring says; `chains_bound` is."""
    target, draft = np.array([0.9, 0.1]), np.array([0.6, 0.4])
    apart = optimal_tokens(k_chains(4, 2), lambda n: optimal(target, draft, n).acceptance)
    found, bound = pooled(lambda path: (target, draft), 4, 2), chains_bound(lambda path: (target, draft), 4, 2)
    assert apart + 0.1 < found <= bound <= 3
    one = chains_bound(lambda path: (target, draft), 1, 3)  # blocks at once may yield more than position by position
    assert one > optimal_tokens(chain(3), lambda n: optimal(target, draft, n).acceptance) + 0.01
    assert chains_bound(lambda path: (target, target), 2, 3) == pytest.approx(4) and chains_bound(None, 2, 0) == 1
    with pytest.raises(ValueError, match=r"length=8: 30\^8 blocks"):
        chains_bound(lambda path: (np.full(30, 1 / 30),) * 2, 2, 8)
    with pytest.raises(ValueError, match="n_chains=0"):
        chains_bound(random_laws(2, 0), 0, 2)
