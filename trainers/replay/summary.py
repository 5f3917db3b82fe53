"""What a replay found, as plain values, and in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from torch import Tensor

from bigbatch.configs.words import plural
from bigbatch.trainers.replay.corrupted import compare_ranks, words
from bigbatch.trainers.replay.look import Looked, Sample
from bigbatch.trainers.replay.past import Past, number
from bigbatch.trainers.replay.replay import COMPARED, Replayed

Result = dict[str, Any]
_SEEN = 0.01  # of an image: less of another one in it is not worth a word


def summarise(
    replayed: Replayed, looked: Looked, classes: Sequence[str], differs: Sequence[str]
) -> Result:
    """The result as JSON has it. `differs`: in what this machine is another one."""
    past, record = replayed.past, replayed.record
    samples = [_sample(s, classes) for s in looked.samples]
    layers = layer_table(replayed)
    return {
        "run": past.run.name,
        "path": str(past.run.path),
        "step": past.step,
        "from_step": past.start,
        "checkpoint": None if past.checkpoint is None else str(past.checkpoint),
        "same": replayed.same,
        "compared": replayed.compared,
        "ledger_lines": replayed.lines,
        "weights_as_saved": replayed.checkpoint,
        "unlike_saved": list(replayed.unlike or ()),
        "differences": [asdict(d) for d in replayed.differences],
        "environment": list(differs),
        "recorded": {k: past.records.get(past.step, {}).get(k) for k in COMPARED},
        "recomputed": {k: record[k] for k in COMPARED},
        "updated": replayed.updated,
        "why_not": _why_not(replayed),
        "usual_grad_norm": median(past.usual) if past.usual else None,
        "usual_of": len(past.usual),
        "guilty": _guilty(replayed, looked, samples, layers),
        "layers": layers,
        "micro_batches": [asdict(part) for part in looked.parts],
        "micro": looked.chosen,
        "terms": looked.terms,
        "samples": samples,
        "activations": [asdict(a) for a in looked.activations],
        "ranks": compare_ranks(past.run, past.step, replayed.line),
    }


def layer_table(replayed: Replayed) -> list[Result]:
    """A row for each trained parameter: norms of gradient, update and weights.

    `share` is that of the squared norm, `usual` the median norm in the steps that were replayed
    before, or of the newest record of kind gradients.
    """
    past, norms = replayed.past, replayed.norms
    square = math.fsum(n * n for n in norms.values())
    earlier: Sequence[Mapping[str, float | None]] = replayed.earlier
    if not earlier:
        known = [s for s in past.gradients if s < past.step]
        earlier = [past.gradients[max(known)]["norms"]] if known else []
    rows = []
    for name, norm in norms.items():
        before, after = replayed.before[name], replayed.after[name]
        update, weight = _length(after.double() - before.double()), _length(before.double())
        values = [v for one in earlier if (v := one.get(name)) is not None and math.isfinite(v)]
        rows.append(
            {
                "layer": name,
                "gradient_norm": norm,
                "share": norm * norm / square if square else 0.0,
                "usual": median(values) if values else None,
                "update_norm": update,
                "weight_norm": weight,
                "trust_ratio": replayed.ratios.get(name),
            }
        )
    return rows


def _length(tensor: Tensor) -> float:
    return float(tensor.norm())


def _sample(sample: Sample, classes: Sequence[str]) -> Result:
    return {**asdict(sample), "class": classes[sample.label]}


def _why_not(replayed: Replayed) -> str | None:
    past = replayed.past
    if replayed.updated:
        return None
    if None in (replayed.record["loss"], replayed.record["grad_norm"]):
        return "loss or gradient is not finite"
    if past.refused:
        return "the run found that it goes wrong, and made no update"
    return "it is stepped over since a rollback"


def _guilty(
    replayed: Replayed, looked: Looked, samples: Sequence[Result], layers: Sequence[Result]
) -> Result:
    """Which layer, micro-batch and sample the gradient comes from, or what is not finite."""
    wrong = [part for part in looked.parts if part.bad_layer is not None]
    if wrong:
        part = wrong[0]
        there = {s["place"]: s["key"] for s in samples if s["micro"] == part.micro}
        keys = [there[place] for place in part.bad_samples if place in there]
        return {"non_finite": part.bad_layer, "micro": part.micro, "samples": keys}
    chosen = next(part for part in looked.parts if part.micro == looked.chosen)
    own = [s for s in samples if s["micro"] == looked.chosen and s["share"] is not None]
    found: Result = {"micro": chosen.micro, "micro_share": chosen.share}
    if own:
        sample = max(own, key=lambda s: s["share"])
        found |= {"sample": sample["key"], "sample_share": sample["share"]}
    if layers:
        layer = max(layers, key=_excess)
        found |= {"layer": layer["layer"], "layer_share": layer["share"]}
        if layer["usual"]:
            found["layer_leap"] = layer["gradient_norm"] / layer["usual"]
    return found


def _excess(layer: Result) -> float:
    """By how much a squared norm is above the usual one; all of it where none is known."""
    norm, usual = layer["gradient_norm"], layer["usual"] or 0.0
    return math.inf if not math.isfinite(norm) else norm**2 - usual**2


def in_words(result: Result) -> list[str]:
    """The findings, a line each."""
    lines = [_where_from(result), *_same(result)]
    here, usual = result["recomputed"], result["usual_grad_norm"]
    if result["why_not"]:
        lines.append(f"no update: {result['why_not']}")
    if usual and here["grad_norm"] is not None:
        lines.append(
            f"gradient norm {here['grad_norm']:.4g}, {here['grad_norm'] / usual:.2g} times the "
            f"median of the last {plural(result['usual_of'], 'record')} before ({usual:.4g})"
        )
    return lines + words(result["ranks"]) + _guilty_words(result)


def _where_from(result: Result) -> str:
    name, step = result["run"], result["step"]
    count = step - result["from_step"]
    start = (
        "the model as it was built"
        if result["checkpoint"] is None
        else (f"the checkpoint after step {result['from_step']}")
    )
    return f"step {step} of {name}, recomputed from {start} ({plural(count, 'step')}, one process)"


def _same(result: Result) -> list[str]:
    here = result["recomputed"]
    values = ", ".join(f"{name} {here[name]}" for name in COMPARED if here[name] is not None)
    if result["same"] is None:
        return [f"nothing of it is on record to compare with: {values}"]
    if result["same"]:
        also = f"; {plural(result['ledger_lines'], 'line')} of the ledger"
        also = also if result["ledger_lines"] else ""
        if result["weights_as_saved"]:
            also += "; weights and optimizer state after it are those saved then"
        return [f"same as recorded, bit for bit: {values}{also}"]
    lines = [
        f"differs: step {found['step']}, {found['name']} recorded {found['recorded']}, "
        f"recomputed {found['recomputed']}"
        for found in result["differences"][:5]
    ]
    if more := result["differences"][5:]:
        lines.append(f"differs: {plural(len(more), 'more value')}")
    if result["weights_as_saved"] is False:
        unlike = result["unlike_saved"]
        more = f" and {plural(len(unlike) - 3, 'other')}" if len(unlike) > 3 else ""
        lines.append(f"differs: the checkpoint after it has another {', '.join(unlike[:3])}{more}")
    lines += [f"environment: {line}" for line in result["environment"]]
    return lines


def mixed_words(sample: Result) -> str:
    """The other samples that can be seen in an image, with their shares; empty where none can."""
    return ", ".join(f"{share:.0%} {key}" for key, share in sample["mixed"] if share >= _SEEN)


def _guilty_words(result: Result) -> list[str]:
    found = result["guilty"]
    if "non_finite" in found:
        keys = found["samples"]
        named = ", ".join(keys[:8]) + (", ..." if keys[8:] else "")
        where = f"{plural(len(keys), 'sample')} of micro-batch {found['micro']} ({named})"
        if not keys:
            where = f"micro-batch {found['micro']}"
        return [f"first not finite: {found['non_finite']}, at {where}"]
    lines = []
    if "layer" in found:
        leap = f", {found['layer_leap']:.3g} times its usual norm" if "layer_leap" in found else ""
        lines.append(f"layer: {found['layer']} ({found['layer_share']:.0%} of the gradient{leap})")
    share = f"{found['micro_share']:.0%} of the gradient"
    lines.append(f"micro-batch: {found['micro']} ({share})")
    if "sample" in found:
        sample = next(s for s in result["samples"] if s["key"] == found["sample"])
        mixed = mixed_words(sample)
        lines.append(
            f"sample: {sample['key']}, class {sample['class']} ({found['sample_share']:.0%} of the "
            f"gradient, loss {sample['loss']:.4g})" + (f", mixed with {mixed}" if mixed else "")
        )
    return lines


def reach(past: Past) -> str | None:
    """What to say before a replay of many steps begins."""
    count = past.step - past.start
    if count <= 20:
        return None
    times = [number(record.get("step_s")) for record in past.records.values()]
    known = [t for t in times if t is not None]
    took = f"; they took the run {median(known) * count:,.0f} s" if known else ""
    return f"recomputing {plural(count, 'step')} from step {past.start:,}{took}"
