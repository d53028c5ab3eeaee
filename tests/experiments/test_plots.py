"""What the plots show: on the figures themselves, not on their pixels."""

import collections
import functools
import json
import re

import numpy as np
import pytest
from helpers import figures
from helpers.tools import thinned

from experiments import _headline, plots
from experiments.benchmarks import loss_curves, memory
from experiments.data.speech import listen
from experiments.harness import numerics_plots, plot_style
from experiments.harness.errors import ConfigError, ExperimentError
from experiments.harness.experiment import Metric
from experiments.harness.output import RESULTS
from experiments.harness.plots import training_figure
from experiments.harness.update_plots import updates_figure

ACCURACY = Metric("accuracy", "accuracy", is_larger_better=True)
CER = Metric("cer", "CER", is_larger_better=False, format="{:.1%}")
SLOW = pytest.mark.slow
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")


@functools.cache
def pictures():
    return plots.find_pictures()


def training_rows(*, shift=0.0, num_epochs=4, scale=2.0**15):
    """Returns rows of a run whose loss falls; a shift moves loss and metrics."""
    rows = []
    for step in range(1, 10 * num_epochs + 1):
        loss = 2.0 / step + 0.1 + shift
        row = {"kind": "train", "step": step, "loss": loss, "loss_scale": scale}
        rows.append(row | {"grads_finite": step != 3})
        if step % 10 == 0:
            values = {
                "val_loss": loss,
                "val_accuracy": 1 - loss / 3,
                "val_cer": loss / 3,
            }
            rows.append({"kind": "epoch", "step": step, "ms_per_step": 3.0, **values})
    return rows


# Every picture of the repository.


@pytest.mark.parametrize(
    "name", thinned(sorted(path.name for path in pictures()), 4, rest="slow")
)
def test_every_picture_can_be_read(name):
    (draw,) = (draw for path, draw in pictures().items() if path.name == name)
    figures.check(draw())


def test_every_picture_has_a_result_file_and_is_there():
    drawn = set(pictures())
    assert drawn == {*RESULTS.glob("*.png"), plots.HEADLINE}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_the_command_draws_what_it_is_asked_for(tmp_path, capsys):
    directory = tmp_path / "new"
    config = plots.Config(only="^loss_scales|headline", output_dir=directory)
    paths = plots.main(config)
    assert [path.parent for path in paths] == [directory] * 2
    assert sorted(directory.iterdir()) == sorted(paths)
    assert capsys.readouterr().out.count("written to") == 2
    before = [path.read_bytes() for path in paths]
    plots.main(config)
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize(
    ("only", "message"),
    [("(", "regular expression"), ("nowhere", "matches no picture")],
)
def test_a_name_that_is_none(only, message):
    with pytest.raises(ConfigError, match=message):
        plots.main(plots.Config(only=only))


@pytest.mark.parametrize("damage", ["cut", "lacking"])
def test_a_damaged_result_file_is_named(damage, tmp_path, monkeypatch):
    text = (RESULTS / "loss_scales_cpu_jax0.12.0.1.json").read_text()
    damaged = {"cut": text[:300], "lacking": text.replace('"paths"', '"path"')}[damage]
    (tmp_path / "loss_scales.json").write_text(damaged)
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    config = plots.Config(only="loss_scales", output_dir=tmp_path / "out")
    with pytest.raises(ExperimentError, match=r"loss_scales\.json.*restore the file"):
        plots.main(config)
    assert not list(tmp_path.rglob("*.png"))


def test_the_headline_has_the_numbers_of_its_files(tmp_path):
    read = lambda name: json.loads((RESULTS / name).read_text())["runs"]
    errors, memory, trained = map(
        read, (_headline.ERRORS, _headline.MEMORY, _headline.TRAINED)
    )
    texts = [number for number, _ in _headline.numbers(errors, memory, trained)]
    by_seed = next(
        r["errors"]
        for r in errors
        if (r["model"], r["policy"]) == ("gpt2", "mixed_bfloat16")
    )
    logs = np.log(by_seed["autocast"]) - np.log(by_seed["by_hand"])
    peaks = {r["name"]: r["peak_mb"] for r in memory if r["workload"] == "gpt2"}
    accuracy = {r["policy"]: r["test_accuracy"] for r in trained}
    assert texts == [
        f"{np.exp(logs.mean()):.2f}\N{MULTIPLICATION SIGN}",
        f"{peaks['mixed_bfloat16'] / peaks['float32']:.2f}\N{MULTIPLICATION SIGN}",
        f"{100 * accuracy['mixed_float16']:.2f} %",
    ]
    with pytest.raises(LookupError, match="gpt2"):
        _headline.numbers(errors, [], trained)


# Curves that agree.


