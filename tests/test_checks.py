"""A notebook's claims are told with their numbers; what fails, fails; what a size cannot show is skipped by name."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.checks import Checks, within


def test_a_claim_that_fails_is_named_with_both_numbers(capsys):
    check = Checks()
    check("two is less than one", 2.0, "<", 1.0)
    check("one is less than two", 1, "<", 2)
    check("each is", [1.0, 5.0], "<", 3.0)
    check("all are", np.array([1.0, 2.0]), "<", [2.0, 3.0])
    with pytest.raises(AssertionError) as error:
        check.report()
    assert str(error.value) == ("does not hold: two is less than one: 2 < 1\n"
                                "does not hold: each is: [1, 5] < 3")
    assert "2 claims hold" in capsys.readouterr().out


def test_what_a_size_cannot_show_is_skipped_by_name(capsys):
    check = Checks()
    check("noise pays", 2.0, "<", 1.0, needs={"3 seeds": False, "500 images": False, "a metric": True})
    check("each is larger", [], "<", 1.0)
    check.report()
    said = capsys.readouterr().out
    assert "skipped: noise pays: needs 3 seeds and 500 images" in said
    assert "skipped: each is larger: nothing to compare" in said


def test_nan_fails_and_is_shown():
    check = Checks()
    check("it is small", float("nan"), "<", 1.0)
    with pytest.raises(AssertionError, match="it is small: nan < 1"):
        check.report()


def test_an_unknown_relation_is_refused():
    with pytest.raises(ValueError, match=r"relation='=<'.*<="):
        Checks()("it is", 1, "=<", 2)


def test_parameters_out_of_their_bounds_are_named():
    within(n_seeds=(1, 1, 50), budgets=([4, 8], 1, 1000), temperature=(0.0, 0, 10))
    for bounds, words in (({"n_seeds": (0, 1, 50)}, "n_seeds=0: expected .* 1 to 50"),
                          ({"budgets": ([4, 2000], 1, 1000)}, r"budgets=\[4, 2000\]"),
                          ({"budgets": ([], 1, 1000)}, r"budgets=\[\]: expected at least one"),
                          ({"n_seeds": ("3", 1, 50)}, "n_seeds='3'"),
                          ({"n_seeds": (float("nan"), 1, 50)}, "n_seeds=nan"),
                          ({"n_seeds": (True, 1, 50)}, "n_seeds=True")):
        with pytest.raises(ValueError, match=words):
            within(**bounds)
