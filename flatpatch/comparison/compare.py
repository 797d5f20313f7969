"""What may be said of runs beside a baseline: the verdicts and their rules.

Of each metric, with the 95 % interval of the difference (``flatpatch.comparison.differences``) and a margin in points:

- ``reproduced``: the whole interval lies within the margin on either side of 0. That is equivalence by two one-sided
  tests at 2.5 % each (Schuirmann 1987, doi:10.1007/BF01068419); a difference that is merely not significant is not
  enough. Runs that equal their partners of the same seed in every accuracy are reproduced too, however few.
- ``within the paper's spread``: the mean lies within one printed standard deviation of the paper's mean.
- ``off by x``: the interval leaves out 0.
- ``undecided``: none of these; with the smallest difference that so few runs would show in 80 % of cases.
- ``equivalent``: what would be ``reproduced``, of runs with SAM: they reproduce nothing, they are another method.

The verdict over all metrics is the least favourable of theirs. Every interval is for its metric alone: of many metrics
that agree in truth, one in twenty is still called off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatpatch.comparison.differences import MeanDifference, Side, paired_difference, unpaired_difference
from flatpatch.comparison.sides import (
    Matrix,
    Run,
    other_settings,
    run_of_log,
    run_of_record,
    runs_of_baseline,
    subject_of,
)
from flatpatch.errors import UserError, did_you_mean
from flatpatch.families import of_record
from flatpatch.families.base import LoggedRun
from flatpatch.metrics import MARGIN, METRICS
from flatpatch.report.baselines import find_baselines, load_baseline, paper_rows
from flatpatch.report.copies import copied, copied_records
from flatpatch.report.records import setting, settings_of
from flatpatch.report.titles import labels
from flatpatch.settings import OF_MEASURING, OF_PLACES, idle_settings
from flatpatch.upstreams import UPSTREAMS

# Compared unless others are asked for, where both sides have them.
COMPARED = tuple(name for name, metric in METRICS.items() if metric.compared)
REPRODUCED, EQUIVALENT, WITHIN_SPREAD = "reproduced", "equivalent", "within the paper's spread"
UNDECIDED, OFF, NOT_COMPARABLE = "undecided", "off by", "not comparable because"
_FROM_BEST = (REPRODUCED, EQUIVALENT, WITHIN_SPREAD, UNDECIDED, OFF, NOT_COMPARABLE)
# Settings in which runs of one set may differ; measuring leaves the training as it is.
_OWN = ("seed", "device", *OF_PLACES, *OF_MEASURING)


def compare_runs(
    records: Sequence[Mapping[str, Any]],
    baseline: str | None = None,
    *,
    names: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    margin: float = MARGIN,
) -> dict[str, Any]:
    """Compare finished runs that differ by their seed alone with a baseline.

    Args:
        records: The runs' records.
        baseline: Its name; None takes the first of those that speak of such runs, shipped runs before papers (papers
            first where ``profile=paper`` changed something).
        names: What to call the runs; default: method and seed.
        metrics: Names as in a record's ``metrics``; default: ``COMPARED``, where both sides have them.
        margin: How large a difference still counts as reproduced, in points.

    Returns:
        An object that JSON can hold: ``baseline`` (name, source, kind, verification; None where there is none),
        ``runs``, ``verdict``, ``why``, ``notes`` (what could not be checked) and ``metrics``, one object each.

    Raises:
        UserError: If the runs are none, unfinished or of several kinds, or a name is unknown.
    """
    names = list(names) if names is not None else [_name(record) for record in records]
    check_set(records, names)
    check_request(metrics, margin)
    subject = subject_of(records[0])
    found = next(filter(None, map(labels, records)), [])
    obstacle = f"it is labelled {', '.join(found)}" if found else ""
    row = UPSTREAMS.get(records[0]["method"])
    if row is not None and row.reconstruction:
        obstacle = f"it is a reconstruction: {row.reconstruction}"
    runs = [run_of_record(name, record) for name, record in zip(names, records, strict=True)]
    with_sam = setting(records[0], "sam", "off") != "off" and setting(records[0], "rho", 0.0) != 0
    changed = [row["what"] for row in records[0]["deviations"] if row["why"].startswith("profile paper")]
    candidates = [baseline] if baseline else find_baselines(subject)
    if changed:  # such runs follow the paper, not the code that the shipped runs ran
        candidates.sort(key=lambda name: load_baseline(name)["kind"] != "paper")
    baseline = next(iter(candidates), None)
    if not obstacle and changed and baseline and load_baseline(baseline)["kind"] != "paper":
        obstacle = f"profile=paper changed {', '.join(changed)}, and {baseline} ran as upstream's code says"
    kind = load_baseline(baseline)["kind"] if baseline else ""
    if not obstacle and baseline and (others := load_baseline(baseline).get("differs_from_configuration")):
        obstacle = f"{baseline} ran with other settings than upstream's configuration says: {'; '.join(others)}"
    other_data, unchecked = compare_data(records, names, subject, kind)
    obstacle = "; ".join(filter(None, [obstacle, other_data]))
    result = _compare(runs, subject, baseline, obstacle, metrics, margin, with_sam)
    twice = [*copied_records(names, records), *_copied_from(runs, baseline, with_sam)]
    return result | {"notes": [*twice, *unchecked]}


def compare_logged(
    runs: Sequence[LoggedRun],
    baseline: str | None = None,
    *,
    metrics: Sequence[str] | None = None,
    margin: float = MARGIN,
) -> dict[str, Any]:
    """Compare the complete runs of an upstream log with a baseline, as ``compare_runs`` does.

    Args:
        runs: What a family's ``read_log`` gave.
        baseline: Its name, or None as for ``compare_runs``.
        metrics: As for ``compare_runs``.
        margin: As for ``compare_runs``.

    Returns:
        As ``compare_runs``.

    Raises:
        UserError: If no run is complete, two have the same seed, they are of several kinds, or a name is unknown.
    """
    complete = [run for run in runs if run.complete]
    if not complete:
        raise UserError(f"the log holds no complete run ({len(runs)} begun). Compare one that reached its last task.")
    subjects = [run.subject for run in complete]
    if any(subject != subjects[0] for subject in subjects):
        raise UserError(
            f"the log holds runs of several kinds: {_words(subjects[0])} and others. Compare one kind at a time."
        )
    _check_seeds([run.seed for run in complete], [f"the run from line {run.first_line}" for run in complete])
    check_request(metrics, margin)
    chosen = baseline or next(iter(find_baselines(subjects[0])), None)
    others = sorted({text for run in complete for text in other_settings(run, load_baseline(chosen))}) if chosen else []
    obstacle = f"it ran with other settings: {'; '.join(others)}" if others else ""
    sides = [run_of_log(f"seed {run.seed} (line {run.first_line})", run) for run in complete]
    result = _compare(sides, subjects[0], chosen, obstacle, metrics, margin, with_sam=False)
    kind = load_baseline(chosen)["kind"] if chosen else ""
    twice = [*copied([_as_copied(side, {"seed": side.seed}) for side in sides]), *_copied_from(sides, chosen, False)]
    doubts = complete[0].doubt_data(kind, shipped=_are_shipped(sides, subjects[0]))
    return result | {"notes": [*twice, *doubts]}


def compare_data(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], subject: Mapping[str, Any], kind: str
) -> tuple[str, list[str]]:
    """Compare the runs' data, as their family does; one whose method is not known here has nothing to say."""
    upstream = UPSTREAMS.get(records[0]["method"])
    return of_record(records[0]).compare_data(upstream, subject, records, names, kind) if upstream else ("", [])


