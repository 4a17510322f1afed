"""The unlearning certificate: what was asked and measured, held against retraining, with a verdict and its limits.

`certify(run, against)` measures a run that forgot. Beside it stands a run of the same experiment that never saw the
examples, of as many rounds as the first model had.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fedsim.certificate.costs import action, spent
from fedsim.certificate.material import BACKDOOR, Material, material
from fedsim.certificate.measuring import accuracies, apart, membership
from fedsim.certificate.notes import of_end, of_lengths, of_measurements, of_training
from fedsim.certificate.verdict import Check, Limits, checks, verdict
from fedsim.checkpoints import read_checkpoint
from fedsim.config import Assembly, ConfigError, Experiment, assemble, read, resolve
from fedsim.files import replace
from fedsim.forgetting import at_hand
from fedsim.launch import threads
from fedsim.ranges import Count, Natural, checked
from fedsim.report import write_report
from fedsim.runs import Run, last_checkpoint, trained
from fedsim.simulation import Snapshot, begin
from fedsim.task import Cohort, Params, Task

FILE = "certificate.json"
SAME = ("seed", "data", "partition", "model")  # what a run and the one that it is held against have in common
DEFAULT = Limits()
LIMITS = (
    "What was not measured is not vouched for: what can be read from the parameters themselves, from the updates that "
    "clients sent while they trained, or from earlier models.",
    "An accuracy of 0 on a class is cheap to have, as it may never be predicted; whether the examples have left traces "
    "is told by a backdoor, by membership, and by plain rounds.",
    "The retrained model is one draw of the seed; two of them differ as well.",
)


class Certificate(NamedTuple):
    """What `certificate.json` in a run's directory says.

    Attributes:
        asked: the requests in words.
        examples: how many were to be forgotten.
        models: "before", "after", "retrained", "relapsed" (after plain rounds) -> measure -> value.
        costs: "forgetting", "retraining" -> rounds, client_epochs, bytes, seconds.
        checks: what must hold of them.
        verdict: in a sentence.
        limits: of the verdict, a sentence each.
        against: the directory of the retrained run.
        plain_rounds: how many there were before "relapsed".
        shadows: how many models the attack by likelihood ratio is made of.
    """

    asked: tuple[str, ...]
    examples: int
    models: dict[str, dict[str, float]]
    costs: dict[str, dict[str, float]]
    checks: tuple[Check, ...]
    verdict: str
    limits: tuple[str, ...]
    against: str
    plain_rounds: int
    shadows: int


@checked
def certify(
    run: str | Path,
    against: str | Path,
    *,
    shadows: Natural = 8,
    plain_rounds: Natural = 2,
    most: Count = 1000,
    limits: Limits = DEFAULT,
) -> Certificate:
    """Measures the last model of a run that forgot, writes certificate.json there, and the report anew.

    Args:
        run: its directory, or a folder of runs: of these, the latest.
        against: the directory of a run of the same data, partition, model and seed without what was to be forgotten:
            with `split.leave_out` at the number of requests, or `split.poisoned = false`; or a folder of runs: of
            these, the latest with the seed.
        shadows: models, an even number, 4 or more, that the attack by likelihood ratio trains; 0: without it.
        plain_rounds: rounds of clients.repair after which it is looked at again; 0, or no such client: never.
        most: of the examples to be forgotten, how many the attacks are made on.
        limits: by which it is judged.

    Raises:
        FileNotFoundError: one of them is no run, or has no checkpoint.
        ConfigError: the two do not belong together, or nothing was to be forgotten.
    """
    if shadows % 2 or 0 < shadows < 4:
        raise ConfigError(f"shadows must be 0, or an even number of at least 4, got {shadows}")
    directory = Run.latest(Path(run))
    asked = resolve(*read(directory.path / "experiment.toml"))
    other = Run.latest(Path(against), asked.seed)
    held_against = resolve(*read(other.path / "experiment.toml"))
    _compare(asked, held_against)
    with threads(asked.threads):
        assembly = assemble(asked)
        with assembly.engine:
            found = _measured(assembly, asked, directory, other, shadows, plain_rounds, most)
    models, about = found
    again = other.metrics()
    costs = {
        "forgetting": spent(directory.metrics(), asked.clients, without=("train",)),
        "retraining": spent(again, held_against.clients),
    }
    judged = tuple(checks(models, costs, limits))
    last = _last(assembly, directory, asked.seed)
    notes = [
        *of_measurements(models, about, shadows, most, limits),
        *of_lengths(_rounds(directory, asked), len(again)),
        *of_training(_trained_by(asked), held_against),
        *of_end(last.round, assembly.strategy.done(last.state)),
    ]
    names = assembly.federation.names["target"][1:]
    size = len(about.forgotten["target"])
    certificate = Certificate(
        tuple(names), size, models, costs, judged, verdict(list(judged)), (*notes, *LIMITS), str(other.path),
        plain_rounds, shadows,
    )  # fmt: skip
    told = certificate._asdict() | {"checks": [check._asdict() | {"holds": check.holds} for check in judged]}
    replace(directory.path / FILE, json.dumps(told, indent=2).encode())
    write_report(directory.path)
    return certificate


def read_certificate(run: str | Path) -> Certificate | None:
    """The certificate in a run's directory, if there is one.

    Raises:
        ValueError: it is damaged.
    """
    path = Path(run) / FILE
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        told["checks"] = tuple(Check(one["name"], one["value"], one["allowed"]) for one in told["checks"])
        return Certificate(**told | {name: tuple(told[name]) for name in ("asked", "limits")})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _measured(
    assembly: Assembly, asked: Experiment, directory: Run, other: Run, shadows: int, plain_rounds: int, most: int
) -> tuple[dict[str, dict[str, float]], Material]:
    """Each model's measures, and what they were measured on."""
    try:
        about = material(assembly.federation, asked.split)
    except ValueError as error:
        raise ConfigError(f"{directory.path}: {error}") from error
    params = {"after": trained(directory.path), "retrained": trained(other.path)}
    if (first := before(directory, asked)) is not None:
        params = {"before": first} | params
    if plain_rounds and "repair" in assembly.clients:
        params["relapsed"] = _plain(assembly, directory, plain_rounds, asked.seed)
    model = assembly.model
    found = {name: accuracies(model, one, about) for name, one in params.items()}
    for name, told in membership(model, params, about, shadows, most, asked.seed).items():
        found[name] |= told
    for name, one in params.items():
        found[name] |= apart(model, one, params["retrained"], about)
    return found, about


