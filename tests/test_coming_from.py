"""docs/guides/coming_from.md is true: both columns of its tables run, and agree.

The code in a column of a table is a program: lines to run once, lines of each step, and
lines to run afterwards, under the headings in bold. Here both are run on the same
batches, the third of which overflows. The old program of a peer is skipped where the
peer is not installed; the new one always runs.
"""

import re
from pathlib import Path

import flax
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax

PAGE = Path(__file__).parent.parent / "docs/guides/coming_from.md"
SECTIONS = {
    "jmp": "jmp",
    "flax-dynamicscale": "flax",
    "mpx": "mpx",
    "keras": "keras",
    "torch-amp": "torch",
}
OVERFLOWS = 2  # the index of the batch that does
KERNELS = {
    "hidden": np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32) / 2,
    "head": np.random.default_rng(1).normal(size=(8, 1)).astype(np.float32) / 3,
}


def batches():
    rng = np.random.default_rng(2)
    found = []
    for index in range(5):
        x = rng.normal(size=(16, 4)).astype(np.float32)
        label = np.sin(x.sum(-1, keepdims=True))
        if index == OVERFLOWS:
            x[0, 0] = 1e6
        found.append({"x": jnp.asarray(x), "label": jnp.asarray(label)})
    return found


def read_table(label):
    """Returns the programs of a section's table: lines by heading, old and new."""
    section = re.split(r"^\(([\w-]+)\)=$", PAGE.read_text(), flags=re.MULTILINE)
    text = section[section.index(label) + 1]
    programs = {"once": []}, {"once": []}
    heading = "once"
    rows = re.findall(r"^\|(.*)\|(.*)\|(.*)\|$", text, re.MULTILINE)
    for what, *cells in rows[2:]:
        if what.strip().startswith("**"):
            heading = what.strip().strip("*")
        for program, cell in zip(programs, cells, strict=True):
            code = re.fullmatch(r" (?:`([^`]+)`)? ?", cell)
            assert code, cell
            program.setdefault(heading, []).extend(filter(None, [code[1]]))
    assert all(len(program) >= 2 and all(program.values()) for program in programs)
    return programs


class Program:
    """A column of a table, run line by line in a namespace of its own."""

    def __init__(self, name, lines, namespace, given=lambda batch: {"batch": batch}):
        self.name, self.lines, self.given = name, lines, given
        self.namespace = {"jax": jax, "jnp": jnp, "optax": optax, **namespace}
        self.run("once")

    def run(self, heading):
        code = "\n".join(self.lines[heading])
        exec(
            compile(code, f"{PAGE.name}: {self.name}, {heading}", "exec"),
            self.namespace,
        )
        return self.namespace

    def step(self, batch):
        """Returns loss and loss scale, as the table logs them."""
        self.namespace.update(self.given(batch))
        seen = self.run("each step")
        return float(seen["loss"]), seen["S"], seen.get("taken")

    def steps(self):
        return list(zip(*map(self.step, batches()), strict=True))


def model_loss(params, x, label):
    hidden = jnp.tanh(x @ params["hidden"])
    return jnp.mean((hidden @ params["head"] - label).astype(jnp.float32) ** 2)


def pair_loss(params, batch):
    return model_loss(params, batch["x"], batch["label"])


def step_loss(params, batch, key):
    return pair_loss(params, batch)


def assert_alike(old, new, first_scale, atol=3e-3):
    """The loss of each step, the scale after it, and whether it was taken."""
    (losses, scales, taken), (new_losses, new_scales, new_taken) = old, new
    halved = [first_scale] * OVERFLOWS + [first_scale / 2] * (5 - OVERFLOWS)
    assert list(new_scales) == halved
    assert list(scales) == halved
    assert taken == new_taken
    finite = np.arange(5) != OVERFLOWS
    assert np.isfinite(np.array(new_losses)[finite]).all()
    np.testing.assert_allclose(
        np.array(losses)[finite], np.array(new_losses)[finite], atol=atol
    )


def assert_close(old, new, atol=3e-3):
    old, new = (list(map(np.asarray, jax.tree.leaves(tree))) for tree in (old, new))
    assert [x.shape for x in old] == [x.shape for x in new]
    for a, b in zip(old, new, strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, atol=atol)


