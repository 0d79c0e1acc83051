"""Everything within `shard_map`, a start vector on each of two devices, with parameters that are the same on both."""

import subprocess
import sys

import pytest
from cases import exhaustive

PROGRAM = """
import sys

import jax

jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec as P

from bnnlaplace.krylov import arnoldi, lanczos, matfun_arnoldi, matfun_lanczos, stochastic_lanczos_quadrature

product = lambda v, d: d * v
FUNCTIONS = {
    "lanczos": lambda v, d: lanczos(product, v, d, num_matvecs=4).diagonal,
    "arnoldi": lambda v, d: arnoldi(product, v, d, num_matvecs=4).hessenberg,
    "matfun_lanczos": lambda v, d: matfun_lanczos(jnp.log, product, v, d, num_matvecs=4).value,
    "matfun_arnoldi": lambda v, d: matfun_arnoldi(lambda m: m @ m, product, v, d, num_matvecs=4).value,
    "quadrature": lambda v, d: stochastic_lanczos_quadrature(jnp.log, product, v[None], d, num_matvecs=4).mean,
}
mesh = Mesh(np.array(jax.devices()), ("device",))
starts, d = jax.random.normal(jax.random.key(0), (2, 12)), jnp.linspace(1.0, 3.0, 12)
for name in sys.argv[1:]:
    function = FUNCTIONS[name]
    loss = lambda start, d: jnp.sum(function(start, d) ** 2)

    def local(starts, d):
        value, (d_start, d_d) = jax.value_and_grad(loss, (0, 1))(starts[0], d)
        return value[None], d_start[None], d_d

    specs = {"in_specs": (P("device"), P()), "out_specs": (P("device"), P("device"), P())}
    found = jax.jit(jax.shard_map(local, mesh=mesh, **specs))(starts, d)
    value, (d_start, d_d) = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1)), (0, None)))(starts, d)
    for mine, other in zip(found, (value, d_start, d_d.sum(axis=0))):  # what is the same everywhere sums over devices
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(other).max()))
    print(name)
"""


# The quadrature is made of Lanczos.
@pytest.mark.parametrize(
    "names", [["arnoldi", "quadrature"], exhaustive(["lanczos", "matfun_lanczos", "matfun_arnoldi"])], ids=" ".join
)
def test_on_two_devices(names):
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == names