def _as_copied(run: Run, trained_with: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], Matrix]:
    return run.name, trained_with, run.accuracy or []


def _copied_from(runs: Sequence[Run], baseline: str | None, with_sam: bool) -> list[str]:
    """Name each run that has the accuracies of a shipped run of another seed, or of one without its SAM."""
    if baseline is None or load_baseline(baseline)["kind"] == "paper":
        return []
    shipped = [run for run in runs_of_baseline(baseline, load_baseline(baseline)) if run.seed is not None]
    return [
        sentence
        for run in runs
        for other in shipped
        for sentence in copied(
            [
                _as_copied(run, {"seed": run.seed, "SAM": "on" if with_sam else "off"}),
                _as_copied(other, {"seed": other.seed, "SAM": "off"}),
            ]
        )
    ]


def _are_shipped(runs: Sequence[Run], subject: Mapping[str, Any]) -> bool:
    """Return whether logged runs are those of a shipped log: the same seeds, with every accuracy equal."""
    baselines = [(name, load_baseline(name)) for name in find_baselines(subject)]
    shipped = [run for name, one in baselines if one["kind"] == "shipped run" for run in runs_of_baseline(name, one)]
    return all(
        any((run.seed, run.accuracy, run.metrics) == (other.seed, other.accuracy, other.metrics) for other in shipped)
        for run in runs
    )


