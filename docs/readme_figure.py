"""Draw the picture of the README: `make readme-figure` writes `docs/images/readme.png`.

A network is trained to a mode on data with a gap. The point estimate says nothing about the gap; the Laplace band is
wide there. The evidence chooses the prior precision.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import bnnlaplace

OUTPUT = Path(__file__).parent / "images" / "readme.png"
NOISE, STEPS = 0.2, 20_000
LINE, BAND = "#0072B2", "#56B4E9"


def outputs(weights, x):
    return jnp.tanh(x @ weights["w1"] + weights["b1"]) @ weights["w2"] + weights["b2"]


def data():
    """Return inputs on both sides of a gap, and noisy targets."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-2, -0.5, (60, 1)), rng.uniform(0.5, 2, (60, 1))]).astype(np.float32)
    return x, jnp.asarray(np.sin(3 * x) + NOISE * rng.normal(size=x.shape), jnp.float32)


def trained(x, y):
    """Return a network at a mode for this noise and a prior precision of 0.3."""

    def negative_log_joint(weights):
        misfit = -bnnlaplace.gaussian(NOISE).log_prob(outputs(weights, x), y).sum()
        return misfit + 0.5 * 0.3 * optax.tree.norm(weights, squared=True)

    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, STEPS))

    def step(carry, _):
        weights, state = carry
        updates, state = optimizer.update(jax.grad(negative_log_joint)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    rng = np.random.default_rng(1)
    shapes = {"w1": (1, 20), "b1": (20,), "w2": (20, 1), "b2": (1,)}
    start = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    run = jax.jit(lambda weights: jax.lax.scan(step, (weights, optimizer.init(weights)), length=STEPS)[0][0])
    return bnnlaplace.Network.from_function(outputs, run(start))


def main():
    """Train, fit, draw and write."""
    x, y = data()
    la = bnnlaplace.Laplace(
        trained(x, y), "regression", hessian_structure="full", sigma_noise=NOISE, prior_precision=0.3
    )
    la = la.fit((x, y)).optimize_prior_precision()
    axis = np.linspace(-3.2, 3.2, 400, dtype=np.float32)[:, None]
    mean, variance = la.predictive(axis)
    curve, deviation = np.asarray(mean[:, 0]), np.sqrt(np.asarray(variance[:, 0]))

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    for panel, title in zip(
        figure.subplots(1, 2, sharey=True), ("Point estimate (MAP)", "Laplace: two deviations"), strict=True
    ):
        if title.startswith("Laplace"):
            panel.fill_between(axis[:, 0], curve - 2 * deviation, curve + 2 * deviation, color=BAND, alpha=0.35, lw=0)
        panel.plot(axis, curve, color=LINE)
        panel.scatter(x, y, s=9, color="black", linewidths=0, zorder=3)
        panel.set_title(title, fontsize=11)
        panel.set(xlim=(-3.2, 3.2), ylim=(-4, 4), xticks=(), yticks=())
        panel.spines[["top", "right"]].set_visible(False)
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
