"""Weights from PyTorch's model collections: the same logits and masks, and one clear error for everything else."""

import functools
import re
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supermask_jax as sm
from supermask_jax.models import MLP, ResNet, ResNet18, ResNet34, ResNet50, ResNet101, WideResNet50
from supermask_jax.trees import by_path

DOCS = Path(__file__).parents[2] / "docs" / "files.md"
IMAGES = np.random.default_rng(9).normal(size=(3, 3, 33, 37)).astype(np.float32)
MODELS = {
    "basic": {"blocks": (1, 2), "width": 4},
    "bottleneck": {"blocks": (2, 1), "width": 4, "bottleneck": True},
    "wide": {"blocks": (1, 1), "width": 4, "bottleneck": True, "widen": 2},
    "plain": {"blocks": (1, 1), "width": 4, "affine": False, "bias": False},
}
ALL = {"classes": 5, "affine": True, "bias": True}


@functools.cache
def arrays_of(name):
    return checkpoints.torchvision(**{**ALL, **MODELS[name]})


def model_of(name, **changed):
    return ResNet(**{**ALL, **MODELS[name], **changed})


def logits_of(model, params, model_state, images=IMAGES):
    return np.asarray(sm.jit(model.apply)({"params": params, **model_state}, jnp.asarray(images.transpose(0, 2, 3, 1))))


