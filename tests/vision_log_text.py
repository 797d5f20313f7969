"""Logs in the form that InfLoRA's and CL-LoRA's trainers write, with numbers of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Rows = Sequence[Sequence[float]]

# Three tasks of ten classes each; the task with the larger test set weighs more in a total.
ROWS: Rows = ((98.0,), (95.5, 90.25), (93.0, 88.5, 91.0))
SIZES = (100, 100, 200)


def totals(rows: Rows, sizes: Sequence[int] = SIZES) -> list[float]:
    """Return each row's mean over images, rounded as upstream rounds."""
    return [round(sum(a * n for a, n in zip(row, sizes)) / sum(sizes[: len(row)]), 2) for row in rows]  # noqa: B905


def _line(number: int, file: str, message: object) -> str:
    return f"2024-01-01 12:00:{number % 60:02d},{number % 1000:03d} [{file}] => {message}"


def run_lines(
    rows: Rows = ROWS,
    *,
    seed: int = 0,
    cllora: bool = False,
    order: Sequence[int] | None = None,
    first: int = 10,
    increment: int = 10,
    groups: Sequence[str] | None = None,
    nme: bool = False,
    sizes: Sequence[int] = SIZES,
    **settings: Any,
) -> list[str]:
    """Return the lines of one run, three tasks of ten classes unless told otherwise.

    ``groups`` are the labels of the class groups; ``rows`` hold one value per group, ``sizes`` their test images.
    """
    order = list(range(30)) if order is None else list(order)
    groups = groups or [f"{10 * i:02d}-{10 * i + 9:02d}" for i in range(len(rows))]
    values = {
        "config": "configs/some.json",
        "prefix": "",
        "dataset": "vtab" if cllora else "cifar100",
        "shuffle": order != sorted(order),
        "init_cls": first,
        "increment": increment,
        "model_name": "cllora" if cllora else "InfLoRA",
        "seed": seed,
        "EPSILON": 1e-08,
        **settings,
    }
    messages: list[tuple[str, object]] = [("trainer.py", f"{key}: {value}") for key, value in values.items()]
    messages.append(("data_manager.py", order))
    sums = totals(rows, sizes)
    learner = "cllora.py" if cllora else "inflora.py"
    for i, row in enumerate(rows):
        curve = sums[: i + 1]
        accuracies = {"total": sums[i], **dict(zip(groups, row)), "old": 0, "new": row[-1]}  # noqa: B905
        messages += [("trainer.py", "All params: 1000"), ("trainer.py", "Trainable params: 10")]
        messages.append((learner, f"Learning on {10 * i}-{10 * i + 10}"))
        messages.append((learner, f"Task {i}, Epoch 1/1 => Loss 0.100, Train_accy 96.00"))
        if cllora:
            messages += [(learner, f"Task correct: {100 - i}.0"), (learner, f"Task acc: {99 - i}.5")]
            messages += [] if nme else [("trainer.py", "No NME accuracy.")]
            messages.append(("trainer.py", f"CNN: {accuracies}"))
            messages += [("trainer.py", f"NME: {accuracies | {'total': 50.0 + i}}")] if nme else []
            messages.append(("trainer.py", f"CNN top1 curve: {curve}"))
            messages.append(("trainer.py", f"CNN top5 curve: {curve}\n"))
            messages.append(("trainer.py", f"Average Accuracy (CNN): {sum(curve) / len(curve)} \n"))
        else:
            messages += [("trainer.py", "Time:12.5"), (learner, "Exemplar size: 0")]
            messages.append(("trainer.py", f"CNN: {accuracies}"))
            messages.append(("trainer.py", f"CNN top1 curve: {curve}"))
            messages.append(("trainer.py", f"CNN top1 with task curve: {[99.5 - j for j in range(i + 1)]}"))
            messages.append(("trainer.py", f"CNN top1 task curve: {[1 - j / 100 for j in range(i + 1)]}"))
    return "\n".join(_line(i, file, message) for i, (file, message) in enumerate(messages)).split("\n")


def log_text(*runs: Sequence[str]) -> str:
    """Return a log file that holds these runs one after another."""
    return "".join(f"{line}\n" for run in runs for line in run)