@pytest.mark.parametrize(("num", "metric"), [(1, ACCURACY), (2, CER), (3, ACCURACY)])
def test_equal_runs_are_all_seen(num, metric):
    runs = {policy: training_rows() for policy in POLICIES[:num]}
    figure = training_figure("equal", runs, metric)
    figures.check(figure)
    styles, pixels = plot_style.line_styles(POLICIES[:num]), figures.render(figure)
    shown = [figures.panel(figure, f"validation {metric.title}")]
    shown += [figures.panel(figure, "loss scale")]
    for axes in shown:
        for policy in runs:
            assert figures.num_pixels(pixels, axes, styles[policy]["color"]) > 100


def test_seven_equal_curves_are_all_seen():
    figure = plot_style.new_figure(3.0, "seven")
    axes = figure.subplots()
    names = [f"curve {i}" for i in range(7)]
    styles = plot_style.line_styles(names)
    for style in styles.values():
        axes.plot([0, 1, 2], [0.0, 1.0, 0.5], **style)
    plot_style.decorate(axes, "seven", "x", "y")
    plot_style.label_ends(axes)
    figures.check(figure)
    assert [text.get_text() for text in figures.end_labels(axes)] == names
    pixels = figures.render(figure)
    for style in styles.values():
        assert figures.num_pixels(pixels, axes, style["color"]) > 100


def test_equal_worst_cases_are_all_seen():
    (figure,) = (draw() for path, draw in pictures().items() if "scaling" in path.name)
    efficiency = next(a for a in figure.axes if a.get_ylabel() == "efficiency")
    for line in efficiency.get_lines():
        line.set_visible(line.get_marker() != "o")  # the best cases are not
    pixels = figures.render(figure)
    for policy in POLICIES:
        assert figures.num_pixels(pixels, efficiency, plot_style.COLORS[policy]) > 50


def test_differences_are_to_float32_wherever_it_stands():
    order = POLICIES[::-1]
    shifts = dict(zip(POLICIES, (0.0, 0.03, -0.06), strict=True))
    runs = {policy: training_rows(shift=shifts[policy]) for policy in order}
    figure = training_figure("shifted", runs, CER)
    figures.check(figure)
    losses, errors = (
        axes
        for axes in figures.panels(figure)
        if axes.get_title(loc="left") == "minus float32's"
    )
    for axes, factor in ((losses, 1), (errors, 1 / 3)):
        found = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
        for policy in POLICIES:
            np.testing.assert_allclose(
                found[policy], shifts[policy] * factor, atol=1e-9
            )
    assert errors.get_ylabel() == "points"
    assert any(text.startswith("+") for text in figures.tick_labels(errors.yaxis))


def test_panels_over_steps_have_one_range():
    runs = {"float32": training_rows(), "mixed_float16": training_rows(num_epochs=9)}
    figure = training_figure("lengths", runs, ACCURACY)
    ranges = {
        axes.get_xlim()
        for axes in figures.panels(figure)
        if "step" not in axes.get_title(loc="left")
        or "skipped" in axes.get_title(loc="left")
    }
    assert len(ranges) == 1
    assert next(iter(ranges))[1] >= 90


def test_a_run_without_numbers_is_drawn():
    nan = float("nan")
    row = {"kind": "train", "loss": nan, "loss_scale": 8.0, "grads_finite": 0}
    rows = [row | {"step": step} for step in range(1, 4)]
    figures.check(training_figure("skips", {"half": rows, "none": []}, ACCURACY))
    figures.check(training_figure("nothing", {}, ACCURACY))


def test_smaller_is_said_to_be_better():
    figure = training_figure("nothing", {}, CER)
    assert figures.panel(figure, "validation CER (smaller is better)")


# Axes.


def ticks_of(values, set_up):
    figure = plot_style.new_figure(2.5, "ticks")
    axes = figure.subplots()
    axes.plot(values, values)
    plot_style.decorate(axes, "ticks", "x", "y")
    set_up(axes.yaxis)
    figure.draw_without_rendering()
    labels = figures.tick_labels(axes.yaxis)
    assert len(set(labels)) == len(labels)
    return labels


@pytest.mark.parametrize(
    "values", [(0, 0.02), (0, 0.5), (0, 1), (0.9938, 0.995), (0, 3e-7), (0.3, 0.3)]
)
def test_per_cent_never_repeat(values):
    labels = ticks_of(values, plot_style.percent_axis)
    assert len(labels) >= 2
    assert all(re.fullmatch(r"\N{MINUS SIGN}?\d+(\.\d+)? %", label) for label in labels)


def test_per_cent_have_no_more_decimals_than_they_need():
    assert ticks_of((0, 1), plot_style.percent_axis)[:2] == ["0 %", "20 %"]
    assert "0.5 %" in ticks_of((0, 0.02), plot_style.percent_axis)


