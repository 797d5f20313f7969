"""Upstream's commands under change, with every change written down as a deviation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flatpatch.errors import UserError, did_you_mean
from flatpatch.families.base import Deviation
from flatpatch.families.text.scripts import Invocation

Datasets = tuple[tuple[str, str], ...]  # (task type, dataset) pairs, such as ("TC", "dbpedia")


class Editor:
    """Upstream's invocations under change, one for each task, with every change written down."""

    def __init__(self, originals: Sequence[Invocation]) -> None:
        self.originals: list[Invocation] = list(originals)
        self.current: list[Invocation] = list(originals)
        self.reasons: dict[tuple[str, str], str] = {}
        self.extra: list[Deviation] = []

    def set(self, name: str, value: str | None, why: str) -> None:
        """Set one argument of every task to one value."""
        self.set_each(name, [value] * len(self.current), why)

    def set_each(self, name: str, values: Sequence[str | None], why: str) -> None:
        """Set one argument of every task, each to its own value; an equal number keeps upstream's spelling."""
        for position, (inv, value) in enumerate(zip(self.current, values, strict=True)):
            if not (inv.has(name) and _same(inv.get(name), value)):
                self.current[position] = inv.with_argument(name, value)
                self.reasons[name, dataset_of(self.originals[position])] = why

    def would_change(self, name: str, value: str) -> bool:
        """Tell whether setting an argument to a value would change it in any task."""
        return any(not (inv.has(name) and _same(inv.get(name), value)) for inv in self.current)

    def drop(self, name: str, why: str) -> None:
        """Take one argument away from every task."""
        self.current = [inv.without(name) for inv in self.current]
        self.reasons |= {(name, dataset_of(inv)): why for inv in self.originals if inv.has(name)}

    def note(self, what: str, upstream: str | None, here: str | None, why: str) -> None:
        """Record a difference that is not an argument."""
        self.extra.append(Deviation(what, upstream, here, why))

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names."""
        return tuple(dataset_of(inv) for inv in self.originals)

    def select(self, wanted: str, evaluates: Sequence[Datasets]) -> list[Datasets]:
        """Keep some tasks of the order; each then evaluates the kept ones alone, which are returned."""
        names = self.names
        asked = [name.strip() for name in wanted.split(",") if name.strip()]
        unknown = [name for name in asked if name not in names]
        if unknown or not asked:
            word = unknown[0] if unknown else wanted
            raise UserError(
                f"tasks='{wanted}': unknown task '{word}'.{did_you_mean(word, names)} "
                f"This order has: {', '.join(names)}."
            )
        kept = [index for index, name in enumerate(names) if name in asked]
        self.note("tasks", ", ".join(names), ", ".join(names[index] for index in kept), "setting tasks=")
        first_model = self.originals[0].get("model_name_or_path")
        self.originals = [self.originals[index] for index in kept]
        self.current = list(self.originals)
        types = dict((dataset, kind) for pairs in evaluates for kind, dataset in pairs)
        kept_names = self.names
        why = "setting tasks=: only some tasks of the order"
        outputs = [
            f"{Path(inv.get('output_dir')).parent}/{number}-{name}"
            for number, (inv, name) in enumerate(zip(self.originals, kept_names, strict=True), 1)
        ]
        models = [first_model] + [f"{output}/adapter" for output in outputs[:-1]]
        self.set_each("output_dir", outputs, why)
        self.set_each("model_name_or_path", models, why)
        self.set_each("task_config_dir", [f"task_configs/{name}" for name in kept_names], why)
        return [tuple((types[name], name) for name in kept_names[: count + 1]) for count in range(len(kept_names))]

    def fit_world_size(self, world_size: int, launcher: str, profile: str) -> bool:
        """Keep upstream's global batch on another number of processes; tell whether that was needed."""
        theirs = self.originals[0].world_size if profile != "quick" else 1
        if world_size == theirs:
            return False
        sizes, steps = [], []
        for inv in self.current:
            size, accumulation = (
                int(inv.get("per_device_train_batch_size")),
                int(inv.get("gradient_accumulation_steps", "1")),
            )
            total = size * accumulation * theirs
            if launcher == "deepspeed" and (accumulation * theirs) % world_size == 0:
                accumulation = accumulation * theirs // world_size
            elif (size * theirs) % world_size == 0:
                # Without DeepSpeed upstream divides the task loss but not the penalty by the accumulation steps, so
                # the accumulation stays as it is and the batch of a process takes the change.
                size = size * theirs // world_size
            else:
                raise UserError(
                    f"a global batch of {total} (upstream: {theirs} processes) cannot be split over {world_size}. "
                    f"Choose another number with device= or processes=."
                )
            sizes.append(str(size))
            steps.append(str(accumulation))
        why = f"{world_size} instead of upstream's {theirs} processes, same global batch"
        self.note(
            "world size",
            str(theirs),
            str(world_size),
            "setting device= or processes=, or what this machine has",
        )
        if sizes != [inv.get("per_device_train_batch_size") for inv in self.current]:
            self.set_each("per_device_train_batch_size", sizes, why)
        if steps != [inv.get("gradient_accumulation_steps", "1") for inv in self.current]:
            self.set_each("gradient_accumulation_steps", steps, why)
        return True

    def fit_launcher(self, launcher: str, device: str, world_size: int, *, asked: bool) -> bool:
        """Drop and add what another launcher or the CPU needs; tell whether upstream's launcher was left.

        Args:
            launcher: The launcher chosen.
            device: The device chosen.
            world_size: The number of processes.
            asked: Whether the device was asked for, rather than what this machine has.
        """
        theirs = f"deepspeed on {self.originals[0].world_size} GPU(s)"
        if launcher == "python":
            cpu = "device cpu" if asked else "no GPU here"
            why = f"launcher python: {cpu}" if device == "cpu" else "launcher python, as asked"
            self.note("launcher", theirs, "python" + (f", {world_size} processes" if world_size > 1 else ""), why)
            self.drop(
                "deepspeed",
                f"{why}; upstream's DeepSpeed configuration also switches bf16 on, here weights are fp32",
            )
        elif device == "cpu":
            self.note("launcher", theirs, f"deepspeed on the CPU, {world_size} process(es)", "device cpu")
        if device == "cpu":
            self.set("no_cuda", None, "device cpu")
            if world_size > 1 or launcher == "deepspeed":
                self.set("xpu_backend", "gloo", "device cpu: the processes talk over gloo")
        steps = max(int(inv.get("gradient_accumulation_steps", "1")) for inv in self.current)
        if launcher == "python" and steps > 1:
            why = "without DeepSpeed upstream adds its penalty undivided to each of the accumulated batches"
            self.note("weight of the penalty in a step", "1", str(steps), why)
        return launcher == "python" or device == "cpu"

    def changes(self, name: str) -> bool:
        """Tell whether an argument differs from upstream's in any task."""
        return any(a.get(name) != b.get(name) for a, b in zip(self.originals, self.current, strict=True))

    def deviations(self) -> list[Deviation]:
        """Return every difference between the commands, one entry for all the tasks that share it."""
        found = list(self.extra)
        if not self.originals[0].launcher:
            return found
        for name in dict.fromkeys(name for name, _ in self.reasons):
            groups: dict[tuple[str | None, str | None, str], list[str]] = {}
            for original, inv in zip(self.originals, self.current, strict=True):
                before, after, task = _shown(original, name), _shown(inv, name), dataset_of(original)
                if before != after:
                    groups.setdefault((before, after, self.reasons[name, task]), []).append(task)
            for (before, after, why), names in groups.items():
                tasks = () if len(names) == len(self.originals) else tuple(names)
                found.append(Deviation(f"--{name}", before, after, why, tasks))
        return found


def _shown(invocation: Invocation, name: str) -> str | None:
    if not invocation.has(name):
        return None
    return invocation.get(name) or "(given)"


def _same(old: str, new: str | None) -> bool:
    try:
        return float(old) == float(new or "")
    except ValueError:
        return old == (new or "")


def dataset_of(invocation: Invocation) -> str:
    """Return the dataset that an invocation trains on."""
    return Path(invocation.get("task_config_dir")).name