def _rounds(directory: Run, asked: Experiment) -> int:
    """For how many rounds the model before it forgot was trained."""
    if "from_run" in asked.strategy:
        return read_checkpoint(last_checkpoint(Path(asked.strategy["from_run"]), asked.seed))[1]
    return sum(action(line) == "train" for line in directory.metrics())


def _trained_by(asked: Experiment) -> Experiment:
    """The experiment that trained the model before it forgot."""
    if "from_run" not in asked.strategy:
        return asked
    folder = last_checkpoint(Path(asked.strategy["from_run"]), asked.seed).parent.parent
    return resolve(*read(folder / "experiment.toml")) if (folder / "experiment.toml").is_file() else asked


def before(directory: Run, asked: Experiment) -> Params | None:
    """The model before it forgot: that of `from_run`, or of the checkpoint after the last round of "train"."""
    if "from_run" in asked.strategy:
        return trained(Path(asked.strategy["from_run"]), asked.seed)
    last = max((int(line["round"]) for line in directory.metrics() if action(line) == "train"), default=0)
    there = [path for path in directory.checkpoints() if int(path.stem.removeprefix("round-")) == last]
    return trained(there[0]) if there else None


def _last(assembly: Assembly, directory: Run, seed: int) -> Snapshot:
    """What a run's last checkpoint holds."""
    number = assembly.federation.num_clients
    start = begin(assembly.strategy, assembly.model.params, assembly.clients, number, seed)
    return directory.load(directory.checkpoints()[-1], start)


def _plain(assembly: Assembly, directory: Run, rounds: int, seed: int) -> Params:
    """The model of a run's last checkpoint after more rounds of clients.repair."""
    federation = assembly.federation
    done, state, personal = _last(assembly, directory, seed)
    params: Params = state["params"]
    last = len(federation.names["target"]) - 1
    for number in range(done + 1, done + 1 + rounds):
        task = Task("repair", {"params": params} | at_hand(last, last), round=number, reduce="mean")
        ids = assembly.sample(number).ids
        replies = assembly.engine.execute(task, Cohort(ids, personal.gather(ids)))
        if not replies.ids:
            raise RuntimeError(f"plain round {number}: no client answered: {next(iter(replies.failed.values()), '')}")
        personal.scatter(replies.ids, replies.personal)
        params = replies.update["params"]
    return params


def _compare(asked: Experiment, other: Experiment) -> None:
    """Raises ConfigError where the other run is not that of a model that never saw what was to be forgotten."""
    for name in SAME:
        one, two = getattr(asked, name), getattr(other, name)
        if one != two:
            raise ConfigError(f"against: its {name} is {two}, and that of the run is {one}: they must be the same")
    split, without = dict(asked.split), dict(other.split)
    if split.get("use") != BACKDOOR and "requests" not in split:
        raise ConfigError(
            f"run: its split is {split}, which names nothing to forget: it must be `marked`, with requests"
        )
    if split.get("use") == BACKDOOR:
        named = "poisoned = false"
        right = without.get("use") == BACKDOOR and without.get("poisoned") is False
        alike: Iterable[str] = ("validation", "test")  # without the copies it is all the same who stamps what
    else:
        named = f"leave_out = {len(split.get('requests', ()))}"
        right = without.get("leave_out") == len(split.get("requests", ()))
        alike = split.keys() - {"leave_out"}
    if not right or any(without.get(key) != split.get(key) for key in alike):
        raise ConfigError(
            f"against: its split is {without}; to be the model that never saw what is to be forgotten it must be that "
            f"of the run, {split}, with {named}"
        )
