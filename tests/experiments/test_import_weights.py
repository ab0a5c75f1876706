"""Networks of PyTorch become subnetworks that the commands evaluate, and weights that runs begin with."""

from pathlib import Path

import checkpoints
import jax
import numpy as np
import pytest
from PIL import Image

import supermask_jax as sm
from experiments import imagenet, import_weights
from experiments.config.run import named
from experiments.config.settings import changed
from experiments.data.blank import blank_imagenet
from experiments.run.errors import UserError
from experiments.run.placement import Placement
from experiments.training import pretrained
from experiments.training.evaluation import Split
from experiments.training.parts import Parts
from supermask_jax.models import ResNet18
from supermask_jax.trees import by_path

SHAPE = {"blocks": (2, 2, 2, 2), "width": 64, "classes": 3}
ROOT = Path(__file__).parents[2]
IMAGES = np.random.default_rng(9).normal(size=(2, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def arrays():
    return checkpoints.torchvision(**SHAPE, affine=True, bias=True)


@pytest.fixture(scope="module")
def file(arrays, tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("torch") / "resnet 18.pth", arrays)


def settings(source, tmp_path, **more):
    own = {"file": source, "model": "resnet18", "classes": 3, "image_size": 32, "output": tmp_path / "a net" / "s"}
    return import_weights.Config(**own | more)


def test_a_file_becomes_a_subnetwork_with_the_same_logits(file, arrays, tmp_path, capsys):
    config = settings(file, tmp_path)
    assert import_weights.main(config) == config.output.stat().st_size
    weights, masks, state, about = sm.load_subnetwork(config.output)
    logits = ResNet18(3, affine=True, bias=True).apply({"params": weights, **state}, IMAGES.transpose(0, 2, 3, 1))
    expected = checkpoints.logits(arrays, IMAGES)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert not jax.tree.leaves(masks) and about["imported"] == "resnet 18.pth" and about["image_shape"] == [32, 32, 3]
    assert f"--evaluate '{config.output}'" in capsys.readouterr().out


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_it_is_pruned_by_magnitude(file, tmp_path, scope):
    config = settings(file, tmp_path, density=0.3, scope=scope)
    import_weights.main(config)
    weights, _ = sm.load_pretrained(file, ResNet18(3, affine=True, bias=True))
    rank = {"layer": sm.layerwise_masks, "global": sm.global_masks}[scope]
    expected = rank(sm.saliency.magnitude(weights), 0.3)
    _, masks, _, about = sm.load_subnetwork(config.output)
    assert about["density"] == 0.3
    for path, mask in by_path(expected).items():
        np.testing.assert_array_equal(by_path(masks)[path], mask)


def test_a_hidden_network_keeps_its_masks(tmp_path):
    arrays = checkpoints.torchvision(**SHAPE, affine=False, bias=False)
    rng = np.random.default_rng(0)
    kernels = [name for name, array in arrays.items() if array.ndim == 4]
    scores = {name.replace(".weight", ".scores"): rng.normal(size=arrays[name].shape) for name in kernels}
    written = checkpoints.write(
        tmp_path / "model_best.pth", arrays | {k: v.astype("float32") for k, v in scores.items()}
    )
    config = settings(written, tmp_path, affine=False, biases=False, hidden_network=True, density=0.25)
    import_weights.main(config)
    expected = sm.load_hidden_network(written, ResNet18(3), 0.25)
    _, masks, *_ = sm.load_subnetwork(config.output)
    found = by_path(masks)
    assert len(by_path(expected.masks)) == len(kernels)
    for path, mask in by_path(expected.masks).items():
        np.testing.assert_array_equal(found[path], mask)
    with pytest.raises(UserError, match="holds scores beside its weights: say --hidden-network"):
        import_weights.main(changed(config, hidden_network=False))


def test_what_cannot_be_read_is_one_error_and_leaves_no_file(file, tmp_path):
    for more, match in (
        ({"classes": 4}, r"shape \(3,\).*looks like models.ResNet18\(3.*--classes"),
        ({"model": "resnet50"}, "looks like models.ResNet18"),
        ({"affine": False}, "--no-affine"),
        ({"file": tmp_path / "none.pth"}, "No such file"),
        ({"hidden_network": True}, "holds no scores: leave out --hidden-network"),
        ({"output": file / "s"}, "cannot write"),
    ):
        with pytest.raises(UserError, match=match):
            import_weights.main(settings(file, tmp_path, **more))
    assert not list(tmp_path.rglob("s"))


def test_numbers_that_are_not_finite_are_refused_pruned_or_not(arrays, tmp_path):
    broken = {**arrays, "fc.bias": np.full_like(arrays["fc.bias"], np.nan)}
    written = checkpoints.write(tmp_path / "broken.pth", broken)
    for more in ({}, {"density": 0.3}):
        with pytest.raises(UserError, match=r"not finite, in .*dense/bias"):
            import_weights.main(settings(written, tmp_path, **more))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"file": None}, "name the file"),
        ({"density": 0.0}, "density"),
        ({"classes": 1}, "classes"),
        ({"image_size": 4}, "image-size"),
        ({"hidden_network": True, "scope": "global", "density": 0.5}, "leave out --scope"),
        ({"scope": "global"}, "give a --density"),
        ({"output": ROOT / "README.md"}, "is there already"),
        ({"output": ROOT}, "is a directory"),
        ({"file": ROOT / "README.md", "output": ROOT / "README.md"}, "is there already"),
        ({"file": ROOT / "README.md", "output": ROOT / "README.md", "overwrite": True}, "is there already"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, more, match):
    with pytest.raises(UserError, match=match):
        settings(tmp_path / "f.pth", tmp_path, **more).check()


