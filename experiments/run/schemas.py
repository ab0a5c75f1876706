"""What the JSON files of a run hold. Each file is checked against its schema whenever it is read."""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

Number = int | float  # also NaN and infinity
Count = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Name = Annotated[str, Meta(min_length=1)]

Measured = Annotated[list[Number], Meta(min_length=1)]

Checksums = Annotated[dict[str, Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]], Meta(min_length=1)]
Settings = dict[str, Any]  # config.json: `Settings.differing` compares every one


class Record(Struct):
    """A line of metrics.jsonl."""

    epoch: Count
    step: Count
    train_loss: Number | UnsetType = UNSET
    train_accuracy: Number | UnsetType = UNSET
    test_loss: Number | UnsetType = UNSET
    test_accuracy: Number | UnsetType = UNSET
    validation_loss: Number | UnsetType = UNSET
    validation_accuracy: Number | UnsetType = UNSET
    gradient_flow: Number | UnsetType = UNSET
    flips: dict[str, Number] | UnsetType = UNSET
    learning_rate: Number | UnsetType = UNSET
    train_seconds: Number | UnsetType = UNSET
    images_per_second: Number | UnsetType = UNSET


class Layer(Struct):
    kept: Count
    size: Count
    density: Fraction


class Shifted(Struct):
    """Of a set of other images in the same classes: the logits of `classes` classes count."""

    test_accuracy: Fraction
    test_loss: Number
    images: Count
    classes: Count


class Compared(Struct, kw_only=True):
    """Of summary.json of a training run, what runs are compared by."""

    method: Name
    dataset: Name
    model: Name
    test_accuracy: Fraction
    density: Fraction
    epochs: Count
    seed: Count
    config: Settings


class RunSummary(Compared, kw_only=True):
    """summary.json of a training run. What earlier versions did not write may be missing."""

    test_loss: Number
    layers: dict[str, Layer]
    steps: Count
    parameters: Count | UnsetType = UNSET
    flops: Count | UnsetType = UNSET
    train_seconds: Number
    images_per_second: Number
    test_sampled_accuracy: Fraction | UnsetType = UNSET
    test_sampled_loss: Number | UnsetType = UNSET
    ece: Number | UnsetType = UNSET
    brier: Number | UnsetType = UNSET
    fgsm_accuracy: Fraction | UnsetType = UNSET
    ood_auroc: dict[str, Number] | UnsetType = UNSET
    shifted: dict[str, Shifted] | UnsetType = UNSET
    emptied: list[str] | UnsetType = UNSET
    file_bytes: Count | UnsetType = UNSET
    dense_bytes: Count | UnsetType = UNSET


class Curve(Struct):
    """What was measured along the training of a ticket or a control."""

    step: Measured
    validation_loss: Measured
    validation_accuracy: Measured
    test_accuracy: Measured


class Trained(Struct):
    """networks/NAME.json of a ticket or a control, once its training is finished."""

    density: Fraction
    curve: Curve
    train_seconds: Number


class Network(Struct):
    """A network in the summary of tickets."""

    density: Fraction
    network: Name
    round: Count
    trial: Count
    early_stop_step: Count
    early_stop_test_accuracy: Fraction


class TicketsSettings(Struct):
    """Of the settings, what the summary is shown with."""

    trials: Annotated[int, Meta(ge=1)]


class TicketsSummary(Struct):
    """summary.json of iterative pruning."""

    dataset: Name
    model: Name
    networks: list[Network]
    per_input: list[Any]
    seed: Count
    config: TicketsSettings


class SweepSummary(Struct):
    """summary.json of a sweep of tickets."""

    sweep: Name
    dataset: Name
    model: Name
    rows: list[dict[str, Any]]
    seed: Count
    config: Settings


class Task(Struct):
    """tasks/task-N.json, once the task is trained."""

    task: Count
    density: Fraction
    train_seconds: Number
    test_accuracy: Fraction | UnsetType = UNSET
    validation_accuracy: Fraction | UnsetType = UNSET


class Growth(Struct):
    """A row of what was measured by the number of tasks."""

    tasks: Annotated[int, Meta(ge=1)]
    file_bytes: Count
    told_accuracy: Fraction | UnsetType = UNSET
    one_shot: Fraction | UnsetType = UNSET
    one_shot_accuracy: Fraction | UnsetType = UNSET
    binary: Fraction | UnsetType = UNSET
    binary_accuracy: Fraction | UnsetType = UNSET


class GrowthFile(Struct):
    """tasks/growth.json."""

    rows: list[Growth]


class TaskFigures(Struct):
    """A task in the summary of many."""

    test_accuracy: Fraction | UnsetType = UNSET
    validation_accuracy: Fraction | UnsetType = UNSET


class TasksSettings(Struct):
    """Of the settings, what the summary is shown with."""

    tasks: Count
    inferred_images: Count
    temperature: Number


class TasksSummary(Struct):
    """summary.json of many tasks in one network."""

    dataset: Name
    split: Literal["test", "validation"]
    tasks: Annotated[list[TaskFigures], Meta(min_length=1)]
    mean_accuracy: Fraction
    growth: list[Growth]
    units: list[Count]
    weights: Count
    images: Count
    file_bytes: Count
    bytes_per_task: Number
    dense_bytes: Count
    config: TasksSettings
