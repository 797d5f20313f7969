"""Records and step metrics for the report's tests, in the form that the runner writes."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

from flatpatch.metrics import from_lists, summarise

ORDER_1 = ("dbpedia", "amazon", "yahoo", "agnews")
LONG = (
    *("yelp", "amazon", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB"),
    *("SST-2", "dbpedia", "agnews", "yahoo", "MultiRC", "BoolQA", "WiC"),
)


def make_record(tasks: tuple[str, ...] = ORDER_1, *, done: int | None = None, **changes: Any) -> dict[str, Any]:
    """Return a finished full-size run's record; ``done`` leaves later steps out."""
    size = len(tasks)
    done = size if done is None else done
    known = random.Random(1)
    matrix = [
        [round(max(0.0, 95 - 3 * (i - j) - 20 * known.random()), 4) if j <= i < done else None for j in range(size)]
        for i in range(size)
    ]
    record = {
        "schema": 1,
        "status": "finished" if done == size else "interrupted",
        "method": "nlora",
        "benchmark": "standard CL benchmark, order 1",
        "profile": "upstream",
        "profile_reason": "a CUDA device is there",
        "engine": "upstream",
        "engine_reason": "the repository is there",
        "labels": [],
        "notes": [],
        "settings": {
            "method": {"value": "nlora", "source": "command line"},
            "order": {"value": "6" if size > 4 else "1", "source": "default"},
            "sam": {"value": "sam", "source": "command line"},
            "rho": {"value": 0.05, "source": "default"},
            "seed": {"value": 42, "source": "default"},
        },
        "upstream": {"repo": "N-LoRA", "pin": "7" * 40, "base_tree": "a" * 40, "patched_tree": "b" * 40},
        "deviations": [{"what": "library torch", "upstream": "2.0.1", "here": "2.8.0", "why": "CUDA 12"}],
        "environment": {"python": "3.11.7", "torch": "2.8.0"},
        "seeds": [42],
        "tasks": list(tasks),
        "accuracy_matrix": matrix,
        "metrics": summarise(from_lists(matrix)) | {"sample_weighted_accuracy": 73.8813},
        "flatness": [],
        "training": [{"steps": 100, "ascent_fallbacks": 0} for _ in range(done)],
        "timing": {
            "started": "2026-01-01T10:00:00+0000",
            "finished": None,
            "total_seconds": 3725.4,
            "train_seconds": [100.0 + i for i in range(size)],
            "predict_seconds": [20.0 + i for i in range(size)],
        },
        "restarts": 0,
    }
    if "accuracy_matrix" in changes and "metrics" not in changes:
        record["metrics"] = summarise(from_lists(changes["accuracy_matrix"]))
    record = copy.deepcopy(record | changes)
    if done < size:
        record["metrics"] = dict.fromkeys(record["metrics"])
    return record


def make_quick_record(**changes: Any) -> dict[str, Any]:
    """Return the record of a quick run on our own implementation."""
    quick = {
        "profile": "quick",
        "profile_reason": "no CUDA device",
        "engine": "reference",
        "engine_reason": "third_party/N-LoRA is not there and could not be cloned",
        "labels": ["quick", "reference"],
        "upstream": None,
        "benchmark": "quick, order 1",
    }
    return make_record(**(quick | changes))


def make_steps(tasks: tuple[str, ...] = ORDER_1, *, steps: int = 60, sam: bool = True) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl: each task's loss falls from its own height, with noise."""
    noise = random.Random(2)
    rows = []
    for number, task in enumerate(tasks):
        for step in range(1, steps + 1):
            loss = 0.2 + (2 + 0.2 * number) * math.exp(-step / 15) + 0.1 * noise.random()
            rows.append(
                {
                    "task": task,
                    "step": step,
                    "loss": loss,
                    "perturbed_loss": loss * 1.15 + 0.05 * noise.random() if sam else None,
                    "grad_norm": 3 * loss if sam else None,
                    "perturbation_norm": 0.05 if sam else None,
                    "effective_perturbation_norm": 0.05 - 0.002 * noise.random() if sam else None,
                    "perturbation_cosine": 1 - 0.02 * noise.random() if sam else None,
                    "learning_rate": 1e-3,
                    "seconds": 0.34,
                }
            )
    return rows