def close(found, expected, atol=1e-5):
    assert np.abs(expected).max() > 0.5 and np.ptp(expected, axis=0).min() > 1e-2, "the images are told apart"
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_the_network_that_the_file_is_of(tmp_path, name):
    model, arrays = model_of(name), arrays_of(name)
    params, model_state = sm.load_pretrained(checkpoints.write(tmp_path / "net.pth", arrays), model)
    close(logits_of(model, params, model_state), checkpoints.logits(arrays, IMAGES))
    made = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 33, 37, 3)))
    assert jax.tree.structure({"params": params, **model_state}) == jax.tree.structure(made)
    held = sum(array.size for name, array in arrays.items() if "num_batches" not in name)
    assert sum(leaf.size for leaf in jax.tree.leaves((params, model_state))) == held


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prefix", ["resnet.", ""])
def test_hugging_faces_names_and_the_other_format_give_the_same_leaves(tmp_path, name, prefix):
    arrays = arrays_of(name)
    ours = sm.load_pretrained(checkpoints.write(tmp_path / "a.pth", arrays), model_of(name))
    theirs = checkpoints.hugging_face(arrays, prefix)
    assert "classifier.1.weight" in theirs and f"{prefix}encoder.stages.1.layers.0.layer.1.convolution.weight" in theirs
    found = sm.load_pretrained(checkpoints.write(tmp_path / "b.safetensors", theirs), model_of(name))
    jax.tree.map(np.testing.assert_array_equal, found, ours)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_other_floats_become_float32(tmp_path, dtype, suffix):
    arrays = {
        name: leaf.astype(dtype) if leaf.dtype == np.float32 else leaf for name, leaf in arrays_of("plain").items()
    }
    wrapped = {f"module._orig_mod.{name}": leaf for name, leaf in arrays.items()}
    params, state = sm.load_pretrained(checkpoints.write(tmp_path / f"net{suffix}", wrapped), model_of("plain"))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, state))} == {jnp.dtype("float32")}
    expected = arrays["layer2.0.conv1.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["stage_1_block_0"]["conv_0"]["kernel"].transpose(3, 2, 0, 1), expected)


# Errors.


def without(arrays, name):
    return {other: array for other, array in arrays.items() if other != name}


BASIC = arrays_of("basic")
LOOKS = r"The file looks like models.ResNet\(5, blocks=\(1, 2\), width=4, affine=True, bias=True\)"
WRONG = {
    "a larger model": (BASIC, model_of("basic", blocks=(2, 2)), f"lacks layer1.1.bn1.bias, .* and 6 more. {LOOKS}"),
    "a smaller model": (BASIC, model_of("basic", blocks=(1, 1)), f"no place for layer2.1.bn1.bias, .*. {LOOKS}"),
    "bottlenecks": (BASIC, model_of("bottleneck"), f"it lacks .*; the model has no place for .*. {LOOKS}"),
    "no bias": (BASIC, model_of("basic", bias=False), rf"the model has no place for fc.bias\. {LOOKS}"),
    "other classes": (BASIC, model_of("basic", classes=6), rf"fc.bias has the shape \(5,\), .* needs \(6,\)\. {LOOKS}"),
    "a narrower model": (BASIC, model_of("basic", width=2), r"has the shape \(4.*and the model needs \(2.*\)"),
    "a lost leaf": (without(BASIC, "bn1.running_var"), model_of("basic"), r"given: it lacks bn1.running_var\. "),
    "another leaf": ({**BASIC, "aux.weight": BASIC["fc.bias"]}, model_of("basic"), r"has no place for aux.weight\. "),
    "no head": (without(without(BASIC, "fc.weight"), "fc.bias"), model_of("basic"), "It does not look like a ResNet"),
    "odd names": ({**BASIC, "a\nb": BASIC["fc.bias"]}, model_of("basic"), r"has no place for a\\nb\. "),
    "no leaves": ({"layer1.0.conv3.weight": np.zeros((0, 1, 1, 1), np.float32)}, model_of("basic"), "it has layer1.0"),
    "a standard one": (
        checkpoints.torchvision((3, 4, 6, 3), bottleneck=True, width=4),
        model_of("basic"),
        r"The file looks like models.ResNet50\(5, width=4, affine=True, bias=True\)",
    ),
    "integers": ({**BASIC, "bn1.bias": np.arange(4)}, model_of("basic"), "bn1.bias has int64 numbers, .* floats"),
    "scores": ({**BASIC, "conv1.scores": BASIC["conv1.weight"]}, model_of("basic"), "with load_hidden_network"),
    "wide": (
        arrays_of("wide"),
        ResNet50(5),
        r"looks like .*blocks=\(1, 1\), bottleneck=True, widen=2, width=4, affine=True",
    ),
    "Hugging Face": (
        checkpoints.hugging_face(BASIC),
        model_of("basic", bias=False),
        f"no place for classifier.1.bias. {LOOKS}",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_error_that_names_the_file_and_the_model_that_it_looks_like(tmp_path, case):
    arrays, model, match = WRONG[case]
    path = checkpoints.write(tmp_path / "net.pth", arrays)
    with pytest.raises(ValueError, match=match) as raised:
        sm.load_pretrained(path, model)
    message = str(raised.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 900


def test_a_damaged_file_is_an_error_in_either_format(tmp_path):
    for suffix, match in ((".safetensors", "no whole .safetensors file"), (".pth", "truncated or damaged")):
        path = checkpoints.write(tmp_path / f"net{suffix}", BASIC)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is .*{match}.*; fetch or copy this file again"):
            sm.load_pretrained(path, model_of("basic"))


def test_a_model_that_is_no_resnet_is_refused(tmp_path):
    path = checkpoints.write(tmp_path / "net.pth", BASIC)
    with pytest.raises(TypeError, match=r"such as models.ResNet50\(.*, not 'resnet-50'"):
        sm.load_pretrained(path, "resnet-50")
    with pytest.raises(TypeError, match="this MLP has a leaf 'params/Dense_0/bias'"):
        sm.load_pretrained(path, MLP(5, hidden=(2,)))


# Subnetworks of Ramanujan et al.


def published_mask(scores, density):
    """[h, w, in, out] of scores (out, in, h, w): a weight stays if int((1 - density) * n) others rank below it."""
    size, order = np.abs(scores).ravel(), np.arange(scores.size)
    below = (size[None] < size[:, None]) | ((size[None] == size[:, None]) & (order[None] < order[:, None]))
    mask = below.sum(axis=1) >= int((1 - density) * scores.size)
    return mask.reshape(scores.shape).transpose(2, 3, 1, 0).astype(np.float32)


@pytest.mark.parametrize("density", [0.3, 0.7, 0.9])
def test_a_hidden_network_has_the_masks_of_the_released_code(tmp_path, density):
    arrays = checkpoints.hidden(arrays_of("plain"))
    scores = arrays["module.layer1.0.conv1.scores"]
    scores[:2] = np.round(scores[:2])  # ties
    path = checkpoints.write(tmp_path / "model_best.pth", arrays)
    model = model_of("plain")
    found = sm.load_hidden_network(path, model, density)
    masks = by_path(found.masks)
    assert masks.keys() == by_path(found.weights).keys() and len(masks) == 7
    names = {
        "conv": "conv1",
        "stage_0_block_0/conv_0": "layer1.0.conv1",
        "stage_1_block_0/shortcut": "layer2.0.downsample.0",
    }
    for ours, theirs in names.items():
        expected = published_mask(arrays[f"module.{theirs}.scores"], density)
        np.testing.assert_array_equal(masks[f"{ours}/kernel"], expected)
    np.testing.assert_array_equal(masks["dense/kernel"], published_mask(arrays["module.fc.scores"], density)[0, 0])
    np.testing.assert_array_equal(found.scores["stage_0_block_0"]["conv_0"]["kernel"], scores.transpose(2, 3, 1, 0))
    product = sm.subnetwork(sm.identity, sm.Subnet(found.weights, found.masks))
    masked = {name.removeprefix("module."): array for name, array in arrays.items()}
    for name in [name for name in masked if name.endswith(".scores")]:
        mask = published_mask(masked[name], density).transpose(3, 2, 0, 1)
        masked[name.replace("scores", "weight")] = masked[name.replace("scores", "weight")] * mask
    close(logits_of(model, product, found.model_state), checkpoints.logits(masked, IMAGES))


def test_the_count_of_the_released_code_is_kept_where_it_is_not_the_decimal(tmp_path):
    """(1 - 0.9) * 40 is less than 4 in floats: 3 weights are pruned, not 4."""
    arrays = checkpoints.hidden(arrays_of("plain"))
    scores = arrays["module.fc.scores"]
    assert scores.size == 40 and int((1 - 0.9) * 40) == 3
    found = sm.load_hidden_network(checkpoints.write(tmp_path / "net.pth", arrays), model_of("plain"), 0.9)
    assert found.masks["dense"]["kernel"].sum() == 37 == sm.keep_count(0.9, 40) + 1


def test_layers_without_scores_have_no_masks_and_fixed_scores_are_the_masks(tmp_path):
    arrays = checkpoints.hidden(arrays_of("plain"), dense=("conv1", "fc"))
    arrays = {
        name: (abs(array) > 0.5).astype(np.float32) if "scores" in name else array for name, array in arrays.items()
    }
    found = sm.load_hidden_network(checkpoints.write(tmp_path / "net.pth", arrays), model_of("plain"))
    assert found.masks["conv"]["kernel"] is None and found.masks["dense"]["kernel"] is None
    expected = arrays["module.layer2.0.conv2.scores"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(found.masks["stage_1_block_0"]["conv_1"]["kernel"], expected)
    assert 0 < expected.mean() < 1


HIDDEN = checkpoints.hidden(arrays_of("plain"))


@pytest.mark.parametrize(
    ("arrays", "density", "match"),
    [
        (arrays_of("plain"), 0.3, "holds no scores: read its weights with load_pretrained"),
        (HIDDEN, None, "the scores of .*: they are not 0 or 1: give density, which the released code calls prune_rate"),
        (HIDDEN, 0.0, r"density must be in \(0, 1\], got 0.0"),
        (HIDDEN, 70, r"density must be in \(0, 1\], got 70"),
        ({**HIDDEN, "module.conv1.scores": np.full((4, 3, 7, 7), np.nan, np.float32)}, 0.3, "conv/kernel: .*NaN"),
        ({**HIDDEN, "module.conv1.scores": NotImplemented}, 0.3, "conv1.scores has the shape"),
        ({**HIDDEN, "module.bn1.scores": np.zeros(4, np.float32)}, 0.3, "it has scores of no kernel: bn1.scores"),
    ],
)
def test_errors_of_hidden_networks(tmp_path, arrays, density, match):
    arrays = {
        name: np.zeros((4, 3), np.float32) if array is NotImplemented else array for name, array in arrays.items()
    }
    with pytest.raises(ValueError, match=match):
        sm.load_hidden_network(checkpoints.write(tmp_path / "net.pth", arrays), model_of("plain"), density)


# What is done with pretrained weights.


def pretrained(folder):
    arrays = checkpoints.torchvision(blocks=(1,), width=2)
    return sm.load_pretrained(checkpoints.write(folder / "net.pth", arrays), ResNet(**ALL, blocks=(1,), width=2))


@pytest.mark.slow
def test_magnitude_pruning_in_one_shot_per_layer_and_over_all_layers(tmp_path):
    params, _ = pretrained(tmp_path)
    scores = sm.saliency.magnitude(params)
    layerwise, over_all = sm.layerwise_masks(scores, 0.3), sm.global_masks(scores, 0.3)
    kernels = {path: np.abs(leaf) for path, leaf in by_path(params).items() if path.endswith("kernel")}
    assert by_path(layerwise).keys() == by_path(over_all).keys() == kernels.keys()
    everything = np.sort(np.concatenate([leaf.ravel() for leaf in kernels.values()]))
    cut = everything[-sm.keep_count(0.3, everything.size)]
    for path, leaf in kernels.items():
        own = np.sort(leaf.ravel())[-sm.keep_count(0.3, leaf.size)]
        np.testing.assert_array_equal(by_path(layerwise)[path], leaf >= own)
        np.testing.assert_array_equal(by_path(over_all)[path], leaf >= cut)
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, layerwise, over_all))


def test_piggyback_starts_at_the_pretrained_network_and_its_first_masks_change_after_50_steps_of_adam(tmp_path):
    """Scores of 0.01, a threshold of 0.005, and Adam at 1e-4, which moves each score by its rate while signs last."""
    params, _ = pretrained(tmp_path)
    scores = jax.tree.map(lambda zero: zero + 0.01, sm.zero_scores(params, lambda path, leaf: "conv" in path))
    assert scores["dense"]["kernel"] is None and scores["stage_0_block_0"]["conv_1"]["kernel"] is not None
    subnet, tx, mask_fn = sm.Subnet(params, scores), optax.adam(1e-4), sm.threshold(0.005)
    jax.tree.map(np.testing.assert_array_equal, sm.subnetwork(mask_fn, subnet), params)
    towards = jax.tree.map(jnp.ones_like, params)  # dL/d(w * m), so that dL/ds = w: scores of positive weights fall

    def loss_fn(product, model_state, batch, key):
        return sum(jnp.sum(p * t) for p, t in zip(jax.tree.leaves(product), jax.tree.leaves(towards), strict=True)), (
            model_state,
            {},
        )

    state = sm.init_state(subnet, tx, jax.random.key(0), learns="scores")
    step = sm.jit(sm.make_train_step(mask_fn, loss_fn, tx, learns="scores"))
    for number in range(1, 53):
        state, _ = step(state, None)
        if number == 48:
            assert sm.density(mask_fn(state.subnet.scores)) == 1.0
    for path, mask in by_path(mask_fn(state.subnet.scores)).items():
        np.testing.assert_array_equal(mask, by_path(params)[path] <= 0)


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    [section] = re.findall(r"\n## Weights from PyTorch\n(.*?)(?=\n## )", DOCS.read_text(), re.DOTALL)
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    checkpoints.write(Path("resnet50.pth"), arrays_of("bottleneck"))
    plain = checkpoints.torchvision(blocks=(2, 1), bottleneck=True, affine=False, bias=False)
    checkpoints.write(Path("model_best.pth"), checkpoints.hidden(plain))
    small = functools.partial(ResNet, 5, **MODELS["bottleneck"])
    monkeypatch.setattr(sm.models, "ResNet50", small)
    names = {"images": jnp.asarray(IMAGES.transpose(0, 2, 3, 1))}
    for block in blocks:
        exec(block, names)
    close(np.asarray(names["logits"]), checkpoints.logits(arrays_of("bottleneck"), IMAGES))
    jax.tree.map(
        np.testing.assert_array_equal, names["threshold"](names["scores"]), jax.tree.map(jnp.ones_like, names["scores"])
    )
    assert names["state"].subnet.scores["dense"]["kernel"] is None
    assert sm.density(names["masks"]) == pytest.approx(0.3, abs=1e-2)
    assert sm.density(names["found"].masks) == pytest.approx(0.3, abs=1e-2)


# PyTorch.


def torch_module(torch, blocks, bottleneck, widen, classes, width=64):
    """The network in PyTorch, with the names of torchvision, from the tables of the paper."""
    nn = torch.nn

    def conv(inputs, outputs, size, stride=1):
        return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs, out, stride):
            super().__init__()
            layers = [(out, 3, stride), (out, 3, 1)]
            if bottleneck:
                layers = [(out * widen, 1, 1), (out * widen, 3, stride), (4 * out, 1, 1)]
            self.depth, channels = len(layers), inputs
            for number, (outputs, size, step) in enumerate(layers, 1):
                self.add_module(f"conv{number}", conv(channels, outputs, size, step))
                self.add_module(f"bn{number}", nn.BatchNorm2d(outputs))
                channels = outputs
            self.downsample = nn.Identity()
            if stride != 1 or inputs != channels:
                self.downsample = nn.Sequential(conv(inputs, channels, 1, stride), nn.BatchNorm2d(channels))
            self.channels = channels

        def forward(self, x):
            y = x
            for number in range(1, self.depth + 1):
                y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
                y = torch.relu(y) if number < self.depth else y
            return torch.relu(y + self.downsample(x))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1, channels = conv(3, width, 7, 2), nn.BatchNorm2d(width), width
            for stage, count in enumerate(blocks):
                made = []
                for i in range(count):
                    made.append(Block(channels, width * 2**stage, 2 if stage and not i else 1))
                    channels = made[-1].channels
                self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
            self.fc = nn.Linear(channels, classes)

        def forward(self, x):
            x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
            for stage in range(len(blocks)):
                x = self.get_submodule(f"layer{stage + 1}")(x)
            return self.fc(x.mean((2, 3)))

    network = Network().eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for numbers in (layer.weight, layer.running_var):
                nn.init.uniform_(numbers, 0.5, 1.5)
            for numbers in (layer.bias, layer.running_mean):
                nn.init.normal_(numbers)
        elif isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    for layer in network.modules():
        if isinstance(layer, Block):  # small branches, so that deep networks do not explode
            nn.init.uniform_(layer.get_submodule(f"bn{layer.depth}").weight, 0.1, 0.3)
    nn.init.normal_(network.fc.weight, std=0.01)
    return network


def test_a_hidden_network_that_pytorch_saved_has_the_masks_of_pytorchs_sort(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.nn.Parameter(torch.from_numpy(a), a.dtype == np.float32) for name, a in HIDDEN.items()}
    optimizer = torch.optim.SGD([leaf for name, leaf in tensors.items() if name.endswith("scores")], 0.1, momentum=0.9)
    sum(leaf.sum() for leaf in tensors.values() if leaf.requires_grad).backward()
    optimizer.step()
    state = {"epoch": 100, "arch": "ResNet50", "best_acc1": 68.6, "curr_acc1": "Not evaluated"}
    torch.save({**state, "state_dict": tensors, "optimizer": optimizer.state_dict()}, tmp_path / "model_best.pth")
    found = sm.load_hidden_network(tmp_path / "model_best.pth", model_of("plain"), 0.3)
    for ours, theirs in (("stage_1_block_0/conv_1", "layer2.0.conv2"), ("stage_0_block_0/conv_0", "layer1.0.conv1")):
        scores = tensors[f"module.{theirs}.scores"].detach().abs()
        out = scores.clone()
        _, ranks = scores.flatten().sort()
        cut = int((1 - 0.3) * scores.numel())
        out.flatten()[ranks[:cut]], out.flatten()[ranks[cut:]] = 0, 1
        expected = out.permute(2, 3, 1, 0).numpy()
        np.testing.assert_array_equal(by_path(found.masks)[f"{ours}/kernel"], expected)


@pytest.mark.parametrize(
    ("model", "blocks", "bottleneck", "widen", "parameters"),
    [
        (ResNet18, (2, 2, 2, 2), False, 1, 11_689_512),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (ResNet34, (3, 4, 6, 3), False, 1, 21_797_672),
                (ResNet50, (3, 4, 6, 3), True, 1, 25_557_032),
                (ResNet101, (3, 4, 23, 3), True, 1, 44_549_160),
                (WideResNet50, (3, 4, 6, 3), True, 2, 68_883_240),
            )
        ),
    ],
)
def test_the_logits_are_those_of_the_module_in_pytorch(tmp_path, model, blocks, bottleneck, widen, parameters):
    """The published networks, with their published numbers of parameters."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network, path = torch_module(torch, blocks, bottleneck, widen, 1000), tmp_path / "net.pth"
    assert sum(leaf.numel() for leaf in network.parameters()) == parameters
    torch.save(network.state_dict(), path)
    model = model(affine=True, bias=True)
    params, model_state = sm.load_pretrained(path, model)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    images = np.random.default_rng(1).normal(size=(2, 3, 97, 81)).astype(np.float32)
    images[1] = 0.5 * images[1] + 1
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    found = logits_of(model, params, model_state, images)
    assert 1 < np.abs(expected).max() < 100 and np.ptp(expected, axis=0).max() > 0.3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
