"""What the README promises: its snippet runs as written, its commands are the contract, and all links resolve."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supermask_jax.trees import by_path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPET, TO_FILE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = (
    'python3 -m venv .venv && .venv/bin/pip install -e ".[experiments]" && .venv/bin/python -m experiments.mnist',
    'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/python -m pytest',
)


def links(page: Path) -> list[tuple[Path, str]]:
    """(file, heading or "") of every relative link and picture of a page, code left out."""
    text = re.sub(r"```.*?```|`[^`\n]*`(?!\])", "", page.read_text(), flags=re.DOTALL)
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, heading = target.partition("#")
            found.append(((page.parent / path).resolve() if path else page, heading))
    return found


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page are called."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_snippet_trains_scores_on_any_model_and_the_second_one_stores_the_network(tmp_path, monkeypatch):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.relu(nn.Dense(64)(x)))

    images = jax.random.normal(jax.random.key(7), (32, 5))
    batch = {"image": images, "label": jnp.argmax(images[:, :3], axis=-1)}
    names = {"model": Model(), "images": images, "batches": [batch] * 30}
    exec(SNIPPET, names)

    trained = names["state"].subnet
    assert names["metrics"]["loss"] < 0.5
    sizes = {abs(float(x)) for x in np.unique(trained.weights["Dense_1"]["kernel"])}
    assert len(sizes) == 1, "the weights are still a signed constant"
    np.testing.assert_array_equal(trained.weights["Dense_1"]["bias"], np.zeros(64))
    kept = np.count_nonzero(names["params"]["Dense_1"]["kernel"])
    assert kept == trained.weights["Dense_1"]["kernel"].size // 2

    monkeypatch.chdir(tmp_path)
    exec(TO_FILE, names)
    for path, weight in by_path(names["params"]).items():
        mask = by_path(names["masks"]).get(path, 1)
        np.testing.assert_array_equal(by_path(names["weights"])[path] * mask, weight)
    assert names["about"] == {"data": "..."} and (tmp_path / "net.safetensors").stat().st_size < 1000


def test_the_snippet_is_short_and_uses_each_key_once():
    lines = [line for line in SNIPPET.splitlines() if line.strip()]
    assert len(lines) <= 15
    assert "jax.jit" not in SNIPPET
    keys = re.search(r"^(k_.*?) = jax\.random\.split", SNIPPET, re.MULTILINE)[1].split(", ")
    assert {key: len(re.findall(rf"\b{key}\b", SNIPPET)) for key in keys} == dict.fromkeys(keys, 2)


def test_the_readme_is_short_and_holds_the_two_commands():
    assert len(README.splitlines()) <= 160
    blocks = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    assert blocks == list(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    for target, heading in links(page):
        assert target.exists(), f"{page.name} links to {target}, which is not there"
        if heading:
            assert heading in anchors(target), f"{target.name} has no heading #{heading}"


def test_every_page_and_picture_is_reached_from_the_readme_and_from_the_index():
    index = ROOT / "docs" / "README.md"
    pages = {page.resolve() for page in PAGES if page.name != "README.md"}
    linked = {target for target, _ in links(ROOT / "README.md")}
    indexed = {target for target, _ in links(index)}
    assert pages <= linked
    assert pages <= indexed
    shown = {target for page in PAGES for target, _ in links(page)}
    assert {picture.resolve() for picture in (ROOT / "docs").glob("*.png")} <= shown


def test_every_raw_file_of_results_is_linked():
    shown = {target for page in PAGES for target, _ in links(page)}
    assert {path.resolve() for path in (ROOT / "experiments" / "results").glob("*.json")} <= shown
