"""What the report of a run says, and in which order."""

import numpy as np

from fedsim.report import figures
from fedsim.report.certificate import certificate
from fedsim.report.classes import classes
from fedsim.report.clients import over_clients
from fedsim.report.configuration import configuration, surroundings
from fedsim.report.content import Fact, Section, Table
from fedsim.report.failures import failures, incidents
from fedsim.report.fairness import fairness, gaps
from fedsim.report.formats import NONE, amount, count, duration, measure, several
from fedsim.report.measures import curved, label, main, outcome, total
from fedsim.report.phases import marked, sentence
from fedsim.report.reading import RunRecord
from fedsim.report.recommendation import recommendation, recommendations
from fedsim.report.scores import scores

_FACTS = 6  # measures in the headline
_ROWS = 40  # of the table of metrics


def sections(record: RunRecord) -> list[Section]:
    """The sections of a run's report; those that have nothing to tell are left out."""
    found = [
        certificate(record),
        curves(record),
        recommendation(record),
        fairness(record),
        scores(record),
        over_clients(record),
        classes(record),
        traffic(record),
        time(record),
        failures(record),
        incidents(record),
        configuration(record),
        surroundings(record),
    ]
    return [section for section in found if section is not None]


def subtitle(record: RunRecord) -> str:
    """In a line: when, which seed, which method on which data, which engine."""
    uses = [record.experiment.get(part) for part in ("strategy", "data")]
    strategy, data = (str(table.get("use", "")).rsplit(":", 1)[-1] if isinstance(table, dict) else "" for table in uses)
    method = f"{strategy} on {data}" if strategy and data else strategy or data
    started = str(record.environment.get("started", ""))[:16].replace("T", " ")
    seed = f"seed {record.experiment['seed']}" if "seed" in record.experiment else ""
    return " · ".join(text for text in (method, seed, str(record.environment.get("engine", "")), started) if text)


def headline(record: RunRecord) -> list[Fact]:
    """The numbers that one wants first."""
    facts = []
    for name in main(curved(record))[:_FACTS]:
        found = outcome(record, name)
        if found is not None:
            best = f"best {measure(found.best)}, round {count(found.best_round or 0)}" if found.best is not None else ""
            facts.append(Fact(label(name), measure(found.last), best))
    facts += [*recommendations(record), *gaps(record)]
    done, asked = len(record.rounds), record.rounds_asked
    some = f"of {count(asked)} asked for" if asked is not None and asked != done else ""
    if some and not record.unfinished:
        some = f"then it had converged; {count(asked or 0)} allowed"
    facts.append(Fact("Rounds", count(done), some))
    facts += [*_people(record), *_costs(record)]
    missing = len(record.failures) or int(total(record, "failed") or 0)
    if missing or "failed" in record.metrics:
        facts.append(Fact("Failures", count(missing), "" if missing else "every client answered", missing > 0))
    return facts


def _people(record: RunRecord) -> list[Fact]:
    everybody = record.environment.get("num_clients")
    _, cohorts = record.series("clients")
    usual = f"{count(float(np.nanmedian(cohorts)))} a round" if np.isfinite(cohorts).any() else ""
    if isinstance(everybody, int):
        return [Fact("Clients", count(everybody), usual)]
    return [Fact("Clients a round", usual.removesuffix(" a round"))] if usual else []


def _costs(record: RunRecord) -> list[Fact]:
    facts = []
    seconds = total(record, "seconds")
    if seconds is not None:
        _, each = record.series("seconds")
        usual = f"{duration(float(np.nanmedian(each)))} a round" if np.isfinite(each).any() else ""
        facts.append(Fact("Time", duration(seconds), usual))
    down, up = total(record, "bytes_down"), total(record, "bytes_up")
    if down or up:
        facts.append(
            Fact("Traffic", amount((down or 0) + (up or 0)), f"{amount(down or 0)} down, {amount(up or 0)} up")
        )
    return facts


def curves(record: RunRecord) -> Section | None:
    """Every metric over rounds, and where it began and ended; fairness and recommendation have their own sections."""
    names = curved(record)
    if not names:
        return None
    plots, left = figures.curves(record)
    rows = []
    for name in names[:_ROWS]:
        found = outcome(record, name)
        if found is not None:
            best = (measure(found.best), count(found.best_round or 0)) if found.best is not None else (NONE, NONE)
            rows.append((name, measure(found.first), measure(found.last), *best))
    hidden = len(names) - len(rows)
    table = Table(
        "",
        ("metric", "first", "last", "best", "in round"),
        tuple(rows),
        f"{several(hidden, 'more metric')} in metrics.jsonl." if hidden else "",
    )
    notes = ["Test is the common test set; clients’ are the clients’ own test parts, pooled."] if main(names) else []
    if phases := sentence(marked(record)):
        notes.append(phases)
    if any(len(record.series(name)[0]) > 400 for name in names):
        notes.append("Of long curves the mean of neighbouring rounds is drawn, in a band from least to greatest.")
    if left:
        notes.append(f"{several(left, 'metric')} not drawn.")
    return Section("Curves", " ".join([*notes, *_not_finite(record, names)]), plots=tuple(plots), tables=(table,))


def _not_finite(record: RunRecord, names: list[str]) -> list[str]:
    told = []
    for name in names[:_ROWS]:
        rounds, values = record.series(name)
        bad = rounds[~np.isfinite(values)]
        if len(bad):
            told.append(f"{name} was not finite in {several(len(bad), 'round')}, first in round {count(bad[0])}.")
    return told


def traffic(record: RunRecord) -> Section | None:
    """Bytes to and from clients."""
    down, up = total(record, "bytes_down"), total(record, "bytes_up")
    if not (down or up):
        return None
    facts = []
    for name, size, metric in (("To clients", down, "bytes_down"), ("From clients", up, "bytes_up")):
        if size is not None:  # where a method has phases, the mean over rounds would be of none of them
            each = record.series(metric)[1]
            usual = float(np.nanmedian(each)) if np.isfinite(each).any() else np.nan
            facts.append(Fact(name, amount(size), f"{amount(usual)} in the usual round"))
    evaluated = [total(record, f"evaluate/{name}") or 0 for name in ("bytes_down", "bytes_up")]
    if any(evaluated):
        facts.append(Fact("For evaluation", amount(sum(evaluated)), f"{amount(evaluated[1])} of it from clients"))
    return Section("Traffic", "What a real network would have carried.", tuple(facts), (figures.traffic(record),))


def time(record: RunRecord) -> Section | None:
    """How long rounds took."""
    rounds, seconds = record.series("seconds")
    if not np.isfinite(seconds).any():
        return None
    slowest = int(np.nanargmax(seconds))
    facts = [
        Fact("Median round", duration(float(np.nanmedian(seconds)))),
        Fact("Slowest round", duration(float(seconds[slowest])), f"round {count(rounds[slowest])}"),
        Fact("All rounds", duration(float(np.nansum(seconds)))),
    ]
    clients = total(record, "clients")
    if clients and np.nansum(seconds) > 0:
        facts.append(Fact("Clients a second", measure(clients / float(np.nansum(seconds)))))
    return Section("Time", "Without evaluation and checkpoints.", tuple(facts), (figures.time(record),))
