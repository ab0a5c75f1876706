"""What the README promises: its snippet runs as written, and its command names what is there."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

README = (Path(__file__).parents[2] / "README.md").read_text()
SNIPPET = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]


def test_the_snippet_trains_scores_on_any_model_and_is_short():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.relu(nn.Dense(64)(x)))

    images = jax.random.normal(jax.random.key(7), (32, 5))
    batch = {"image": images, "label": jnp.argmax(images[:, :3], axis=-1)}
    names = {"model": Model(), "images": images, "batches": [batch] * 30}
    exec(SNIPPET, names)

    weights = names["model"].init(jax.random.key(0), images)["params"]
    trained = names["state"].subnet
    assert names["metrics"]["loss"] < 0.5
    sizes = {abs(float(x)) for x in np.unique(trained.weights["Dense_1"]["kernel"])}
    assert len(sizes) == 1, "the weights are still a signed constant"
    np.testing.assert_array_equal(trained.weights["Dense_1"]["bias"], weights["Dense_1"]["bias"])
    kept = np.count_nonzero(names["params"]["Dense_1"]["kernel"])
    assert kept == trained.weights["Dense_1"]["kernel"].size // 2
    assert len([line for line in SNIPPET.splitlines() if line.strip()]) <= 15
