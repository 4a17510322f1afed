"""A job: a simulation from its first round to its report, with all that is evaluated, written down and kept."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fedsim.config import Assembly, ConfigError, Experiment
from fedsim.engines.engine import Engine
from fedsim.evaluation import Evaluate, Evaluation, evaluate, spread
from fedsim.foreign import Foreign
from fedsim.progress import Display, Silent
from fedsim.randomness import rng
from fedsim.ranges import Count, Natural, check_fields
from fedsim.ranking import RankItems, users
from fedsim.runs import Run
from fedsim.simulation import Round, Snapshot, TooFewReplies, begin, rounds
from fedsim.task import Cohort, Metrics, Params
from fedsim.trackers import Tracker, track
from fedsim.trackers import check as check_tracker

DisplayFor = Callable[[str, int, int], Display]  # (label, rounds, rounds done already)


@dataclass(frozen=True)
class Plan:
    """How long a simulation runs, and what is written down when."""

    rounds: Count
    name: str = "simulation"
    seed: Natural = 0
    evaluate_every: Natural = 1  # 0: never
    evaluate_clients: Count | None = None  # None: all that have a test part
    checkpoint_every: Count = 10
    keep_checkpoints: Count | Literal["all"] = 2
    min_replies: Natural = 1  # 0: a round in which nobody answers changes nothing
    threads: Count = 1

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(cls, experiment: Experiment) -> "Plan":
        """The plan of an experiment."""
        return cls(**{field.name: getattr(experiment, field.name) for field in fields(cls)})


class Job(NamedTuple):
    """A simulation that may begin: all that can be checked beforehand has been."""

    assembly: Assembly
    plan: Plan
    cohorts: dict[str, tuple[Engine, Sequence[int]]]  # who is evaluated, by the name of the part
    tables: Mapping[str, Any]  # for the tracker
    tracker: str | None = None


class Result(NamedTuple):
    """What a simulation gives back."""

    metrics: list[Metrics]  # one a round
    params: Params  # of the final model
    path: Path  # the run's directory

    def last(self, name: str) -> float:
        """The latest value of a metric; KeyError if it was never measured."""
        for line in reversed(self.metrics):
            if name in line:
                return line[name]
        raise KeyError(f"{name!r} was never measured: there are {', '.join(sorted(set().union(*self.metrics)))}")


def prepare(assembly: Assembly, plan: Plan, tables: Mapping[str, Any], tracker: str | None = None) -> Job:
    """The job; raises ConfigError or ValueError for what would fail later."""
    if tracker is not None:
        check_tracker(tracker)
    return Job(assembly, plan, _evaluated(assembly, plan), tables, tracker)


def _begin(job: Job, directory: Run, resuming: bool) -> Snapshot:
    """The snapshot to go on from; what was written down after it is taken back."""
    parts, plan = job.assembly, job.plan
    snapshot = begin(parts.strategy, parts.model.params, parts.clients, parts.federation.num_clients, plan.seed)
    if parts.strategy.overwrites:  # its state has a copy of the model, which may be large
        parts.model.release()
    if not resuming:
        return snapshot
    if isinstance(parts.strategy, Foreign):
        raise ConfigError(
            f"{parts.strategy.guest!r} is a strategy of Flower's, whose memory no checkpoint holds: a run of it cannot "
            f"be resumed, only run anew; what it has measured so far stays in {directory.path}"
        )
    try:
        if found := directory.checkpoints():
            snapshot = directory.load(found[-1], snapshot)
        if snapshot.round > plan.rounds:
            raise ValueError(f"rounds = {plan.rounds}: must be at least {snapshot.round}, so many have been done")
        directory.rewind(snapshot.round)
        directory.prune(plan.keep_checkpoints)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return snapshot


def drive(job: Job, directory: Run, resuming: bool, display: DisplayFor | None, experiment: str = "") -> Result:
    """Takes the rounds that are still to do, writes them down, and makes the report.

    Raises:
        ConfigError: what is in the directory does not fit, or another process is writing there.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(directory.locked())
        except BlockingIOError as error:
            raise ConfigError(str(error)) from None
        return _drive(job, directory, resuming, display, experiment)


def _drive(job: Job, directory: Run, resuming: bool, display: DisplayFor | None, experiment: str) -> Result:
    parts, plan = job.assembly, job.plan
    snapshot = _begin(job, directory, resuming)
    if resuming:
        directory.describe(experiment)
    shown = display(plan.name, plan.rounds, snapshot.round) if display else Silent()
    sent = nullcontext() if job.tracker is None else closing(_track(job, job.tracker, directory, snapshot.round))
    with parts.engine, shown as screen, sent as elsewhere:
        for told in () if resuming else parts.federation.notes:
            screen.warn(told)
        try:
            steps = rounds(parts.strategy, parts.engine, parts.sample, snapshot, plan.min_replies)
            for step in islice(steps, plan.rounds - snapshot.round):
                snapshot = step.snapshot
                _note(step, job, directory, screen, elsewhere)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, TooFewReplies):
                directory.record_failures(error.round, error.failed)
                directory.record_incidents(error.round, error.incidents)
                directory.save(snapshot, plan.keep_checkpoints)
            error.add_note(_whereabouts(error, directory.path))
            raise
    from fedsim.report import write_report  # only here: it draws, and a worker, which never does, starts sooner

    write_report(directory.path)
    return Result(directory.metrics(), parts.strategy.params(snapshot.state), directory.path)