def _compare(
    runs: Sequence[Run],
    subject: Mapping[str, Any],
    name: str | None,
    obstacle: str,
    metrics: Sequence[str] | None,
    margin: float,
    with_sam: bool,
) -> dict[str, Any]:
    result: dict[str, Any] = {"baseline": None, "runs": [run.name for run in runs], "notes": [], "metrics": []}
    if name is None:
        why = obstacle or f"no published number of {_words(subject)} is known here"
        return result | {"verdict": f"{NOT_COMPARABLE} {why}", "why": why}
    baseline = load_baseline(name)
    paper = baseline["kind"] == "paper"
    rows = list(paper_rows(baseline, subject)) if paper else []
    result["baseline"] = _describe(name, baseline, rows)
    methods = _methods_of(baseline)
    other_method = subject["method"] not in methods
    # That it speaks of another method is said before why the runs count for less.
    if other_method or (not obstacle and not (rows if paper else baseline["applies_to"] == subject)):
        of = "" if paper else f": that is {_words(baseline['applies_to'])}"
        of += f" (baseline of another method: {', '.join(methods)})" if other_method else ""
        obstacle = f"this is {_words(subject)}, of which {name} says nothing{of}"
    theirs = [] if paper else runs_of_baseline(name, baseline)
    if not obstacle:
        obstacle = _other_order(runs, theirs)
    if obstacle:
        return result | {"verdict": f"{NOT_COMPARABLE} {obstacle}", "why": obstacle}
    if paper:
        compared = [
            _against_row(runs, row, baseline["runs"], margin)
            for _, row in rows
            if metrics is None or row["record_metric"] in metrics
        ]
        known = [row["record_metric"] for _, row in rows]
    else:
        known = [metric for metric in metrics or COMPARED if all(_has(run, metric) for run in [*runs, *theirs])]
        compared = [_against_runs(runs, theirs, metric, margin) for metric in known]
    for metric in metrics or ():
        if metric not in known:
            compared.append(_missing(metric, runs, name))
    if with_sam:
        compared = [_as_another_method(entry) for entry in compared]
    return result | {"metrics": compared} | _overall(compared)


def _methods_of(baseline: Mapping[str, Any]) -> list[str]:
    """Return the methods of the runs that a baseline speaks of."""
    applies = (
        [row.get("applies_to") for table in baseline["tables"] for row in table["rows"]]
        if baseline["kind"] == "paper"
        else [baseline["applies_to"]]
    )
    return sorted({one["method"] for one in applies if one})


