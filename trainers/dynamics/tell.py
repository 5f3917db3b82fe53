"""What was found of a run's samples, written and said. Free of torch."""

from dataclasses import dataclass
from pathlib import Path

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.printable import printable
from bigbatch.trainers.dynamics.look import Looked, in_words
from bigbatch.trainers.dynamics.study import weights


@dataclass(frozen=True)
class Wanted:
    """What `bigbatch samples` was asked for."""

    top: int
    out: Path | None = None
    weights: Path | None = None
    weigh: str = "errors"
    drop: float | None = None
    as_json: bool = False


def tell(looked: Looked, wanted: Wanted) -> None:
    """Write files and print figures. Raises UserError where the disk refuses."""
    result = looked.summary(wanted.top)
    if wanted.weights is not None:
        from bigbatch.trainers.dynamics.files import write_weights

        values = weights(looked.found, wanted.weigh, wanted.drop or 0.0)
        write_weights(wanted.weights, looked, values)
        result["weights"] = {"file": str(wanted.weights), "zero": int((values == 0).sum())}
    if wanted.out is not None:
        from bigbatch.trainers.dynamics.files import write_folder

        try:
            write_folder(wanted.out, looked, result)
        except OSError as error:
            raise UserError(f"cannot write {wanted.out}: {error}") from None
        result["out"] = str(wanted.out)
    if wanted.as_json:
        print(to_json(result, indent=1))
        return
    lines = in_words(result)
    if result["label_errors"]:
        lines.append("\nprobable label errors, the lowest mean margins first:")
        width = max(3, *(len(row["key"]) for row in result["label_errors"]))
        lines.append(f"{'key':{width}}  margin  p(true)  right  forgotten  class")
        lines += [
            f"{row['key']:{width}}  {row['margin']:6.2f}  {row['confidence']:7.3f}  "
            f"{row['right']:5.0%}  {row['forgotten']:9}  {row['class']}"
            for row in result["label_errors"]
        ]
    if wanted.weights is not None:
        lines.append(f"weights {wanted.weights}, {result['weights']['zero']:,} of them 0")
    if wanted.out is not None:
        from bigbatch.trainers.dynamics.files import PAGE

        lines.append(f"page {wanted.out / PAGE}")
    print(printable("\n".join(lines)))
