"""Write the quick benchmark: four small text tasks in the data format of O-LoRA and N-LoRA.

The tasks carry the names of the four datasets that upstream's orders 1 to 3 train on, so upstream's own
task configurations work unchanged, but every sentence is made here from the lists in ``words``; nothing
stems from the real datasets. Three tasks sort the same twelve topics into different labels, and the fourth
rates moods in sentences about those same topics: what one task learns about a word, the next one has to
overrule. That is what makes plain sequential training forget.

Everything is drawn with ``random.Random.random``, the one method whose sequence Python promises to keep.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flatpatch.families.text.quick import words

T = TypeVar("T")
Instance = dict[str, str]

SPLIT_SIZES = {"train": 480, "dev": 120, "test": 120}
"""Instances per task. 480 training instances are ten batches of upstream's 48; all label counts divide 120."""

SIGNAL = 0.75
"""Probability that a word of the kind a task asks about comes from the label's own lists, not from another label's."""


@dataclass(frozen=True)
class Task:
    """One task: upstream's name of its kind, and which word lists each label stands for."""

    kind: str
    groups: dict[str, tuple[str, ...]]

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of ``labels.json``."""
        return list(self.groups)


BENCHMARK: dict[str, Task] = {
    "dbpedia": Task(
        "TC",
        {
            "vessel": ("ships",),
            "fowl": ("birds",),
            "dish": ("kitchen",),
            "tune": ("music",),
            "fortress": ("castles",),
            "orbit": ("planets",),
            "flora": ("plants",),
            "device": ("machines",),
        },
    ),
    "amazon": Task(
        "SC", {"bad": ("worst",), "poor": ("low",), "fair": ("middle",), "nice": ("high",), "great": ("best",)}
    ),
    "yahoo": Task(
        "TC",
        {
            "leisure": ("games",),
            "biology": ("health",),
            "household": ("kitchen", "plants"),
            "culture": ("music",),
            "science": ("planets",),
            "civics": ("courts", "money"),
        },
    ),
    "agnews": Task(
        "TC",
        {
            "industry": ("machines", "money"),
            "outdoors": ("birds", "ships"),
            "pastime": ("games", "music"),
            "public": ("castles", "courts"),
        },
    ),
}

TASKS: dict[str, str] = {name: task.kind for name, task in BENCHMARK.items()}
"""Dataset name -> upstream's task type (``TC`` topic, ``SC`` sentiment)."""


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """Draw one item, each with the same probability."""
    return items[int(rng.random() * len(items))]


def pick_distinct(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """Draw ``count`` different positions of ``items``, in random order."""
    pool = list(items)
    return [pool.pop(int(rng.random() * len(pool))) for _ in range(count)]


def topic_text(rng: random.Random, topic: Sequence[str], others: Sequence[str], adjectives: Sequence[str]) -> str:
    """Write a title and two clauses; each noun is from ``topic`` with chance ``SIGNAL``, else ``others``."""

    def noun() -> str:
        return pick(rng, topic if rng.random() < SIGNAL else others)

    def clause() -> str:
        return (
            f"the {pick(rng, adjectives)} {noun()} {pick(rng, words.VERBS)} the {noun()} "
            f"{pick(rng, words.PREPOSITIONS)} the {noun()}"
        )

    return f"Title: {pick(rng, topic)} and {noun()}\nText: {clause()} and {clause()}.\n"


def mood_text(rng: random.Random, mood: Sequence[str], others: Sequence[str], nouns: Sequence[str]) -> str:
    """Write a title and two clauses; each adjective is from ``mood`` with chance ``SIGNAL``, else ``others``."""

    def adjective() -> str:
        return pick(rng, mood if rng.random() < SIGNAL else others)

    def clause() -> str:
        return (
            f"the {pick(rng, nouns)} {pick(rng, words.PREPOSITIONS)} the {pick(rng, nouns)} "
            f"was {adjective()} and {adjective()}"
        )

    return f"Title: {pick(rng, mood)} {pick(rng, nouns)}\nText: {clause()} and {clause()}.\n"


def write_benchmark(folder: Path, *, seed: int = 0) -> None:
    """Write ``TC/dbpedia``, ``SC/amazon``, ``TC/yahoo`` and ``TC/agnews`` below a folder.

    The bytes depend on ``seed`` alone, on any machine and Python version. Labels are balanced in each split,
    no sentence occurs twice in a task, and existing files are overwritten.

    Args:
        folder: Data folder, upstream's ``--data_dir``. Made if absent.
        seed: Draws other sentences; words and labels stay the same.
    """
    for name, task in BENCHMARK.items():
        target = Path(folder) / task.kind / name
        target.mkdir(parents=True, exist_ok=True)
        _write_json(target / "labels.json", task.labels)
        seen: set[str] = set()
        for split, size in SPLIT_SIZES.items():
            rng = random.Random(f"{seed}/{name}/{split}")
            instances = []
            for index in range(size):
                label = task.labels[index % len(task.labels)]
                sentence = _sentence(rng, task, label)
                while sentence in seen:
                    sentence = _sentence(rng, task, label)
                seen.add(sentence)
                instances.append({"label": label, "sentence": sentence})
            _write_json(target / f"{split}.json", pick_distinct(rng, instances, size))


def _sentence(rng: random.Random, task: Task, label: str) -> str:
    source = words.TASK_MOODS if task.kind == "SC" else words.TASK_TOPICS
    own = source[pick(rng, task.groups[label])]
    others = [word for group in task.groups.values() for name in group for word in source[name]]
    if task.kind == "SC":
        return mood_text(rng, own, others, [noun for topic in words.TASK_TOPICS.values() for noun in topic])
    moods = [mood for level in words.TASK_MOODS.values() for mood in level]
    return topic_text(rng, own, others, [*words.NEUTRAL_ADJECTIVES, *moods])


def _write_json(path: Path, value: list[str] | list[Instance]) -> None:
    # newline="\n": the same bytes on Windows.
    with path.open("w", encoding="utf-8", newline="\n") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")