def _against_runs(runs: Sequence[Run], theirs: Sequence[Run], metric: str, margin: float) -> dict[str, Any]:
    partners = _partners(runs, theirs)
    identical = partners is not None and all(
        run.accuracy is not None and run.accuracy == other.accuracy and run.metrics[metric] == other.metrics[metric]
        for run, other in zip(runs, partners, strict=True)
    )
    here = [_value(run, metric) for run in runs]
    if partners is not None and (len(runs) > 1 or identical):
        there = [_value(run, metric) for run in partners]
        difference = paired_difference(here, there)
    else:
        there = [_value(run, metric) for run in theirs]
        difference = unpaired_difference(Side.of(here), Side.of(there))
    entry = _entry(metric, Side.of(here), here, Side.of(there), there, difference)
    if identical:
        what = "the run equals its partner" if len(runs) == 1 else f"the {len(runs)} runs equal their partners"
        return entry | {"verdict": REPRODUCED, "why": f"{what} of the same seed in every accuracy"}
    verdict, why = _judge(difference, margin)
    if partners is not None and len(runs) > 1:
        why += _unequal_pairs(runs, here, there)
        if len(runs) < len(theirs):
            why += f"; compared with the {len(runs)} of their {len(theirs)} runs that have the same seeds"
    return entry | {"verdict": verdict, "why": why}


def _against_row(runs: Sequence[Run], row: Mapping[str, Any], n: int | None, margin: float) -> dict[str, Any]:
    metric = row["record_metric"]
    if not all(_has(run, metric) for run in runs):
        return _missing(metric, runs, "the runs")
    here = [_value(run, metric) for run in runs]
    # Where the number of runs behind a row is not known, one is the cautious guess: it gives the widest interval.
    there = Side(row["mean"], row["std"], n or 1)
    difference = unpaired_difference(Side.of(here), there)
    entry = _entry(metric, Side.of(here), here, there, None, difference)
    entry["there"]["standard_deviation"] = row["std"]
    if n is None:
        entry["there"]["n"] = None
    verdict, why = _judge(difference, margin)
    if verdict != REPRODUCED and row["std"] is not None and abs(difference.difference) <= row["std"]:
        verdict, why = WITHIN_SPREAD, f"within one printed standard deviation, {row['std']:g}"
    if row["std"] is None:
        why += "; the paper prints no spread"
    if row.get("note"):
        why += f"; {row['note']}"
    return entry | {"verdict": verdict, "why": why}


def _judge(difference: MeanDifference, margin: float) -> tuple[str, str]:
    if difference.interval is None:
        if difference.test == "difference only":
            return UNDECIDED, "one number on either side: the difference alone, no test"
        return UNDECIDED, "the numbers do not spread at all, so there is nothing to judge the difference by"
    low, high = difference.interval
    kind = "interval" if difference.test != "prediction interval" else "interval, as if both sides spread alike,"
    shown = f"the 95 % {kind} of the difference, {signed(low)} to {signed(high)},"
    if -margin <= low and high <= margin:
        return REPRODUCED, f"{shown} lies within the margin of {margin:g}"
    if low > 0 or high < 0:
        return f"{OFF} {signed(difference.difference)}", f"{shown} leaves out 0"
    return (
        f"{UNDECIDED}: these seeds can only show differences of {difference.detectable:.2f}",
        f"{shown} holds 0 and reaches beyond the margin of {margin:g}",
    )


def _unequal_pairs(runs: Sequence[Run], here: Sequence[float], there: Sequence[float]) -> str:
    """Name the pairs that differ where others are exactly equal: that is no noise of seeds."""
    unequal = [f"seed {run.seed} by {signed(a - b)}" for run, a, b in zip(runs, here, there, strict=True) if a != b]
    if not unequal or len(unequal) == len(runs):
        return ""
    rest = len(runs) - len(unequal)
    return f"; {', '.join(unequal)}, while the other {rest} of the {len(runs)} equal their partners exactly"


