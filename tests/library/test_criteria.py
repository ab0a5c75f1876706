"""The mask criteria of Zhou et al.: every score by hand, and what is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supermask_jax import criteria, saliency
from supermask_jax.criteria import criterion

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Four weights: one grew, one shrank, one changed its sign, one did not move.

INITIAL = {"Dense_0": {"kernel": jnp.array([[1.0, -4.0], [2.0, 0.5]]), "bias": jnp.zeros(2)}}
FINAL = {"Dense_0": {"kernel": jnp.array([[3.0, -1.0], [-6.0, 0.5]]), "bias": jnp.ones(2)}}
SCORES = {
    "large_final": [3, 1, 6, 0.5],
    "small_final": [-3, -1, -6, -0.5],
    "large_init": [1, 4, 2, 0.5],
    "small_init": [-1, -4, -2, -0.5],
    "magnitude_increase": [2, -3, 4, 0],
    "movement": [2, 3, 8, 0],
    "large_final_same_sign": [3, 1, 0, 0.5],
    "large_final_diff_sign": [0, 0, 6, 0],
    "magnitude_increase_same_sign": [2, -3, 0, 0],
    "magnitude_increase_diff_sign": [0, 0, 4, 0],
    # ranks by init 1, 3, 2, 0 and by final 2, 1, 3, 0, of four
    "large_init_large_final": [0.25, 0.25, 0.5, 0],
    "small_init_small_final": [0.25, 0, 0, 0.75],
}


@pytest.mark.parametrize("name", SCORES)
def test_each_criterion_by_hand(name):
    scores = criterion(name, INITIAL, FINAL)
    assert scores["Dense_0"]["bias"] is None
    assert scores["Dense_0"]["kernel"].ravel().tolist() == SCORES[name]


def test_every_criterion_but_the_random_one_is_in_the_table():
    assert set(SCORES) == {*criteria.CRITERIA, *criteria.RANKED}


@pytest.mark.parametrize("name", criteria.RANKED)
def test_ranks_are_among_the_kept_weights_only(name):
    rng = np.random.default_rng(0)
    initial, final = ({"w": rng.normal(size=(9, 7)).astype(np.float32)} for _ in range(2))
    mask = (rng.random((9, 7)) < 0.7).astype(np.float32)
    kept = mask.astype(bool)
    scores = criterion(name, initial, final, masks={"w": mask})["w"]
    alone = criterion(name, *({"w": tree["w"][kept].reshape(1, -1)} for tree in (initial, final)))["w"]
    chex.assert_trees_all_equal(scores[kept], alone.ravel())


def test_equal_magnitudes_share_a_rank():
    initial = {"w": jnp.array([[1.0, -1.0, 1.0, 2.0]])}
    scores = criterion("large_init_large_final", initial, {"w": jnp.array([[5.0, 5.0, 5.0, 6.0]])})["w"]
    assert scores.tolist() == [[0, 0, 0, 0.75]]


def test_a_zero_has_a_sign_of_its_own():
    initial, final = {"w": jnp.array([[0.0, 0.0, 1.0]])}, {"w": jnp.array([[2.0, -0.0, 3.0]])}
    assert criterion("large_final_same_sign", initial, final)["w"].tolist() == [[0, 0, 3]]
    assert criterion("large_final_diff_sign", initial, final)["w"].tolist() == [[2, 0, 0]]


def test_random_scores_depend_only_on_the_key_and_the_path():
    weights = {name: jnp.ones((20, 30), jnp.bfloat16) for name in ("a", "c")}
    scores = criterion("random", weights, weights, key=jax.random.key(0))
    alone = criterion("random", {"c": weights["c"]}, {"c": weights["c"]}, key=jax.random.key(0))
    other = criterion("random", weights, weights, key=jax.random.key(1))
    chex.assert_trees_all_equal(scores["c"], alone["c"])
    assert abs(np.corrcoef(scores["a"].ravel(), scores["c"].ravel())[0, 1]) < 0.2
    assert abs(np.corrcoef(scores["a"].ravel(), other["a"].ravel())[0, 1]) < 0.2
    assert np.unique(scores["a"]).size > 590  # drawn in float32: in the weights' bfloat16 most would tie
    with jax.enable_x64(True):
        wide = criterion("random", weights, weights, key=jax.random.key(0))
    chex.assert_trees_all_equal(wide, scores)
    assert wide["a"].dtype == np.float32


def test_an_unknown_criterion_a_random_one_without_a_key_and_no_weights_are_refused():
    with pytest.raises(ValueError, match=r"no mask criterion 'large_finale'; there are: large_final, .*, random"):
        criterion("large_finale", INITIAL, FINAL)
    with pytest.raises(ValueError, match="'random' needs a key"):
        criterion("random", INITIAL, FINAL)
    with pytest.raises(ValueError, match="matches no leaf"):
        criterion("movement", {"bias": jnp.ones(2)}, {"bias": jnp.ones(2)})


@pytest.mark.parametrize("name", ("magnitude_increase", "large_init_large_final"))
def test_scores_do_not_depend_on_compilation(name):
    compiled = jax.jit(lambda initial, final: criterion(name, initial, final))(INITIAL, FINAL)
    chex.assert_trees_all_equal(compiled, criterion(name, INITIAL, FINAL))


def test_the_former_place_of_the_criteria_still_has_them():
    names = ("criterion", "CRITERIA", "RANKED")
    assert all(getattr(saliency, name) is getattr(criteria, name) for name in names)
