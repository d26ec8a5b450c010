"""What does not fit into memory: the error has the compiled function's own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from diffusion_jax import cli
from diffusion_jax.training import parallel
from diffusion_jax.training.memory import OutOfMemoryError, within_memory

# Squared and in float32 3.6 PB, which is more than an address can reach.
SIDE = 30_000_000


def _too_large(state, batch, keys):
    total = jnp.outer(batch[0] * jnp.arange(SIDE), jnp.ones(SIDE))
    return state + jnp.sort(total, axis=0).mean(), {"loss": total[0, 0]}


def test_an_update_that_does_not_fit_says_what_it_takes():
    run = parallel.mesh_train(_too_large, parallel.make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(OutOfMemoryError, match="an update does not fit into memory") as caught:
        run(jnp.zeros(1000), np.ones(1, np.float32), jax.random.split(jax.random.key(0), 1))
    text = str(caught.value)
    assert "4e-06 GB for its arguments" in text  # 1000 float32
    assert "3.6e+06 GB for intermediate values" in text
    assert "Lower the batch size" in text
    assert isinstance(caught.value.__cause__, JaxRuntimeError)


def test_a_sampler_that_does_not_fit():
    def sample(params, inputs, keys):
        return _too_large(params, inputs, keys)[0]

    run = parallel.mesh_sample(sample, parallel.make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(OutOfMemoryError, match="drawing a batch of images does not fit"):
        run(jnp.zeros(4), np.ones(1, np.float32), jax.random.split(jax.random.key(0), 1))


def test_other_errors_stay_what_they_are():
    def failing():
        raise JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(JaxRuntimeError, match="something else"):
        within_memory(failing, what="it", advice="none")()


def _fail_with(error, monkeypatch):
    def run(self):
        raise error

    monkeypatch.setattr(cli.Prepare, "run", run)
    return cli.main(["data", "prepare", "digits"])


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OutOfMemoryError("an update does not fit into memory. Lower …"), "an update does not"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nstack"), "Out of memory); lower the"),
    ],
)
def test_the_command_line_says_it_in_one_line(error, says, monkeypatch, capsys):
    assert _fail_with(error, monkeypatch) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and says in line and line.count("\n") == 1


def test_the_command_line_hides_no_other_error(monkeypatch):
    with pytest.raises(JaxRuntimeError, match="INTERNAL"):
        _fail_with(JaxRuntimeError("INTERNAL: a bug"), monkeypatch)
