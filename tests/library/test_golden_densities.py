"""Layer densities by published code for three networks; `source` in the golden file says which code."""

import json
from pathlib import Path

import numpy as np
import pytest

from supermask_jax import densities

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "d_layer_densities.json").read_text())
CASES = [
    (model, rule, density)
    for model, golden in GOLDEN["models"].items()
    for rule, results in golden["results"].items()
    for density in results
]


def ours(model, rule, density):
    """(shapes in Flax's layout, densities)."""
    golden = GOLDEN["models"][model]
    layers = golden["layers"]
    shapes = {
        path: (*kernel, inputs, outputs)
        for path, (outputs, inputs, *kernel) in zip(layers, golden["shapes_OIHW"], strict=True)
    }
    ends = {"uniform_plus": {"first": layers[0], "last": layers[-1]}, "ERK_plus": {"last": layers[-1]}}
    return shapes, getattr(densities, rule.lower())(shapes, float(density), **ends.get(rule, {}))


@pytest.mark.parametrize(("model", "rule", "density"), CASES, ids="-".join)
def test_layer_densities_are_those_of_random_pruning(model, rule, density):
    golden = GOLDEN["models"][model]["results"][rule][density]
    if "infeasible" in golden:  # the dense last layer alone has 0.0803 of ResNet-50's weights
        with pytest.raises(ValueError, match=r"at least 0\.080305 and at most 1\.0, got 0\.05"):
            ours(model, rule, density)
        return
    shapes, shares = ours(model, rule, density)
    np.testing.assert_allclose(list(shares.values()), golden["densities"], rtol=1e-12)
    np.testing.assert_allclose(densities.overall(shapes, shares), golden["overall"], rtol=1e-12)


def test_the_golden_file_holds_every_rule_with_layers_that_are_made_dense_and_one_that_cannot_be():
    """uniform+ of VGG-16 is not among them: the original asks for a layer of ResNet's name and fails."""
    assert len(CASES) == 3 * 16 - 2 * 4  # nor is that of ResNet-50
    assert {rule for _, rule, _ in CASES} == {"ER", "ERK", "uniform_plus", "ERK_plus"}
    results = [GOLDEN["models"][model]["results"][rule][density] for model, rule, density in CASES]
    assert sum("infeasible" in result for result in results) == 1
    assert sum(result.get("densities", []).count(1.0) > 1 for result in results) > 10