@pytest.mark.parametrize(
    "values", [(1, 64), (2.0**15,), (2.0**-24, 2.0**24), (512, 32768)]
)
def test_powers_of_two_are_labelled_so(values):
    labels = ticks_of(values, plot_style.log2_axis)
    assert 2 <= len(labels) <= 10
    assert all(re.fullmatch(r"\$2\^\{-?\d+\}\$", label) for label in labels)


@pytest.mark.parametrize("values", [(0.2, 0.9), (0.02, 3.0), (1.0, 5e6), (2.25, 2.31)])
def test_logarithmic_numbers_are_plain(values):
    labels = ticks_of(values, plot_style.log_axis)
    assert len(labels) >= 2
    assert all(re.fullmatch(r"[\d,]+(\.\d+)?", label) for label in labels)


def test_signs_are_shown_where_they_tell():
    signed = lambda axis: plot_style.number_axis(axis, 100, signed=True)
    labels = ticks_of((-0.01, 0.01), signed)
    assert {"0.0", "+0.5", "\N{MINUS SIGN}0.5"} <= set(labels)


def test_colours_are_a_policys_own_and_differ():
    names = [*POLICIES, "one of mine", "another"]
    colors = plot_style.colors(names)
    assert list(colors) == names
    assert len(set(colors.values())) == len(names)
    assert (
        colors["mixed_float16"] == plot_style.colors(["mixed_float16"])["mixed_float16"]
    )
    for color in colors.values():
        red, green, blue = plot_style.text_color(color)
        assert 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.19


def test_a_loss_scale_has_one_colour_in_all_pictures():
    found = collections.defaultdict(set)
    scale = re.compile(r"(unscaled|scale.(8|128|1024)|dynamic|histogram)$")
    for path, draw in pictures().items():
        if re.match("(ssd|loss)_scales", path.name):
            lines = [line for axes in draw().axes for line in axes.get_lines()]
            for line in lines:
                if name := scale.search(line.get_label()):
                    found[name[0].replace("_", " ")].add(line.get_color())
    assert [len(colors) for colors in found.values()] == [1] * 6
    assert len(set.union(*found.values())) == 6


@pytest.mark.parametrize("seed", range(5))
def test_labels_keep_their_distance_and_their_order(seed):
    rng = np.random.default_rng(seed)
    wanted = rng.choice([0.1, 0.5, 0.52, 0.9], 6)
    places = plot_style.spread(wanted, 0.1, 0.05, 0.95)
    assert np.diff(np.sort(places)).min() > 0.1 - 1e-9
    assert places.min() >= 0.05 - 1e-9
    assert places.max() <= 0.95 + 1e-9
    assert (np.argsort(places) == np.argsort(wanted, kind="stable")).all()
    apart = np.array([0.2, 0.8, 0.5])
    np.testing.assert_allclose(plot_style.spread(apart, 0.1, 0.05, 0.95), apart)


# The kinds of plots that no committed file has.


def numerics_rows(shares, num_layers=3):
    rows = []
    for layer in range(num_layers):
        name = f"MLP/Dense_{layer}/dot_general"
        exponents = {str(e): 2.0 ** -abs(e + 20 - layer) for e in range(-39, -3)}
        row = {"operation": name, "zero": 0.004 * layer, "exponents": exponents}
        rows.append(row | {"kind": "values", "scale": 0})
        lost = [(5 * i + 1, share / (layer + 1)) for i, share in enumerate(shares)]
        rows.append(row | {"kind": "cotangents", "scale": 15, "lost": lost})
        for number in ("", "#2"):
            backward = row | {"operation": f"{name} (backward){number}"}
            rows.append(backward | {"kind": "values", "scale": 15})
    return rows


@pytest.mark.parametrize(
    "shares",
    [(0.0,), (0.0, 0.0), (0.0, 0.004, 0.018), np.linspace(0, 0.5, 60).tolist()],
    ids=["one", "none lost", "short", "long"],
)
def test_numerics_can_be_read_on_short_and_long_runs(shares):
    figure = numerics_plots.numerics_figure("numerics", numerics_rows(shares))
    figures.check(figure)
    lost = figures.panel(figure, "gradients that are zero")
    labels = figures.tick_labels(lost.yaxis)
    assert float(labels[0].removesuffix(" %")) == 0
    assert all(label.endswith(" %") for label in labels)
    assert [t.get_text() for t in figures.end_labels(lost)] == [
        "Dense_0",
        "Dense_1",
        "Dense_2",
    ]
    *histograms, _ = figures.panels(figure)
    assert len({axes.get_xlim() for axes in histograms}) == 1
    assert all(
        re.match(r"\$2\^", text) for text in figures.tick_labels(histograms[2].xaxis)
    )


