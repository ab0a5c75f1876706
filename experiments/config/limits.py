"""The highest counts that settings may have. They are far above what anybody trains: a run of 10**12 epochs, or a
network that wide, is a slip of the hand, and would be noticed late."""

from experiments.run.errors import Rule

MOST = {
    "batch_size": 2**20,
    "batch_sizes": 2**20,
    "checkpoint_every": 10**9,
    "depth": 1000,
    "depths": 1000,
    "epochs": 10**6,
    "eval_every": 10**9,
    "inferred_images": 10**6,
    "kills": 10**4,
    "outputs": 10**4,
    "rounds": 1000,
    "seeds": 1000,
    "soak_seconds": 10**6,
    "steps": 10**9,
    "trials": 1000,
    "update_every": 10**9,
    "width": 2**16,
    "widths": 2**16,
}
MOST_RATE = 3e38  # of learning rates and weight decays: the highest float32, rounded


def counts(config, *names: str, least: int = 1) -> list[Rule]:
    """The rules, for `require`, that these settings are whole numbers, or tuples of such, from `least` to `MOST`."""
    rules = []
    for name in names:
        value, says = getattr(config, name), f"in [{least:,}, {MOST[name]:,}]"
        each = value if isinstance(value, tuple) else (value,)
        valid = all(least <= number <= MOST[name] for number in each)
        rules.append((name, valid, f"{says} each" if isinstance(value, tuple) else says))
    return rules
