"""run(), Inputs and Run: keys, permalinks, records, cancellation, errors."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import zlib
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from workbench import Cancelled, Cost, Inputs, Quality, Run, Store, inputs, run, sweep, together
from workbench.problems.decoding import markov
from workbench.problems.denoising import DiscreteSchedule
from workbench.problems.mixtures import two_dim, two_modes
from workbench.runs import JudgeError

GIVEN = Inputs("t_stitch", "toy", "d1", "0.1+t_stitch.1", 7, 4, {"n_steps": 20, "fractions": (0.4, 0.25), "eta": 0.5})
# The canonical form, written by hand: should it ever change, stored runs and shared links would be lost.
CANONICAL = ('{"code":"0.1+t_stitch.1","digest":"d1","knobs":{"eta":0.5,"fractions":[0.4,0.25],"n_steps":20},'
             '"method":"t_stitch","n_samples":4,"problem":"toy","seed":7}')


def test_key_is_the_hash_of_the_canonical_form():
    assert GIVEN.canonical == CANONICAL
    assert GIVEN.key == hashlib.sha256(CANONICAL.encode()).hexdigest()[:32]
    assert replace(GIVEN, knobs=dict(reversed(GIVEN.knobs.items()))).key == GIVEN.key


def test_key_changes_with_every_field_and_knob():
    changed = [replace(GIVEN, **{f.name: v + 1 if isinstance(v := getattr(GIVEN, f.name), int) else v + "x"})
               for f in fields(Inputs) if f.name != "knobs"]
    changed += [replace(GIVEN, knobs={**GIVEN.knobs, "eta": 0.5 + 1e-15}), replace(GIVEN, knobs={"n_steps": 20})]
    changed += [replace(GIVEN, knobs={**GIVEN.knobs, "fractions": (0.25, 0.4)})]
    assert len({i.key for i in [GIVEN, *changed]}) == len(changed) + 1 == len(fields(Inputs)) + 3


def test_every_spelling_of_a_knob_has_one_key():
    problem = two_modes()
    spellings = ({}, {"n_steps": 20.0}, {"fractions": 0.4}, {"fractions": [0.4]})
    assert len({inputs("t_stitch", problem, **k).key for k in spellings}) == 1
    other = two_modes(DiscreteSchedule.linear())  # the same name, another digest
    assert inputs("ddim", problem).key != inputs("ddim", other).key


def test_permalink_round_trip():
    stitched = inputs("t_stitch", two_dim(), fractions=(1 / 3, 0.1))
    for given in (GIVEN, inputs("ddim", two_modes(), seed=10**12), stitched):
        link = given.permalink
        assert set(link) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
        back = Inputs.from_permalink(f" {link}\n")
        assert back == given and back.key == given.key and isinstance(back.knobs.get("fractions", ()), tuple)


def packed(text: bytes) -> str:
    return base64.urlsafe_b64encode(zlib.compress(text, 9)).decode()


def changed(**fields) -> str:
    return packed(json.dumps({**json.loads(CANONICAL), **fields}).encode())


GARBAGE = {
    "empty": "", "words": "not a link at all", "no ascii": "é" * 12, "cut": GIVEN.permalink[:-20],
    "half": GIVEN.permalink[:30], "not json": packed(b"{"), "a list": packed(b"[]"), "a number": packed(b"3"),
    "no fields": packed(b"{}"), "no utf-8": packed(b"\xff\xfe"), "knobs a list": changed(knobs=[1]),
    "one field too many": changed(extra=1), "zip bomb": packed(b" " * 10**7 + CANONICAL.encode()),
    "nesting bomb": packed(b"[" * 90_000),
}


@pytest.mark.parametrize("text", GARBAGE.values(), ids=GARBAGE)
def test_permalink_refuses_garbage(text):
    with pytest.raises(ValueError, match="permalink"):
        Inputs.from_permalink(text)


def test_permalink_refuses_random_damage():
    source = random.Random(0)
    for _ in range(300):
        link = list(GIVEN.permalink)
        link[source.randrange(len(link))] = source.choice("ABCabc019-_")
        try:
            assert Inputs.from_permalink("".join(link)) == GIVEN  # the letter was that one already
        except ValueError as error:
            assert "permalink" in str(error)


def test_record_round_trip_with_values_json_has_not():
    quality = {"a": Quality(math.inf, math.nan, 3), "b": Quality(0.1 + 0.2, 1e-300, 4)}
    made = Run(GIVEN, Cost({"m": 3}, {"m": 1}, {"m": 7.5}), quality, {"python": "3"}, torch.ones(2))
    back = Run.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False)), made.tensors())
    assert back.inputs == GIVEN and back.cost == made.cost and back.quality["b"] == quality["b"]
    assert back.quality["a"].value == math.inf and math.isnan(back.quality["a"].stderr)


def test_run_fills_in_all_and_titles_itself_by_its_knobs():
    made = run("ddim", two_modes(), seed=3, n_samples=50, n_steps=5)
    assert made.knobs == {"n_steps": 5, "guidance": 1.0, "spacing": "trailing", "eta": 0.0, "model": "best"}
    flops = {"wiener": 0.0, "exact": 250 * 48.0}
    assert made.cost == Cost({"wiener": 0, "exact": 250}, {"wiener": 0, "exact": 5}, flops)
    assert made.quality["wasserstein_1"].n == 50 and made.answer.shape == (50, 1)
    assert {"python", "torch", "device"} <= set(made.environment)
    assert made.title == ("ddim on two_modes: n_steps 5, guidance 1.0, spacing trailing, eta 0.0, model best, seed 3")


@pytest.mark.parametrize(("wrong", "said"), [
    ({"seed": -1}, "seed=-1"), ({"seed": 1.5}, r"seed=1\.5"), ({"n_samples": 0}, "n_samples=0"),
    ({"n_samples": True}, "n_samples=True"), ({"n_steps": 0}, "n_steps=0")])
def test_wrong_inputs_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        run("ddim", two_modes(), **wrong)


@pytest.mark.parametrize("after", [1, 3])
def test_stop_is_heeded_after_the_very_step(after):
    seen = []
    with pytest.raises(Cancelled):
        run("ddim", two_modes(), n_samples=2, n_steps=9, stop=lambda: len(seen) >= after,
            on_step=lambda step, cost: seen.append(step))
    assert [s.info["i"] for s in seen] == list(range(after))


def test_stop_is_heeded_before_the_very_call():
    """Steps of a corrector with 10 calls each: none of them is waited for."""
    asked, base = [], two_modes()

    def watch(name, network):
        def counted(*rows):
            asked.append(name)
            return network(*rows)
        return counted

    with pytest.raises(Cancelled):
        run("score_sde", base.wrapped(watch), n_samples=2, n_steps=9, corrector="langevin", n_corrector=10,
            stop=lambda: len(asked) >= 3)
    assert len(asked) == 3


def test_an_answer_that_is_not_finite_is_an_error():
    base = two_modes()
    broken = base.wrapped(lambda name, network: lambda x, t, labels: network(x, t, labels) * math.nan)
    with pytest.raises(ValueError, match=r"ddim: .* not finite"):
        run("ddim", broken, n_samples=2)


@pytest.mark.parametrize(("call", "kind", "words"), [
    (lambda p: run("ddim", p, seed=None), ValueError, "seed=None: expected an integer of at least 0 and at most"),
    (lambda p: run("ddim", p, seed=2**63), ValueError, r"seed=9223372036854775808: .*at most 9223372036854775807"),
    (lambda p: run("ddim", p, n_samples=10**9), ValueError, "n_samples=1000000000: .*at most 100000"),
    (lambda p: run("ddim", p, n_samples=2.0), ValueError, r"n_samples=2.0: expected an integer"),
    (lambda p: run("ddim", p, model=np.array(["best", "best"])), ValueError, "model=array.*expected one of"),
    (lambda p: run("ddim", p, n_steps=math.nan), TypeError, "n_steps=nan: expected int, 1 to 1000"),
    (lambda p: run("t_stitch", p, fractions=(0.1,) * 5000), ValueError, "fractions: 5000 entries, .* at most 1000"),
    (lambda p: run("t_stitch", p, fractions={"a": 1}), TypeError, "fractions={'a': 1}: expected a tuple of numbers"),
    (lambda p: run("speculative", p), ValueError, "'speculative' is of the family decoding, 'two_modes' of denoising"),
    (lambda p: run("ddim", markov()), ValueError, "'ddim' is of the family denoising, 'Markov chain.*' of decoding"),
    (lambda p: run("ddim", None), TypeError, "problem=None: expected a problem, such as"),
    (lambda p: sweep("ddim", p, {"n_steps": 5}), TypeError, r"axes\['n_steps'\]=5: expected several values"),
    (lambda p: sweep("t_stitch", p, {"solver": "ddim"}), TypeError, r"axes\['solver'\]='ddim': expected several"),
    (lambda p: sweep("ddim", p, {}, seeds=3), TypeError, "seeds=3: expected several values"),
    (lambda p: sweep("ddim", p, {}, store=3), TypeError, "folder=3: expected a path"),
    (lambda p: together(p, [inputs("ddim", two_dim())]), ValueError,
     "inputs of 'two_dim_ring'.*expected those of 'two_modes'"),
])
def test_errors_name_the_thing(call, kind, words):
    with pytest.raises(kind, match=words):
        call(two_modes())


def test_numpy_scalars_are_numbers():
    problem = two_modes()
    plain = inputs("t_stitch", problem, 3, 4, n_steps=5, fractions=(0.5,), solver="ddim")
    numpys = inputs("t_stitch", problem, np.int64(3), np.int32(4), n_steps=np.int64(5), fractions=(np.float64(0.5),),
                    solver=np.str_("ddim"))
    assert numpys == plain and numpys.key == plain.key
    assert inputs("t_stitch", problem, 3, 4, n_steps=5, fractions=np.float64(0.5), solver="ddim") == plain


def test_a_sweep_takes_generators(tmp_path):
    runs = sweep("ddim", two_modes(), {"n_steps": (n for n in (1, 2))}, seeds=(s for s in (0, 1)), n_samples=2,
                 store=tmp_path / "runs")
    assert [(r.knobs["n_steps"], r.inputs.seed) for r in runs] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert len(list(Store(tmp_path / "runs"))) == 4


@pytest.mark.parametrize(("field", "value"), [
    ("seed", "1"), ("seed", True), ("n_samples", 1.5), ("knobs", [1]), ("method", None), ("knobs", {"a": {"b": 1}}),
    ("knobs", {"a": [[1]]}), ("more", 1)])
def test_records_of_inputs_with_another_field_or_kind_are_refused(field, value):
    with pytest.raises(ValueError, match=field if field != "knobs" or isinstance(value, list) else "knob a="):
        Inputs.from_dict({**json.loads(CANONICAL), field: value})


@pytest.mark.parametrize(("judge", "words"), [
    (lambda answer, labels: 1 / 0, "judge of 'two_modes' failed: ZeroDivisionError"),
    (lambda answer, labels: {"drift": 0.5}, "gave drift=0.5: expected a Quality"),
    (lambda answer, labels: {"sharpness": Quality(1.0, 0.1, 4)}, "gave 'sharpness': expected one of"),
    (lambda answer, labels: None, "gave None: expected"),
])
def test_a_judge_that_fails_loses_no_run(judge, words):
    problem = replace(two_modes(), judge=judge)
    with pytest.raises(JudgeError, match=words) as error:
        run("ddim", problem, n_samples=4, n_steps=3)
    sound = run("ddim", two_modes(), n_samples=4, n_steps=3)
    assert error.value.run.inputs == sound.inputs and error.value.run.cost == sound.cost
    assert torch.equal(error.value.run.answer, sound.answer) and error.value.run.quality == {}