@pytest.mark.parametrize("num_layers", [1, 20])
def test_numerics_of_one_operation_and_of_more_than_there_are_colours(num_layers):
    rows = numerics_rows((0.0, 0.2, 0.3), num_layers)
    figure = numerics_plots.numerics_figure("numerics", rows)
    figures.check(figure)
    lines = figures.panel(figure, "gradients that are zero").get_lines()
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == num_layers


def update_rows(optimizers, num_seeds, diverged=()):
    rows = []
    for optimizer in optimizers:
        for place, variant in enumerate(
            ("float32", "float16_updates", "mixed_float16")
        ):
            curve = lambda seed, place=place: [
                0.5 / epoch + 0.01 * seed + 0.005 * place for epoch in range(1, 5)
            ]
            errors = [curve(seed) for seed in range(num_seeds)]
            row = {"optimizer": optimizer, "variant": variant}
            row["val_errors"] = [[]] * num_seeds if variant in diverged else errors
            row["gradient_exponents"] = {str(e): 2.0**e for e in range(-30, -2)}
            row |= {"small_gradients": 1e-5 * (place + 1)}
            row["lost_by_layer"] = {f"layer_{i}/kernel": [0.1] * 4 for i in range(12)}
            rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("optimizers", "num_seeds", "diverged"),
    [
        (("nesterov",), 1, ("float16_updates",)),
        (("nesterov", "adam"), 3, ()),
        pytest.param(("nesterov", "adam"), 1, ("float16_updates",), marks=SLOW),
        pytest.param(("nesterov",), 3, (), marks=SLOW),
    ],
)
def test_updates_have_differences_and_bars_over_seeds(optimizers, num_seeds, diverged):
    rows = update_rows(optimizers, num_seeds, diverged)
    figure = updates_figure(
        rows, title="t", error_title="CER", shown="float16_updates", paper=0.05
    )
    figures.check(figure)
    differences = [
        axes
        for axes in figures.panels(figure)
        if axes.get_title(loc="left").startswith("minus float32's")
    ]
    assert len(differences) == len(optimizers)
    for axes in differences:
        lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
        name = "float16_updates (diverged)" if diverged else "float16_updates"
        expected = [] if diverged else [0.005] * 4
        np.testing.assert_allclose(lines[name], expected, atol=1e-12)
        assert len(axes.collections) == 3 - len(diverged)  # error bars


def test_loss_curves_have_a_difference_beneath():
    rows = []
    for place, name in enumerate(("float32", "by hand", "autocast", "autocast, scan")):
        losses = [[3.0, 2.0 + 1e-3 * place, 1.5 + 1e-4 * seed] for seed in range(3)]
        row = {"task": "transformer", "precision": name, "test_losses": losses}
        row |= {"test_steps": [10, 20, 30], "train_steps": [5.0, 25.0]}
        rows.append(row | {"train_losses": [[4.0, 1.6]] * 3})
    figure = loss_curves.draw({"runs": rows})
    figures.check(figure)
    losses, differences = figures.panels(figure)
    assert losses.get_xlim() == differences.get_xlim()
    styles = plot_style.line_styles([row["precision"] for row in rows])
    pixels = figures.render(figure)
    for style in styles.values():
        assert figures.num_pixels(pixels, losses, style["color"]) > 50
    lines = {line.get_label(): line.get_ydata() for line in differences.get_lines()}
    np.testing.assert_allclose(lines["by hand"], [0, 1e-3, 0], atol=1e-12)


def test_memory_of_one_model_can_be_read():
    runs = [
        {"workload": "mlp", "batch_size": size, "name": name}
        | {"peak_mb": 3.0 * size, "peak_ratio": 1.0}
        for size in (8, 16)
        for name in memory.STEPS
    ]
    figure = memory.draw({"compiled_for": "cpu", "runs": runs})
    figures.check(figure)
    peak, _ = figures.panels(figure)
    pixels = figures.render(figure)
    for style in plot_style.line_styles(list(memory.STEPS)).values():
        assert figures.num_pixels(pixels, peak, style["color"]) > 50


def test_a_recording_can_be_read(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        plot_style, "write_png", lambda path, figure: drawn.append(figure)
    )
    utterance = type(
        "U", (), {"text": "ni", "id": "a", "speaker": "m", "duration_s": 1.0}
    )
    samples = np.sin(np.arange(16_000) / 9).astype(np.float32)
    listen._draw(tmp_path / "a.png", utterance, samples)
    (figure,) = drawn
    figures.check(figure)
    waveform, mels, _ = figures.panels(figure)
    assert waveform.get_xlim() == mels.get_xlim()
    np.testing.assert_allclose(waveform.bbox.intervalx, mels.bbox.intervalx)
