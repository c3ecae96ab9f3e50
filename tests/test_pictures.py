"""Figures, checked by the lines and labels that matplotlib draws."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex

from qlora.pictures import as_svg, draw_merge, draw_run, save_png, smoothed

# Okabe and Ito, Color Universal Design (2008)
OKABE_ITO = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}
GREYS = {"#24292f", "#8c959f", "#ffffff"}  # ink, quiet lines, the edge of a point


def run_of(count, *, every=0):
    """Rows of a run with `count` logs, 10 steps apart, and an evaluation every `every` logs."""
    rows = []
    for i in range(1, count + 1):
        loss, peak_bytes = 0.5 + 2 / i + 0.1 * math.sin(7 * i), 2**30 * (2 - 1 / i)
        row = {"step": 10 * i, "loss": loss, "grad_norm": 1 / i, "peak_bytes": peak_bytes}
        rows.append(row | {"learning_rate": 1e-4, "tokens_per_second": 900.0})
        if every and i % every == 0:
            rows.append({"step": 10 * i, "eval_loss": 0.6 + 2 / i})
    return rows


def line_of(axes, label):
    (line,) = (line for line in axes.lines if str(line.get_label()).startswith(label))
    return line


@pytest.mark.parametrize("count", [1, 3, 200, 10_000])
def test_a_run_of_any_length(count, tmp_path):
    rows = run_of(count)
    save_png(draw_run(rows, total_bytes=8 * 2**30), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    axes = draw_run(rows).axes
    losses = [row["loss"] for row in rows]
    drawn = line_of(axes[0], "training")
    assert drawn.get_xdata()[0] == 10 and drawn.get_xdata()[-1] == 10 * count
    if count < 60:  # as they are
        assert list(drawn.get_ydata()) == losses and len(axes[0].lines) == 1
    else:
        raw, smooth = axes[0].lines
        assert list(raw.get_ydata()) == losses and raw.get_alpha() < 0.5
        assert len(smooth.get_ydata()) <= 500
        assert np.diff(smooth.get_ydata()).std() < np.diff(losses).std() / 2
        assert "smoothed" in smooth.get_label()


def test_smoothing_is_the_mean_around_each_value():
    values = np.array([4.0, 1.0, np.nan, 7.0, 2.0, 2.0])
    wanted = [np.nanmean(values[max(i - 1, 0) : i + 2]) for i in range(6)]
    assert smoothed(values, 2) == pytest.approx(wanted, rel=1e-12)
    assert smoothed(values, 3) == pytest.approx(wanted, rel=1e-12)
    assert np.isnan(smoothed(np.full(3, np.nan), 2)).all()


def test_evaluation_differs_from_training_in_grey():
    axes = draw_run(run_of(40, every=10)).axes[0]
    evaluation, training = line_of(axes, "evaluation"), line_of(axes, "training")
    assert list(evaluation.get_xdata()) == [100, 200, 300, 400]
    assert list(evaluation.get_ydata()) == pytest.approx([0.6 + 2 / i for i in (10, 20, 30, 40)])
    assert evaluation.get_linestyle() != training.get_linestyle()
    assert evaluation.get_marker() not in ("None", training.get_marker())
    assert "0.6500 at the end" in evaluation.get_label()
    assert len(draw_run(run_of(40)).axes[0].lines) == 1  # no evaluation, no points


def test_panels_below_the_loss():
    def titles(rows, **settings):
        return [axes.get_title(loc="left") for axes in draw_run(rows, **settings).axes[1:]]

    below = ["learning rate", "gradient norm", "tokens per second", "memory: 1.8 of 16 GiB"]
    assert titles(run_of(4), total_bytes=2**34) == below
    assert titles(run_of(4))[-1] == "memory: 1.8 GiB"
    planned = [row | {"planned_bytes": 5 * 2**29} for row in run_of(4)]
    assert titles(planned)[-1] == "memory: 1.8 GiB, planned 2.5"
    memory = draw_run(planned).axes[-1]
    assert list(memory.lines[-1].get_ydata()) == [2.5, 2.5] and memory.get_ylim()[1] > 2.5
    assert titles([{"step": 1, "loss": 2.0, "grad_norm": 1.0}]) == ["gradient norm"]
    assert titles([{"step": 1, "loss": 2.0, "grad_norm": None}]) == []
    lines = draw_run(run_of(4), total_bytes=2**34).axes[-1].lines
    assert [set(line.get_ydata()) for line in lines if line.is_dashed()] == [{16}]


def test_a_nan_loss_is_shown():
    rows = run_of(30)
    axes = draw_run(rows[:20] + [row | {"loss": math.nan} for row in rows[20:]]).axes[0]
    (gone,) = axes.patches
    assert (gone.get_x(), gone.get_x() + gone.get_width()) == (210, 300)
    assert "not a number at the end" in line_of(axes, "training").get_label()


def test_the_loss_axis_starts_at_0_or_just_below_the_lines_and_cuts_spikes():
    def limits(rows):
        return draw_run(rows).axes[0].get_ylim()

    assert limits(run_of(20))[0] == 0  # from 2.57 to 0.6
    high = [{"step": i, "loss": 1.6 + 0.4 / i} for i in range(1, 9)]
    assert 1.4 < limits([*high, {"step": 8, "eval_loss": 1.6}])[0] < 1.6
    assert limits([{"step": 1, "loss": math.nan}])[1] == 1
    rows = run_of(300)
    rows[150]["loss"] = 1000.0
    assert 2.5 < limits(rows)[1] < 1000 / 5
    assert draw_run([]).axes[0].lines[:] == []


def report_of(*, layers=3, kinds=("q_proj", "up_proj"), verified=True):
    facts = {"delta_over_weight": 0.01, "kept": 0.99}
    names = [f"model.layers.{i}.{kind}" for i in range(layers) for kind in kinds]
    verify = {"loss_base": 3.0, "loss_live": 1.0, "loss_merged": 1.1, "kept": 0.95, "kl": 0.01}
    return {"layers": dict.fromkeys(names, facts), "verify": verify if verified else None}


def test_the_figure_of_a_merge():
    kinds = [f"kind{i}" for i in range(14)]
    changes, kept = draw_merge(report_of(kinds=kinds, verified=False)).axes
    looks = {(line.get_color(), line.get_marker()) for line in changes.lines}
    assert len(looks) == 14 and len({marker for _, marker in looks}) > 7  # told apart in grey
    assert len(kept.lines) == 14 + 1
    bars = draw_merge(report_of()).axes[-1]
    assert [bar.get_height() for bar in bars.patches] == [3.0, 1.0, 1.1]
    assert [t.get_text() for t in bars.get_xticklabels()] == ["4-bit base", "live", "merged"]


def test_colours_are_those_for_colour_blind_readers():
    for figure in (draw_run(run_of(90, every=30)), draw_merge(report_of())):
        lines = {to_hex(line.get_color()) for axes in figure.axes for line in axes.lines}
        bars = {to_hex(patch.get_facecolor()) for axes in figure.axes for patch in axes.patches}
        assert lines | bars <= OKABE_ITO | GREYS
        assert lines & OKABE_ITO


@pytest.mark.parametrize("count", [3, 10_000])
def test_svg_for_a_page(count):
    svg = as_svg(draw_run(run_of(count, every=count // 3)), "Curves")
    assert len(svg) < 250_000
    ElementTree.fromstring(svg)
    assert "#24292f" not in svg and "currentColor" in svg  # the page sets the colour of text
    assert "#0072b2" not in svg.replace("var(--blue, #0072b2)", "")
    assert "optimizer step</text>" in svg  # text that can be searched and read aloud
    assert not re.search(r'<g id=|\s(?:width|height)="\d+pt"', svg)
