"""The unlearning certificate: what was asked, what was measured, held against retraining, and the verdict."""

import json
from typing import Any

from fedsim.report.content import Fact, Section, Table
from fedsim.report.formats import NONE, amount, count, duration, measure
from fedsim.report.reading import RunRecord

FILE = "certificate.json"
MODELS = {"before": "before", "after": "after", "relapsed": "after plain rounds", "retrained": "retrained"}
MEASURES = {
    "forgotten_accuracy": "accuracy on the forgotten examples",
    "target_accuracy": "accuracy on the target, held out",
    "retained_accuracy": "accuracy on the rest, held out",
    "attack_success": "backdoor success",
    "stamped_accuracy": "accuracy on stamped images",
    "membership_loss": "membership AUC, loss threshold",
    "membership_ratio": "membership AUC, likelihood ratio",
    "divergence": "KL to the retrained model’s predictions",
    "distance": "distance to the retrained model’s predictions",
}
COSTS = {"rounds": count, "client_epochs": count, "bytes": amount, "seconds": duration}


def certificate(record: RunRecord) -> Section | None:
    """The certificate of a run, where there is one."""
    path = record.path / FILE
    if not path.is_file():
        return None
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        facts = (
            Fact("Asked to forget", "; ".join(map(str, told["asked"])), f"{count(told['examples'])} examples"),
            Fact("Verdict", str(told["verdict"]), bad=not all(check["holds"] for check in told["checks"])),
        )
        limits = Table("Its limits", ("what this does not say",), tuple((str(limit),) for limit in told["limits"]))
        tables = (_checks(told), _models(told), _costs(told), limits)
        return Section("Unlearning certificate", f"Against {told['against']}.", facts, (), tables)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _checks(told: dict[str, Any]) -> Table:
    rows = tuple(
        (check["name"], measure(check["value"]), measure(check["allowed"]), "yes" if check["holds"] else "no")
        for check in told["checks"]
    )
    return Table("What must hold", ("check", "measured", "at most", "holds"), rows, words=(0, 3))


def _models(told: dict[str, Any]) -> Table:
    models = {name: told["models"][name] for name in MODELS if name in told["models"]}
    rows = tuple(
        (text, *(measure(model[name]) if name in model else NONE for model in models.values()))
        for name, text in MEASURES.items()
        if any(name in model for model in models.values())
    )
    note = f"After plain rounds: {count(told['plain_rounds'])} of clients.repair."
    return Table("What was measured", ("", *(MODELS[name] for name in models)), rows, note)


def _costs(told: dict[str, Any]) -> Table:
    forgetting, retraining = (told["costs"][name] for name in ("forgetting", "retraining"))
    rows = []
    for name, form in COSTS.items():
        share = measure(forgetting[name] / retraining[name]) if retraining[name] else NONE
        rows.append((name.replace("_", " "), form(forgetting[name]), form(retraining[name]), share))
    return Table("What it cost", ("", "forgetting", "retraining", "share"), tuple(rows))
