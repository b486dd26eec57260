"""Static figures: what they draw on logarithmic axes, and the numbers kept beside them."""

from __future__ import annotations

import io

import holoviews as hv
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import Collection
from matplotlib.text import Text

import workbench as wb
from widgets import curve_plot, frontier_plot, save_figure
from widgets.frontier import COLOURS, INK, _for_any_ground, _log_ticks
from workbench.problems.mixtures import two_modes


def axes_of(figure):
    return hv.render(figure.element, backend="matplotlib").axes


def test_a_power_law_is_a_straight_line_on_logarithmic_axes() -> None:
    law = [(n, 3.0 * n**-2, 0.0) for n in (4, 8, 16, 32)]
    figure = curve_plot({"law": law}, x_label="n", y_label="error", log="xy")
    (axes,) = axes_of(figure)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    drawn = axes.transData.transform([row[:2] for row in law])
    slopes = (drawn[1:, 1] - drawn[:-1, 1]) / (drawn[1:, 0] - drawn[:-1, 0])
    assert slopes.std() < 1e-6 * abs(slopes.mean())
    assert axes.get_xlim()[0] < 4 and axes.get_xlim()[1] > 32
    linear = axes_of(curve_plot({"law": law}, x_label="n", y_label="error"))[0]
    assert linear.get_xscale() == linear.get_yscale() == "linear"


def test_what_a_logarithm_does_not_know_is_left_out_but_kept_in_the_table() -> None:
    rows = [(1, 0.0, 0.0), (2, -1.0, 0.1), (4, 2.0, 0.1), (8, 1.0, float("nan"))]
    figure = curve_plot({"mixed": rows}, x_label="n", y_label="error", log="y")
    assert len(figure.frame) == 4
    (curve,) = figure.element.traverse(lambda element: element, [hv.Curve])
    assert [tuple(p) for p in curve.array()] == [(4, 2.0), (8, 1.0)]


def test_guides_are_lines_without_a_place_in_the_key() -> None:
    law = [(n, 3.0 / n, 0.0) for n in (4, 8)]
    figure = curve_plot({"ours": law, "slope 1": law}, x_label="n", y_label="error", log="xy", guides=["slope 1"])
    (axes,) = axes_of(figure)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ours"]
    assert any("slope 1" in text.get_text() for text in axes.texts)
    plain = axes_of(curve_plot({"ours": law, "slope 1": law}, x_label="n", y_label="error"))[0]
    assert len(plain.get_legend().get_texts()) == 2


def test_published_numbers_have_axes_of_their_own_of_the_same_kind(tmp_path) -> None:
    figure = curve_plot({"a": [(3, 2.0, 0.1), (9, 1.0, 0.1)]}, x_label="n", y_label="ours", log="xy",
                        published={"a": [(3, 90.0), (10, 3.0)]}, published_label="FID")
    ours, theirs = axes_of(figure)
    assert theirs.get_yscale() == "log" and theirs.get_ylim()[1] > 90 > ours.get_ylim()[1]
    save_figure(figure, "both", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"both.png", "both.svg", "both.csv"}


def test_another_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="log='z'"):
        curve_plot({}, x_label="n", y_label="error", log="z")


def test_points_of_one_method_may_be_named_by_what_differs() -> None:
    runs = wb.sweep("t_stitch", two_modes(), {"solver": ["ddim", "dpmpp_2m"], "n_steps": [2, 4, 8]}, seeds=(0, 1),
                    n_samples=64)
    found = wb.points(runs, "wasserstein_1")
    figure = frontier_plot(found, "wasserstein_1", cost="evaluations", log_y=True,
                           series=lambda p: p.runs[0].knobs["solver"])
    (axes,) = axes_of(figure)
    assert {t.get_text() for t in axes.get_legend().get_texts()} >= {"ddim", "dpmpp_2m"}
    assert axes.get_yscale() == "log" and set(figure.frame["series"]) == {"ddim", "dpmpp_2m"}
    assert set(frontier_plot(found, "wasserstein_1").frame["series"]) == {"t_stitch"}


@pytest.mark.parametrize("value", [3.0, 1.3, 0.7, 1e-9, 4e12])
def test_one_value_on_a_logarithmic_axis_has_a_tick_beside_it(value):
    """No tick at all is what the drawing library cannot draw."""
    assert _log_ticks(value / 1.3, value * 1.3)
    curve_plot({"one": [(value, value, 0.0)]}, x_label="x", y_label="y", log="xy").render("svg")


@pytest.mark.parametrize("title", ["{x}", "{position.__class__}", "100 % {", "}"])
def test_a_title_is_no_template(title):
    figure = curve_plot({"one": [(1, 1, 0.0)]}, x_label="x", y_label="y", title=title, published={"p": [(1.0, 2.0)]},
                        published_title=title)
    points = wb.points([wb.run("ddim", two_modes(), 0, 500, n_steps=k) for k in (2, 3)], "wasserstein_1")
    for made, times in ((figure, 2), (frontier_plot(points, "wasserstein_1", title=title), 1)):
        shown = [axes.get_title() for axes in hv.render(made.element, backend="matplotlib").axes]
        assert shown.count(title) == times


def contrast(one, other):
    """WCAG's, of two colours."""
    def luminance(colour):
        rgb = np.array(matplotlib.colors.to_rgb(colour))
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_a_figure_on_a_page_is_legible_on_light_and_on_dark():
    """JupyterLab's grounds are #ffffff and #111111; files stay black on white."""
    found = wb.points([wb.run("ddim", two_modes(), 0, 500, n_steps=k) for k in (2, 3)], "wasserstein_1")
    figure = frontier_plot(found, "wasserstein_1", reference=found[-1], label=lambda point: "named")
    drawn = hv.render(figure.element, backend="matplotlib")
    texts = [text for text in drawn.findobj(Text) if text.get_text()]
    assert min(contrast(text.get_color(), "#111111") for text in texts) < 1.5  # as it was drawn
    _for_any_ground(drawn)
    for ground in ("#ffffff", "#111111"):
        assert min(contrast(text.get_color(), ground) for text in texts) > 4
        assert contrast(INK, ground) > 4 and all(contrast(colour, ground) > 2 for colour in COLOURS)
    marks = drawn.findobj(Collection)
    for part in ("get_facecolor", "get_edgecolor"):  # the reference's star and whisker are black in a file
        assert all(colour[:3].any() for mark in marks for colour in getattr(mark, part)())
    shown, file = (matplotlib.image.imread(io.BytesIO(part)) for part in (figure._repr_png_(), figure.render("png")))
    assert shown[0, 0, 3] == 0 and (file[0, 0] == 1).all()
