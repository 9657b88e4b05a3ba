"""The plots of losses that `retention train` and `retention swap` write."""

import math

import pytest

from retention.integrations.transformers.training import plot
from retention.integrations.transformers.training.choosing import LayerCosts
from retention.integrations.transformers.training.plot import draw, draw_layers, draw_recovery, smooth


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written."""
    saved, save = [], plot._save
    monkeypatch.setattr(plot, "_save", lambda figure, file: saved.append(figure) or save(figure, file))
    return saved


def log(steps, name="loss"):
    return [{"step": step, name: 2.0 / step} for step in steps]


def lines(axes, label):
    return [line for line in axes.lines if line.get_label() == label]


@pytest.mark.slow
def test_a_plot_names_model_units_and_kinds_of_loss(figures, tmp_path):
    draw([*log(range(1, 100)), *log((50, 99), "eval_loss")], 64, "bytes", tmp_path / "a.png", "RetNet, 8 parameters")
    (axes,) = figures[0].axes
    assert axes.get_title() == "RetNet, 8 parameters"
    assert axes.get_xlabel() == "bytes seen"
    assert axes.get_ylabel() == "loss, nats per byte"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training, smoothed", "validation"]
    assert any(label.get_text() for label in axes.get_xticklabels())
    (training,), (validation,) = lines(axes, "training, smoothed"), lines(axes, "validation")
    assert list(validation.get_xdata()) == [50 * 64, 99 * 64]
    assert training.get_color() != validation.get_color()
    assert training.get_linestyle() != validation.get_linestyle()


@pytest.mark.slow
def test_a_single_training_loss_is_seen(figures, tmp_path):
    draw(log([1]), 64, "tokens", tmp_path / "a.png")
    (line,) = lines(figures[0].axes[0], "training, smoothed")
    assert line.get_marker() == "o"


@pytest.mark.slow
def test_a_panel_shows_one_kind_of_loss_with_its_unit_and_labelled_ticks(figures, tmp_path):
    part = ([*log(range(10, 60, 10)), *log((50,), "eval_loss")], [*log(range(10, 60, 10)), *log((50,), "eval_loss")])
    draw_recovery({"part 1": part}, 64, "tokens", tmp_path / "a.png", "my_model, 8 parameters")
    assert figures[0].get_suptitle() == "my_model, 8 parameters"
    assert [axes.get_ylabel() for axes in figures[0].axes] == [
        "relative squared error",
        "training loss, nats per token",
        "cross-entropy, nats per token",
    ]
    kinds = [{line.get_label() for line in axes.lines if line.get_label()[0] != "_"} for axes in figures[0].axes]
    assert kinds == [{"training, smoothed", "validation"}, {"training, smoothed"}, {"validation"}]
    for axes in figures[0].axes:
        assert axes.get_xlabel() == "tokens seen"
        low, high = axes.get_ylim()
        shown = [text for text in axes.get_yticklabels() if low <= text.get_position()[1] <= high and text.get_text()]
        assert len(shown) >= 2


@pytest.mark.slow
def test_parts_follow_each_other(figures, tmp_path):
    draw_recovery(
        dict(a=(log([1, 4]), log([2])), b=(log([2, 4]), log([2])), c=([], [])), 10, "bytes", tmp_path / "a.png"
    )
    fit, divergence, quality = figures[0].axes
    assert [list(line.get_xdata()) for line in lines(fit, "training, smoothed")] == [[10, 40], [60, 80]]
    assert [list(line.get_xdata()) for line in lines(divergence, "training, smoothed")] == [[20], [40]]
    assert [text.get_text().strip() for text in fit.texts] == ["a", "b", "c"]
    assert [text.get_text() for text in quality.texts] == ["not measured yet"]


@pytest.mark.slow
def test_losses_that_are_all_zero_or_below_by_rounding_are_drawn_without_a_logarithm(figures, tmp_path):
    nothing = [{"step": step, "loss": -1e-9} for step in (1, 2)]
    draw_recovery({"part 1": (nothing, nothing)}, 10, "bytes", tmp_path / "a.png")
    assert [axes.get_yscale() for axes in figures[0].axes[:2]] == ["linear", "linear"]


@pytest.mark.slow
def test_the_costs_of_layers_are_drawn_above_the_loss_of_the_original(figures, tmp_path):
    costs = LayerCosts(["a", "b"], original=2.0, untrained=[2.5, 2.25], fitted=[2.25, 2.125], chosen=[1])
    draw_layers(costs, tmp_path / "layers.png")
    (axes,) = figures[0].axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert drawn == {
        "untrained": ([0, 1], [0.5, 0.25]),
        "fitted": ([0, 1], [0.25, 0.125]),
        "chosen": ([1], [0.125]),
    }
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_plot_takes_what_a_run_may_log(tmp_path):
    draw([{"loss": math.nan, "step": 10}, {"eval_loss": 2.0, "step": 10}], 64, "tokens", tmp_path / "a.png")
    draw([], 64, "tokens", tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size > 0


def test_smoothing_neither_lags_nor_pulls():
    line = [3.0 - 0.01 * n for n in range(200)]
    assert smooth(line) == pytest.approx(line)
    spike = smooth([0.0] * 100 + [1.0] + [0.0] * 100)
    assert max(spike) == pytest.approx(1 / 17)
    assert smooth([]) == []