def _partners(runs: Sequence[Run], theirs: Sequence[Run]) -> list[Run] | None:
    """Return for every run the one there with its seed and order; None unless each has one."""
    by_seed: dict[int | None, Run] = {run.seed: run for run in theirs if run.seed is not None}
    found = [by_seed[run.seed] for run in runs if run.seed in by_seed]
    return found if len(found) == len(runs) else None


def _other_order(runs: Sequence[Run], theirs: Sequence[Run]) -> str:
    """Say how the tasks or classes of runs differ from those of the other side, or return an empty string."""
    orders = [run.order for run in theirs]
    if not orders or None in orders:
        return ""
    for run in runs:
        partners = [other.order for other in theirs if other.seed == run.seed] or orders
        if run.order is None or run.order in partners:
            continue
        if set(run.order) != {item for order in orders if order is not None for item in order}:
            return f"its tasks are others: {_list(run.order)} here, {_list(partners[0])} there"
        return f"its order is another: {_list(run.order)} here, {_list(partners[0])} there"
    return ""


def _list(items: Sequence[object] | None) -> str:
    shown = [str(item) for item in items or ()]
    return ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else "")


def _entry(
    metric: str,
    here: Side,
    values: list[float],
    there: Side,
    their_values: list[float] | None,
    difference: MeanDifference,
) -> dict[str, Any]:
    return {
        "metric": metric,
        "here": {"mean": here.mean, "standard_deviation": here.standard_deviation, "n": here.n, "values": values},
        "there": {
            "mean": there.mean,
            "standard_deviation": there.standard_deviation,
            "n": there.n,
            "values": their_values,
        },
        "difference": difference.difference,
        "interval": None if difference.interval is None else list(difference.interval),
        "detectable": difference.detectable,
        "test": difference.test,
    }


def _missing(metric: str, runs: Sequence[Run], name: str) -> dict[str, Any]:
    lacking = [run.name for run in runs if not _has(run, metric)]
    why = f"{', '.join(lacking) if lacking else name} {'have' if len(lacking) > 1 else 'has'} no {metric}"
    nothing: dict[str, Any] = {"mean": None, "standard_deviation": None, "n": 0, "values": []}
    return {
        **{"metric": metric, "here": nothing, "there": dict(nothing), "difference": None, "interval": None},
        **{"detectable": None, "test": "difference only", "verdict": f"{NOT_COMPARABLE} {why}", "why": why},
    }


def _as_another_method(entry: dict[str, Any]) -> dict[str, Any]:
    if entry["verdict"] != REPRODUCED:
        return entry
    return entry | {"verdict": EQUIVALENT, "why": f"{entry['why']}; with SAM it is another method, not a reproduction"}