@pytest.mark.parametrize("method", ["edge-popup", "magnitude"])
def test_a_run_begins_with_the_weights_of_a_file(file, method):
    options = {"model": "resnet18", "affine": True, "biases": True, "image_size": 32, "method": method, "density": 0.3}
    config = changed(imagenet.Config(), weights=str(file), **options)
    data = blank_imagenet(32, 3)
    parts = Parts(config, data, Split("test", data.test), Placement())
    weights, state = sm.load_pretrained(file, ResNet18(3, affine=True, bias=True))
    if method == "magnitude":  # pruned in one shot
        weights = sm.subnetwork(
            sm.identity, sm.Subnet(weights, sm.layerwise_masks(sm.saliency.magnitude(weights), 0.3))
        )
    begun = parts.state()
    for got, expected in ((begun.subnet.weights, weights), (begun.model_state, state)):
        assert set(by_path(got)) == set(by_path(expected))
        for path, leaf in by_path(expected).items():
            np.testing.assert_array_equal(by_path(got)[path], leaf)


def test_weights_that_do_not_fit_are_told_before_there_is_a_work_directory(file, tmp_path):
    folder = tmp_path / "photographs"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (40, 40), (80 * number, 90, 9)).save(folder / split / name / f"{number}.png")
    options = {"model": "resnet18", "image_size": 32, "batch_size": 2, "epochs": 1, "data_dir": str(folder)}
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=r"--weights: .*--affine --biases"):
        imagenet.main(changed(imagenet.Config(), weights=str(file), workdir=str(workdir), **options))
    with pytest.raises(UserError, match=r"--weights: cannot read none.pth \(No such file"):
        imagenet.main(changed(imagenet.Config(), weights="none.pth", workdir=str(workdir), **options))
    assert not workdir.exists()
    with pytest.raises(UserError, match="taken as they are"):
        changed(imagenet.Config(), weights=str(file), scale_weights=True).check()
    with pytest.raises(UserError, match="takes the network of the file"):
        changed(imagenet.Config(), weights=str(file), evaluate="other").check()


def test_the_content_of_a_file_is_a_setting_and_its_name_is_none(file, tmp_path):
    copy, other = tmp_path / "copy.pth", tmp_path / "other.pth"
    copy.write_bytes(file.read_bytes())
    other.write_bytes(file.read_bytes()[:-1])
    assert pretrained.digest(str(copy)) == pretrained.digest(str(file)) != pretrained.digest(str(other))
    config = changed(imagenet.Config(), weights=str(file), init="kaiming-uniform")
    assert named(config, "imagenet").init == imagenet.Config().init, "nothing is drawn"


def test_a_file_that_is_missing_is_no_traceback_where_another_is_overwritten(tmp_path):
    (tmp_path / "there").write_text("mine")
    config = settings(tmp_path / "none.pth", tmp_path, output=tmp_path / "there", overwrite=True)
    config.check()
    with pytest.raises(UserError, match=r"cannot read .*none\.pth"):
        import_weights.main(config)
    assert (tmp_path / "there").read_text() == "mine"
