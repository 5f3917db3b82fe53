"""What a diagnosis is made of: findings, and the recipe key that each would turn."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import finite, to_json
from bigbatch.configs.load import change_recipe
from bigbatch.configs.schema import Recipe
from bigbatch.trainers.monitoring.history import History

_TRIED = 200  # steps of a twin, at most
_STYLES = {"problem": "yellow", "note": "cyan", "good": "green"}


@dataclass(frozen=True)
class Turn:
    """A key of the recipe, and the value to try."""

    key: str
    value: Any

    def __str__(self) -> str:
        """As an override on the command line."""
        text = self.value if isinstance(self.value, str) else to_json(self.value)
        return f"{self.key}={text}"


@dataclass(frozen=True)
class Finding:
    """One observation: `good`, `note` (worth knowing) or `problem` (worth acting on).

    `rule` is its name in docs/diagnosis.md, `evidence` the figures that it went by.
    """

    level: Literal["good", "note", "problem"]
    title: str
    text: str
    rule: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    turn: Turn | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        turn = None if self.turn is None else {"key": self.turn.key, "value": self.turn.value}
        named = {"rule": self.rule, "level": self.level, "title": self.title, "text": self.text}
        return {**named, "evidence": finite(dict(self.evidence)), "turn": turn}


def choose(recipe: Recipe, candidates: Iterable[tuple[str, Any]]) -> Turn | None:
    """The first candidate that the recipe bears and that changes it; None without one."""
    for key, value in candidates:
        turn = Turn(key, value)
        try:
            changed = change_recipe(recipe, [str(turn)], say=None)
        except UserError:
            continue
        if changed != recipe:
            return turn
    return None


def what_if(history: History, turn: Turn | None) -> str:
    """A sentence with the command that tries another learning rate beside the run's own, from its
    start; "" where the turn is none of the rate, and of a branch, which has no start."""
    if turn is None or turn.key != "optimizer.lr" or history.manifest.get("forked_from"):
        return ""
    steps = min(_TRIED, history.total_steps or _TRIED)
    command = f"bigbatch whatif {history.name} --step 0 --set {turn} --steps {steps}"
    return f" `{command}` trains both rates side by side and says which is better."


def times(value: float, factor: float) -> float:
    """A rate to try, in two digits."""
    return float(f"{value * factor:.2g}")


def say_findings(findings: Iterable[Finding], console: Console) -> None:
    """A line for each; of what went well, the verdict on the fit alone."""
    told = list(findings)
    shown = [f for f in told if f.level != "good" or f.rule == "converged"] or told
    for finding in shown:
        line = Text.assemble((finding.title, _STYLES[finding.level]), f": {finding.text}")
        if finding.turn is not None:
            line.append(f" Try {finding.turn}")
        console.print(line, highlight=False)
