"""Documents the small T5 is pre-trained on: other text from the generator, never the four tasks.

What is disjoint, and tested:

- No document holds a task's label together with a word of any task's topic or mood.
- Task topics and moods stand only in fill-in documents, which have no options and no label.
- A task's label is an answer only in ``named`` documents, which copy a word that the text itself contains.
- The four datasets' names, and the label words of classification documents, are not shared with the tasks.

What is shared on purpose: the prompt's form, the sentence patterns, and which words go together (fill-in
documents are about one topic), as a large model knows these before it meets a benchmark.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from flatpatch.continual.quick import words
from flatpatch.continual.quick.generator import BENCHMARK, mood_text, pick, pick_distinct, topic_text

SENTINELS = tuple(f"<extra_id_{index}>" for index in range(8))
TASK_LABELS: tuple[str, ...] = tuple(label for task in BENCHMARK.values() for label in task.labels)
WORDINGS: dict[str, tuple[str, ...]] = {
    "TC": (
        "Which topic does the text belong to? Pick one option.",
        "Name the subject of this passage. Use one of the options.",
        "What is the paragraph about? Choose the option that fits best.",
        "Select the topic of the following text.",
    ),
    "SC": (
        "Which mood does the text express? Pick one option.",
        "What is the feeling of this passage? Choose one of the options.",
        "Select the sentiment of the following paragraph.",
    ),
    "named": (
        "Which option is named in the text?",
        "Find the one option that the passage mentions.",
    ),
}
NUM_FIXED_SETS = 24
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Document:
    """One pre-training example: what the encoder reads and what the decoder shall write."""

    kind: str
    source: str
    target: str


@dataclass(frozen=True)
class FixedSet:
    """A made-up classification data set whose label names are arbitrary, as the tasks' are."""

    name: str
    kind: str
    groups: dict[str, tuple[str, ...]]


def fixed_sets() -> list[FixedSet]:
    """Return the made-up data sets; the same ones on each call."""
    rng = random.Random("fixed sets")
    sets = []
    for index in range(NUM_FIXED_SETS):
        kind = "SC" if index % 4 == 3 else "TC"
        source = words.PRETRAINING_MOODS if kind == "SC" else words.PRETRAINING_TOPICS
        size = 3 + int(rng.random() * 6)
        per_label = 1 + int(rng.random() * (len(source) // size)) if kind == "TC" else 1
        names = pick_distinct(rng, list(source), size * min(per_label, 3))
        labels = pick_distinct(rng, words.PRETRAINING_LABELS, size)
        sets.append(FixedSet(_letters(rng), kind, {label: tuple(names[i::size]) for i, label in enumerate(labels)}))
    return sets


def document(rng: random.Random, sets: Sequence[FixedSet]) -> Document:
    """Draw one document: 40 % fill-in, 25 % own-word options, 20 % fixed sets, 15 % named options."""
    kind = rng.random()
    if kind < 0.40:
        return _fill_in(rng)
    if kind < 0.65:
        return _own_word(rng)
    if kind < 0.85:
        return _fixed_set(rng, pick(rng, sets))
    return _named(rng)


def prompt(kind: str, dataset: str, instruction: str, options: Sequence[str], text: str) -> str:
    """Return the prompt that upstream's loader and collator build from these parts."""
    return f"Task:{kind}\nDataset:{dataset}\n{instruction}\nOption: {', '.join(options)} \n{text}\nAnswer:"


def _fill_in(rng: random.Random) -> Document:
    topics = words.TASK_TOPICS if rng.random() < 0.5 else words.PRETRAINING_TOPICS
    moods = words.TASK_MOODS if rng.random() < 0.5 else words.PRETRAINING_MOODS
    nouns = [word for topic in topics.values() for word in topic]
    adjectives = [word for mood in moods.values() for word in mood]
    part = rng.random()
    if part < 0.6:
        text = topic_text(rng, pick(rng, list(topics.values())), nouns, [*words.NEUTRAL_ADJECTIVES, *adjectives])
    elif part < 0.9:
        text = mood_text(rng, pick(rng, list(moods.values())), adjectives, nouns)
    else:
        other = [word for topic in words.PRETRAINING_TOPICS.values() for word in topic]
        text = topic_text(rng, TASK_LABELS, other, words.NEUTRAL_ADJECTIVES)
    pieces = text.replace(":", " :").replace(".", " .").split()
    hidden = sorted(pick_distinct(rng, range(len(pieces)), 4 + int(rng.random() * 3)))
    target = []
    for sentinel, position in zip(SENTINELS, hidden, strict=False):
        target += [sentinel, pieces[position]]
        pieces[position] = sentinel
    return Document("fill-in", " ".join(pieces).replace(" :", ":").replace(" .", "."), " ".join(target))


def _own_word(rng: random.Random) -> Document:
    kind = "SC" if rng.random() < 0.3 else "TC"
    source = words.PRETRAINING_MOODS if kind == "SC" else words.PRETRAINING_TOPICS
    names = pick_distinct(rng, list(source), 3 + int(rng.random() * 6))
    options = [pick(rng, source[name]) for name in names]
    own = [word for word in source[names[0]] if word != options[0]]
    text = _text(rng, kind, own, [word for name in names[1:] for word in source[name] if word not in options])
    instruction = pick(rng, WORDINGS[kind])
    shown = pick_distinct(rng, options, len(options))
    return Document("own-word", prompt(kind, _letters(rng), instruction, shown, text), options[0])


def _fixed_set(rng: random.Random, chosen: FixedSet) -> Document:
    source = words.PRETRAINING_MOODS if chosen.kind == "SC" else words.PRETRAINING_TOPICS
    label = pick(rng, list(chosen.groups))
    own = source[pick(rng, chosen.groups[label])]
    others = [word for group in chosen.groups.values() for name in group for word in source[name]]
    text = _text(rng, chosen.kind, own, others)
    return Document(
        "fixed-set", prompt(chosen.kind, chosen.name, pick(rng, WORDINGS[chosen.kind]), list(chosen.groups), text), label
    )


def _named(rng: random.Random) -> Document:
    pool = TASK_LABELS if rng.random() < 0.6 else words.PRETRAINING_LABELS
    options = pick_distinct(rng, pool, 3 + int(rng.random() * 6))
    text = topic_text(
        rng,
        options[:1],
        [word for topic in words.PRETRAINING_TOPICS.values() for word in topic],
        words.NEUTRAL_ADJECTIVES,
    )
    shown = pick_distinct(rng, options, len(options))
    return Document("named", prompt("TC", _letters(rng), pick(rng, WORDINGS["named"]), shown, text), options[0])


def _text(rng: random.Random, kind: str, own: Sequence[str], others: Sequence[str]) -> str:
    if kind == "SC":
        return mood_text(rng, own, others, [word for topic in words.PRETRAINING_TOPICS.values() for word in topic])
    moods = [word for mood in words.PRETRAINING_MOODS.values() for word in mood]
    return topic_text(rng, own, others, [*words.NEUTRAL_ADJECTIVES, *moods])


def _letters(rng: random.Random) -> str:
    return "".join(pick(rng, LETTERS) for _ in range(4 + int(rng.random() * 5)))
