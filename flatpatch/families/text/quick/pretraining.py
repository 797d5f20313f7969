"""Documents the small T5 is pre-trained on: other text from the generator, never the four tasks.

Four kinds: ``fill-in`` (span corruption), ``classification`` in the tasks' form with other topics, moods and
labels, ``named`` (copy the option that the text mentions) and ``guess`` (any option will do).

What is disjoint, and tested:

- No document holds a task's label together with a word of any task's topic or mood.
- Task topics and moods stand in ``fill-in`` documents alone, which have no options and no label.
- A task's label is an answer only in ``named`` documents, which copy it from the text, and in ``guess``
  documents, whose answer is drawn blindly.
- ``classification`` shares no label, topic or mood with the tasks; no document names one of the four datasets.

What is shared on purpose: the prompt's form, the sentence patterns, and which words go together (a ``fill-in``
text is about one topic), as a large model knows these before it meets a benchmark.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from flatpatch.families.text.quick import words
from flatpatch.families.text.quick.generator import BENCHMARK, mood_text, pick, pick_distinct, topic_text

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
FUNCTION_WORDS = frozenset({"Title", "Text", ":", ".", "the", "and", "was", *words.VERBS, *words.PREPOSITIONS})
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Document:
    """One pre-training example: what the encoder reads and what the decoder shall write."""

    kind: str
    source: str
    target: str


def label_names() -> dict[str, tuple[str, str]]:
    """Return the two label names of each pre-training topic and mood."""
    categories = [*words.PRETRAINING_TOPICS, *words.PRETRAINING_MOODS]
    names = words.PRETRAINING_LABELS
    return {category: (names[2 * i], names[2 * i + 1]) for i, category in enumerate(categories)}


def document(rng: random.Random) -> Document:
    """Draw one document: 30 % fill-in, 40 % classification, 15 % copying a named option, 15 % guessing."""
    kind = rng.random()
    if kind < 0.30:
        return _fill_in(rng)
    if kind < 0.70:
        return _classification(rng)
    if kind < 0.85:
        return _named(rng)
    return _guess(rng)


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
    # Mostly nouns and adjectives: a model that fills them in has learnt which of them belong together.
    content = [index for index, piece in enumerate(pieces) if piece not in FUNCTION_WORDS]
    hidden = sorted({*pick_distinct(rng, content, 2), pick(rng, range(len(pieces)))})
    target = []
    for sentinel, position in zip(SENTINELS, hidden, strict=False):
        target += [sentinel, pieces[position]]
        pieces[position] = sentinel
    return Document("fill-in", " ".join(pieces).replace(" :", ":").replace(" .", "."), " ".join(target))


def _classification(rng: random.Random) -> Document:
    kind = "SC" if rng.random() < 0.3 else "TC"
    source = words.PRETRAINING_MOODS if kind == "SC" else words.PRETRAINING_TOPICS
    chosen = pick_distinct(rng, list(source), 3 + int(rng.random() * 6))
    # Two names for the same thing, one of them among the options: only reading the options tells which to answer.
    options = [pick(rng, label_names()[category]) for category in chosen]
    text = _text(rng, kind, source[chosen[0]], [word for category in chosen for word in source[category]])
    shown = pick_distinct(rng, options, len(options))
    return Document("classification", prompt(kind, _letters(rng), pick(rng, WORDINGS[kind]), shown, text), options[0])


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


def _guess(rng: random.Random) -> Document:
    # The answer is drawn blindly. All there is to learn is that answers are options, even where no option is known.
    kind = "SC" if rng.random() < 0.3 else "TC"
    source = words.PRETRAINING_MOODS if kind == "SC" else words.PRETRAINING_TOPICS
    chosen = pick_distinct(rng, list(source), 2)
    other = [word for name, topic in words.PRETRAINING_TOPICS.items() if name not in chosen for word in topic]
    options = pick_distinct(rng, TASK_LABELS if rng.random() < 0.6 else other, 3 + int(rng.random() * 6))
    text = _text(rng, kind, source[chosen[0]], source[chosen[1]])
    return Document("guess", prompt(kind, _letters(rng), pick(rng, WORDINGS[kind]), options, text), pick(rng, options))


def _text(rng: random.Random, kind: str, own: Sequence[str], others: Sequence[str]) -> str:
    if kind == "SC":
        return mood_text(rng, own, others, [word for topic in words.PRETRAINING_TOPICS.values() for word in topic])
    moods = [word for mood in words.PRETRAINING_MOODS.values() for word in mood]
    return topic_text(rng, own, others, [*words.NEUTRAL_ADJECTIVES, *moods])


def _letters(rng: random.Random) -> str:
    return "".join(pick(rng, LETTERS) for _ in range(4 + int(rng.random() * 5)))