def _track(job: Job, tracker: str, directory: Run, done: int) -> Tracker:
    return track(tracker, job.plan.name, directory.path, job.tables, done)


def _whereabouts(error: BaseException, path: Path) -> str:
    """Where a run is that was ended by this, and what to do with it."""
    if isinstance(error, KeyboardInterrupt):
        return f"The run is in {path}; it can be resumed: `fedsim resume {path}`"
    if isinstance(error, TooFewReplies):
        return f"The run is in {path}; {path / 'failures.jsonl'} tells why, client by client."
    return f"The run is in {path}."


def _note(step: Round, job: Job, directory: Run, screen: Display, elsewhere: Tracker | None) -> None:
    """Evaluates if it is time, writes the round down, and then the checkpoint: what a checkpoint covers is on disk."""
    plan, snapshot = job.plan, step.snapshot
    number, last = snapshot.round, snapshot.round == plan.rounds or step.done
    own: Metrics = {
        "round": number,
        "seconds": step.seconds,
        "clients": step.answered,
        "failed": len(step.failed),
        "bytes_down": step.traffic.down,
        "bytes_up": step.traffic.up,
    }
    if taken := (own.keys() | {"converged"}) & step.metrics.keys():
        raise ValueError(
            f"round {number}: the strategy measures {', '.join(map(repr, sorted(taken)))}, a name that every round "
            f"has already ({', '.join(own)}): give it another one"
        )
    metrics = own | ({"converged": 1} if step.done else {}) | step.metrics
    directory.record_failures(number, step.failed)
    directory.record_incidents(number, step.incidents)  # before the evaluation, which may raise
    incidents = list(step.incidents)
    if plan.evaluate_every and (number % plan.evaluate_every == 0 or last):
        parts = {name: _evaluate(name, job, snapshot) for name in job.cohorts}
        for name, part in parts.items():
            metrics |= {f"{name}/{measure}": value for measure, value in part.pooled.items() if measure != "examples"}
            directory.record_failures(number, {ident: f"evaluating: {why}" for ident, why in part.failed.items()})
            directory.record_incidents(number, part.incidents)
            incidents += part.incidents
        if "clients" in parts:
            metrics |= {f"clients/{measure}": value for measure, value in spread(parts["clients"]).items()}
            down, up = parts["clients"].traffic
            metrics |= {"evaluate/bytes_down": down, "evaluate/bytes_up": up}
        directory.save_evaluation(number, parts, job.assembly.federation.names)
        directory.record_counts(number, parts)
    directory.record(metrics)
    if number % plan.checkpoint_every == 0 or last:
        directory.save(snapshot, plan.keep_checkpoints)
    screen.show(metrics)
    for told in incidents:
        screen.warn(f"round {number}: {told}")
    if elsewhere is not None:
        elsewhere.log(metrics)


def _evaluated(assembly: Assembly, plan: Plan) -> dict[str, tuple[Engine, Sequence[int]]]:
    """What is evaluated: the common test set ("test") and the clients' own test parts ("clients"), where there are."""
    if not plan.evaluate_every:
        return {}
    client = assembly.clients["evaluate"]
    cohorts: dict[str, tuple[Engine, Sequence[int]]] = {}
    if assembly.federation.test:
        central = assembly.federation.central()
        cohorts["test"] = (assembly.engine.beside(central, {"evaluate": client}, plan.seed), range(central.num_clients))
    ids = np.flatnonzero(assembly.federation.sizes(client.split))
    if plan.evaluate_clients is not None and plan.evaluate_clients < len(ids):
        ids = np.sort(rng(plan.seed, "evaluate").choice(ids, plan.evaluate_clients, replace=False))
    if len(ids):
        cohorts["clients"] = (assembly.engine, ids.tolist())
    if not cohorts:
        raise ConfigError(
            f"{assembly.federation.name} has nothing to evaluate on, neither a common test set nor a {client.split} "
            f"part at its clients: set {_holding_out(assembly)}, or evaluate_every = 0"
        )
    return cohorts


def _holding_out(assembly: Assembly) -> str:
    """The setting by which there would be something to evaluate on."""
    client = assembly.clients["evaluate"]
    ranks = isinstance(client, RankItems) and client.part == "validation"
    return "split.validation = true" if ranks else f"split.{client.split} (0.2, say)"


def _evaluate(name: str, job: Job, snapshot: Snapshot) -> Evaluation:
    engine, ids = job.cohorts[name]
    shared = job.assembly.strategy.shared(snapshot.state)
    personal = snapshot.personal.gather(ids) if name == "clients" else snapshot.personal.newcomers(len(ids))
    client = job.assembly.clients["evaluate"]
    reduce = client.reduce if isinstance(client, Evaluate) else "sum"
    found = evaluate(engine, shared, Cohort(ids, personal), snapshot.round, reduce)
    if len(found.failed) == len(ids) or (found.failed and name == "test"):  # of which a part says nothing
        raise RuntimeError(f"round {snapshot.round}: evaluation failed: {next(iter(found.failed.values()))}")
    if name == "clients" and isinstance(client, RankItems):
        answered = found.clients["client"].astype(np.int64)
        about = users(job.assembly.federation, answered, client.part, client.popularity)
        found = found._replace(clients=found.clients | about)
    return found