def test_every_section_has_a_table_that_is_tested_here():
    labels = re.findall(r"^\(([\w-]+)\)=$", PAGE.read_text(), re.MULTILINE)
    assert labels == list(SECTIONS)
    assert all(callable(globals()[f"test_{name}"]) for name in SECTIONS.values())


def test_jmp():
    old_lines, new_lines = read_table("jmp")
    start = {"params": KERNELS, "tx": optax.sgd(0.1), "loss_fn": pair_loss}
    old = Program("jmp", old_lines, start)
    new = Program("mpjax", new_lines, start)
    assert_alike(old.steps(), new.steps(), 2.0**15)
    assert_close(old.namespace["params"], new.namespace["params"])
    assert old.namespace["taken"] is new.namespace["taken"] is True
    for name, value in (("static", 128), ("none", 1)):
        for program in (old, new):
            scale = program.run("other scales")[name]
            assert float(scale.scale(jnp.float32(1))) == value


def test_objects_of_jmp_are_taken_as_they_are():
    import jmp

    tx = mpjax.with_loss_scale(optax.sgd(0.1), jmp.DynamicLossScale(jnp.float32(4)))
    policy = jmp.get_policy("params=float32,compute=float16,output=float32")
    state = mpjax.TrainState.create(params=KERNELS, tx=tx)
    step = mpjax.make_train_step(step_loss, tx, policy=policy)
    state, metrics = step(state, batches()[0])
    assert float(metrics["loss_scale"]) == 4
    assert int(state.step) == 1


class Net(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(8, dtype=self.dtype)(x))
        return nn.Dense(1, dtype=self.dtype)(nn.tanh(x))


def linen_loss(dtype, params, batch_stats, batch):
    prediction, updated = Net(dtype).apply(
        {"params": params, "batch_stats": batch_stats},
        batch["x"],
        mutable=["batch_stats"],
    )
    error = prediction.astype(jnp.float32) - batch["label"]
    return jnp.mean(error**2), updated["batch_stats"]


def test_flax():
    train_state = pytest.importorskip("flax.training.train_state")
    old_lines, new_lines = read_table("flax-dynamicscale")
    variables = Net().init(jax.random.key(0), batches()[0]["x"])
    shared = {"Net": Net, "variables": variables, "tx": optax.sgd(0.1)}

    def new_loss_fn(params, batch_stats, batch, key):
        loss, batch_stats = linen_loss(None, params, batch_stats, batch)
        return loss, (batch_stats, None)

    old_names = {
        "TrainState": train_state.TrainState,
        "loss_fn": lambda *args: linen_loss(jnp.float16, *args),
        "select": lambda finite, new, old: jax.tree.map(
            lambda n, o: jnp.where(finite, n, o), new, old
        ),
    }
    old = Program("flax", old_lines, shared | old_names)
    new = Program("mpjax", new_lines, shared | {"loss_fn": new_loss_fn})
    assert_alike(old.steps(), new.steps(), 2.0**16, atol=1e-2)
    # As flax's example of ImageNet, it selects parameters and optimizer alone.
    old_stats = jax.tree.leaves(old.namespace["stats"])
    assert not all(np.isfinite(x).all() for x in old_stats)
    old, new = old.namespace["state"], new.namespace["state"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new.model_state))
    assert_close(old.params, new.params, atol=1e-2)
    assert int(old.step) == 5  # flax counts the step that it skipped
    assert int(new.step) == 4


