"""The comparison of loss scales: runs, resumption, divergence, tables and plots."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import detection_runs, figures

import mpjax
from experiments import ssd_digits, ssd_scales, ssd_scales_table, tables
from experiments.harness import gradient_summary
from experiments.harness.errors import ConfigError, WorkdirError
from experiments.harness.numerics_summary import EXPONENTS
from experiments.ssd_scales import VARIANTS


def numerics_row(step, exponents, zeros=30):
    """Returns a row whose one operation has a cotangent of each exponent."""
    counts = [0] * EXPONENTS.size
    for exponent in exponents:
        counts[exponent - int(EXPONENTS[0])] += 1
    found = {"counts": counts, "zeros": zeros, "below": 0, "above": 0}
    found |= {"infs": 0, "nans": 0}
    return {
        "kind": "numerics",
        "step": step,
        "operations": {"conv": {"cotangents": found}, "other (backward)": {}},
    }


def train_rows(*scales):
    return [
        {"kind": "train", "step": step, "loss_scale": scale, "num_skipped": 0}
        for step, scale in enumerate(scales, start=1)
    ]


@pytest.fixture
def config(tmp_path):
    return ssd_scales.Config(
        variants="float32,unscaled,scale_8",
        num_seeds=1,
        workdir=tmp_path / "run",
        output=tmp_path / "results" / "scales.json",
    )


@pytest.fixture(scope="module", autouse=True)
def tiny_network():
    with detection_runs.tiny_network():
        yield


@pytest.fixture
def trained(monkeypatch):
    """Fakes the training; returns the names of what is trained."""
    names = []

    def train(experiment, config, policy, dataset, directory):
        name = directory.name
        names.append(name)
        scale = {"static:8": 8.0}.get(config.loss_scale, 1.0)
        lost = [] if policy == "float32" else [-30]
        rows = train_rows(scale, scale)
        log = round(np.log2(scale))
        exponents = [e + log for e in (-30, -26, -10, -5) if e not in lost]
        rows.append(numerics_row(2, exponents, zeros=6 + len(lost)))
        rows.append({"kind": "epoch", "step": 2, "val_map07": 0.5})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / "metrics.jsonl").write_text(text)
        if name == "unscaled-1":
            raise mpjax.NonFiniteTrainingError("all was NaN")
        value = {"float32": 0.8, "unscaled": 0.6, "scale_8": 0.81}[name[:-2]]
        return {"test_map07": value + 0.01 * config.seed, "final_loss_scale": scale}

    monkeypatch.setattr(ssd_digits, "train", train)
    return names


def test_what_papers_measured_stands_beside_their_setting_alone(config, trained):
    config = dataclasses.replace(config, setting="small_gradients")
    table = ssd_scales.main(config, detection_runs.dataset())
    assert [row["variant"] for row in table["runs"]] == config.variant_names()
    text = tables.render_result(table)
    assert "zero at its scale" in text
    assert "paper" not in text
    assert "arXiv" not in text


def test_rows_are_compared_by_seed_and_gradients_counted(config, trained):
    table = ssd_scales.main(config, detection_runs.dataset())
    assert trained == ["float32-0", "unscaled-0", "scale_8-0"]
    float32, unscaled, scaled, others = table["runs"]
    assert others["variant"] == "layer-wise adaptive (others')"
    assert (float32["paper"], unscaled["paper"], scaled["paper"]) == (
        "76.9",
        "diverges",
        "77.1",
    )
    assert float32["map07"] == "80.00 %"
    assert (float32["difference"], unscaled["difference"]) == (None, "-20.00")
    assert (float32["zero_gradients"], unscaled["zero_gradients"]) == (0.6, 0.7)
    # Of float32's four nonzero gradients, 2^-30 and 2^-26 are lost without a scale.
    assert float32["lost_gradients"] is None
    assert (unscaled["lost_gradients"], scaled["lost_gradients"]) == (0.5, 0.25)
    written = json.loads(config.output.read_text())
    assert "| unscaled | 1 | 0 | 60.00 % |" in tables.render_result(written)
    assert config.output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    figures.check(ssd_scales.draw(written))
    for row, share in zip(written["runs"], (0.7526, 0.7532, 0.7556), strict=False):
        row["zero_gradients"] = share  # which have four digits each
    figures.check(ssd_scales.draw(written))
    gradients = json.loads(config.output.with_stem("scales_gradients").read_text())
    assert gradients["zero"] == 0.6
    assert "zero in float32" in tables.render_result(gradients)
    figures.check(ssd_scales.draw_gradients(gradients))
    text = (config.workdir / "result.md").read_text()
    assert "SSD512" in text
    assert "recovered" in text


def test_what_is_missing_is_trained_and_the_table_made_anew(config, trained):
    dataset = detection_runs.dataset()
    ssd_scales.main(config, dataset)
    more = dataclasses.replace(config, num_seeds=3)
    with pytest.raises(WorkdirError, match="--resume"):
        ssd_scales.main(more, dataset)
    more = dataclasses.replace(more, resume=True)
    table = ssd_scales.main(more, dataset)
    assert len(trained) == len(set(trained)) == 9
    ssd_scales.main(more, dataset)
    assert len(trained) == 9
    _, unscaled, scaled, _ = table["runs"]
    assert (unscaled["num_seeds"], unscaled["num_diverged"]) == (3, 1)
    assert unscaled["diverged"] == [None, "all was NaN", None]
    assert unscaled["test_map07s"] == [0.6, None, 0.62]
    np.testing.assert_allclose(scaled["difference_interval"], [1, 1, 1])
    assert scaled["map07"] == "82.00 ± 1.00 %"
    figures.check(ssd_scales.draw(table))
    other = dataclasses.replace(more, learning_rate=1.0)
    with pytest.raises(WorkdirError, match="learning_rate"):
        ssd_scales.main(other, dataset)


def test_every_variant_has_the_same_seeds_and_its_own_precision(config):
    config = dataclasses.replace(
        config, variants=",".join(VARIANTS), num_seeds=2, setting="small_gradients"
    )
    cells = config.cells()
    assert len({cell.name for cell in cells}) == len(cells) == 16
    assert [cell.seed for cell in cells] == [0] * 8 + [1] * 8
    runs = {cell: config.run_config(cell) for cell in cells}
    scales = {run.loss_scale_name(run.policy) for run in runs.values()}
    assert len(scales) == 6
    for cell, run in runs.items():
        assert (run.seed, run.depth, run.normalization) == (cell.seed, 1, "anchors")
        assert run.loss_factor == 1 / 256
        assert run.batch_size == 1.5 * config.batch_size
        assert run.num_epochs == config.num_epochs
        assert run.policy_names() == (VARIANTS[cell.variant].policy,)
    names = set(ssd_scales_table.PAPER) | set(ssd_scales_table.ADAPTIVE_PAPER)
    assert names - set(VARIANTS) == {"layer-wise adaptive"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": "scale_9"}, "--variants must be some of.*Did you mean 'scale_8'"),
        ({"policy": "float16"}, "--policy is decided by --variants and --setting"),
        ({"normalization": "anchors"}, "--normalization is decided"),
        ({"num_seeds": 0}, "--num-seeds must be greater than zero"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=2", marks=pytest.mark.weekly),
    ],
)
def test_a_run_of_each_kind_of_loss_scale(config, mesh):
    config = dataclasses.replace(config, mesh=mesh)
    dataset = detection_runs.dataset()
    config = dataclasses.replace(
        config, variants="float32,scale_8,histogram", num_epochs=1, batch_size=4
    )
    config = dataclasses.replace(config, numerics_interval=1)
    float32, scaled, _, _ = ssd_scales.main(config, dataset)["runs"]
    assert 0.2 < float32["zero_gradients"] < 1
    assert scaled["final_loss_scale"] == 8
    assert 0 <= scaled["lost_gradients"] < 0.5


# Activation gradients.


def test_gradients_are_pooled_over_operations_and_unscaled():
    rows = [*train_rows(1.0, 8.0)]
    rows.append(numerics_row(1, [-30, -25, -3], zeros=5))
    rows.append(numerics_row(2, [-27, -22, 0], zeros=5))  # eight times as large
    first, second = gradient_summary.count_gradients(rows).values()
    np.testing.assert_array_equal(first.counts, second.counts)
    table = gradient_summary.summarize_gradients(rows)
    assert table["zero"] == 10 / 16
    assert table["below"] == 4 / 16
    assert table["between"] == 2 / 16
    unscaled, *_ = table["runs"]
    # What is in [2^-25, 2^-24) rounds up to float16's smallest number.
    assert unscaled["lost"] == 1 / 3
    by_scale = {row["loss_scale"]: row for row in table["runs"]}
    assert by_scale[8]["lost"] == 1 / 3
    assert by_scale[128]["lost"] == 0
    assert by_scale[128]["recovered"] == 1
    assert by_scale[8]["which"] == "the paper's"
    advised = by_scale[table["advised_scale"]]
    assert "advised" in advised["which"]
    assert advised["overflow"] == 0
    assert gradient_summary.zero_share(rows) == 10 / 16
    assert gradient_summary.lost_share(rows, {1: 1.0, 2: 128.0}) == 1 / 6
    assert gradient_summary.lost_share(rows, {}) is None
    assert gradient_summary.zero_share([]) is None


def test_what_a_scale_shifts_out_of_the_range_is_still_counted():
    lowest, highest = int(EXPONENTS[0]), int(EXPONENTS[-1])
    rows = [*train_rows(4.0), numerics_row(1, [lowest, lowest + 5, highest], zeros=1)]
    (found,) = gradient_summary.count_gradients(rows).values()
    assert int(found.num_values) == 4
    assert (int(found.below), int(found.above), int(found.zeros)) == (1, 0, 1)