def _overall(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    if not entries:
        why = "no metric is known on both sides"
        return {"verdict": f"{NOT_COMPARABLE} {why}", "why": why}

    def rank(entry: Mapping[str, Any]) -> int:
        return next(i for i, start in enumerate(_FROM_BEST) if entry["verdict"].startswith(start))

    worst = max(entries, key=rank)
    same = [entry["metric"] for entry in entries if rank(entry) == rank(worst)]
    if len(same) == len(entries) and rank(worst) < _FROM_BEST.index(UNDECIDED):
        return {"verdict": worst["verdict"], "why": f"every metric: {', '.join(same)}"}
    return {"verdict": worst["verdict"], "why": f"{worst['metric']}: {worst['why']}"}


def _describe(name: str, baseline: Mapping[str, Any], rows: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    if baseline["kind"] != "paper":
        source = baseline["source"]
        commit = f" at {source['commit'][:7]}" if source["commit"] else ""
        return {
            "name": name,
            "source": f"{source['repo']}{commit}: {source['path']}",
            "kind": baseline["kind"],
            "verification": baseline["verification"],
        }
    tables = ", ".join(dict.fromkeys(table for table, _ in rows))
    levels = dict.fromkeys(level for _, row in rows for level in row["verification"].split(", "))
    return {
        "name": name,
        "source": f"{baseline['paper']}, arXiv:{baseline['arxiv']}{', ' if tables else ''}{tables}",
        "kind": baseline["kind"],
        "verification": "; ".join(baseline["verification_levels"][level] for level in levels) or "no row applies",
    }


def check_set(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Refuse runs that are none, unfinished, of several kinds, or twice of one seed.

    Raises:
        UserError: With what is wrong with them.
    """
    if not records:
        raise UserError("no run to compare. Name at least one: run=runs/NAME.")
    problems = [
        f"{name} is {record['status']}, not finished. The command that started it continues it."
        for name, record in zip(names, records, strict=True)
        if record["status"] != "finished"
    ]
    methods = dict.fromkeys(record["method"] for record in records)
    if len(methods) > 1:
        problems.append(f"the runs are of several methods: {', '.join(methods)}. Compare one method at a time.")
    elif different := sorted({key for record in records[1:] for key in differing(records[0], record)}):
        problems.append(
            f"the runs differ in more than their seed: {', '.join(different)}. Compare one set of seeds at a time."
        )
    if problems:
        raise UserError.collect(problems)
    if len(records) > 1:
        _check_seeds([record["seeds"][0] if len(record["seeds"]) == 1 else None for record in records], names)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the settings, and what else tells runs apart, in which two differ; seeds and places do not count."""
    here, there = settings_of(one), settings_of(other)
    keys = {*here, *there} - set(_OWN) - (idle_settings(one) & idle_settings(other))
    if all(of_record(record).knows_data(record) for record in (one, other)):
        keys -= {"data"}  # what they hold is compared, not where they lie
    found = [key for key in keys if here.get(key) != there.get(key)]
    found += [key for key in ("benchmark", "profile", "engine", "tasks") if one[key] != other[key]]
    pins = [(record["upstream"] or {}).get("pin") for record in (one, other)]
    return found + (["upstream's commit"] if pins[0] != pins[1] else [])


def _check_seeds(seeds: Sequence[int | None], names: Sequence[str]) -> None:
    for i, seed in enumerate(seeds):
        if seed is not None and seed in seeds[:i]:
            raise UserError(
                f"{names[seeds.index(seed)]} and {names[i]} have the same seed, {seed}: they are no two samples. "
                "Leave one out."
            )


def check_request(metrics: Sequence[str] | None, margin: float) -> None:
    """Refuse an unknown metric and a margin out of range.

    Raises:
        UserError: With the first that is wrong.
    """
    if not (0 < margin < 100):
        raise UserError(f"margin={margin:g} is out of range (expected points of accuracy, over 0 and under 100).")
    for metric in metrics or ():
        if metric not in METRICS:
            raise UserError(f"unknown metric '{metric}'.{did_you_mean(metric, METRICS)} Known: {', '.join(METRICS)}.")


def _has(run: Run, metric: str) -> bool:
    return run.metrics.get(metric) is not None


def _value(run: Run, metric: str) -> float:
    value = run.metrics[metric]
    assert value is not None  # the callers ask _has first
    return float(value)


def _name(record: Mapping[str, Any]) -> str:
    return f"{record['method']}, seed {', '.join(map(str, record['seeds']))}"


def signed(value: float) -> str:
    """Return a difference in points with its sign and two decimals; what rounds to 0 is +0.00."""
    return f"{round(value, 2) + 0.0:+.2f}"


def _words(subject: Mapping[str, Any]) -> str:
    parts = [str(subject["method"])]
    if "order" in subject:
        parts.append(f"order {subject['order']}")
    if "dataset" in subject:
        parts.append(f"{subject['dataset']} in {subject['tasks']} tasks")
    if subject.get("shuffled"):
        parts.append("classes shuffled")
    return ", ".join(parts)