def test_mpx():
    eqx = pytest.importorskip("equinox")
    old_lines, new_lines = read_table("mpx")

    class Model(eqx.Module):
        hidden: jax.Array
        head: jax.Array

    model = Model(*map(jnp.asarray, KERNELS.values()))

    def loss_fn(model, batch):
        return model_loss(vars(model), batch["x"], batch["label"])

    start = {"model": model, "tx": optax.sgd(0.1), "loss_fn": loss_fn, "eqx": eqx}
    new = Program("mpjax", new_lines, start)
    seen = new.steps()
    np.testing.assert_allclose(
        new.run("float32 parts")["mean"], batches()[-1]["x"].mean(), rtol=1e-5
    )
    pytest.importorskip("mpx")
    old = Program("mpx", old_lines, start)
    assert_alike(old.steps(), seen, 2.0**15)
    assert_close(old.namespace["model"], new.namespace["model"])
    np.testing.assert_allclose(
        old.run("float32 parts")["mean"], batches()[-1]["x"].mean(), rtol=1e-5
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_keras():
    old_lines, new_lines = read_table("keras")
    weights = [KERNELS["hidden"], np.zeros(8), KERNELS["head"], np.zeros(1)]
    names = {"weights": [x.astype(np.float32) for x in weights]}
    new = Program("mpjax", new_lines, names | {"mpjax": mpjax, "nn": nn})
    seen = new.steps()
    prediction = new.run("evaluate")["prediction"]

    keras = pytest.importorskip("keras")
    try:
        old = Program("keras", old_lines, names | {"keras": keras})
        assert_alike(old.steps(), seen, 2.0**15)
        np.testing.assert_allclose(
            old.run("evaluate")["prediction"], prediction, atol=3e-3
        )
        trained = old.namespace["model"].get_weights()
    finally:
        keras.mixed_precision.set_global_policy("float32")
    params = new.namespace["state"].params
    layers = params["layers_0"], params["layers_2"]
    assert_close(trained, [x[name] for x in layers for name in ("kernel", "bias")])


def test_torch(tmp_path):
    old_lines, new_lines = read_table("torch-amp")
    new_names = {
        "params": KERNELS,
        "loss_fn": step_loss,
        "mpjax": mpjax,
        "flax": flax,
        "path": tmp_path / "new",
    }
    new = Program("mpjax", new_lines, new_names)
    scales, params = run_save_and_go_on(new)
    assert scales == [2.0**15] * 2 + [2.0**14] * 3

    torch = pytest.importorskip("torch", reason="the old lines of torch.amp need torch")
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8, bias=False),
        torch.nn.Tanh(),
        torch.nn.Linear(8, 1, bias=False),
    )
    for layer, kernel in zip(model[::2], KERNELS.values(), strict=True):
        layer.weight.data = torch.from_numpy(kernel.T.copy())

    def halves(batch):
        cut = {name: np.split(np.array(value), 2) for name, value in batch.items()}
        return {
            "halves": [
                {name: torch.from_numpy(value[i]) for name, value in cut.items()}
                for i in range(2)
            ]
        }

    def loss_fn(model, batch):
        return torch.nn.functional.mse_loss(model(batch["x"]), batch["label"])

    old_names = {
        "torch": torch,
        "model": model,
        "device": "cpu",
        "loss_fn": loss_fn,
        "path": tmp_path / "old",
    }
    old = Program("torch.amp", old_lines, old_names, halves)
    old_scales, _ = run_save_and_go_on(old)
    assert old_scales == scales
    kernels = [layer.weight.detach().numpy().T for layer in model[::2]]
    assert_close(kernels, [params["hidden"], params["head"]])


def run_save_and_go_on(program):
    """Runs all, with an overflow between saving and going on; scales and state."""
    scales = []
    for batch in batches():
        program.namespace.update(program.given(batch))
        scales.append(program.run("each step")["S"])
    program.run("save")
    program.namespace.update(program.given(batches()[OVERFLOWS]))
    assert program.run("each step")["S"] == scales[-1] / 2
    program.run("go on")
    program.namespace.update(program.given(batches()[0]))
    assert program.run("each step")["S"] == scales[-1]
    state = program.namespace.get("state")
    return scales, state and state.params


def test_torch_has_no_floor_and_moves_statistics_on_a_skipped_step():
    torch = pytest.importorskip("torch", reason="what is said of torch needs torch")
    norm = torch.nn.BatchNorm1d(2)
    optimizer = torch.optim.SGD(norm.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    before = [p.detach().clone() for p in norm.parameters()]
    for _ in range(160):
        optimizer.zero_grad()
        x = torch.tensor([[torch.inf, 1.0], [1.0, 2.0]])
        scaler.scale(norm(x).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(map(torch.equal, norm.parameters(), before))
    assert scaler.get_scale() == 0
    assert not torch.isfinite(norm.running_mean).all()
