"""One rank of `bigbatch evaluate`, `predict`, `ensemble` or `samples`: parse, load, run, say.

    python -m bigbatch.trainers.inference evaluate|predict|ensemble|samples MODEL... [options]
    python -m bigbatch.trainers.inference features|transfer RECIPE [options]

Started once per rank, with torchrun's environment variables where there are several.
"""

import argparse
import gc
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigbatch.trainers.recovery.signals import end_at_once, until_stopped

if __name__ == "__main__":
    end_at_once()
    gc.disable()  # while it imports, as the worker does
    if "timm" not in sys.modules:  # a fork has it, and maybe wandb
        from bigbatch.trainers.inference import ahead

        ahead.begin(sys.argv[1:])
        sys.modules["wandb"] = None  # type: ignore[assignment]  # timm would import it, 0.4 s
        import timm  # noqa: F401

        del sys.modules["wandb"]

from pydantic import JsonValue

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.identity import recipe_hash
from bigbatch.configs.notices import notice
from bigbatch.configs.words import plural
from bigbatch.data.listing import Listing, open_listing
from bigbatch.trainers.engine import Engine, open_engine
from bigbatch.trainers.ensemble.combination import Combination, Logits
from bigbatch.trainers.ensemble.evaluations import about
from bigbatch.trainers.ensemble.folder import Ensemble, open_ensemble, write_ensemble
from bigbatch.trainers.ensemble.held_out import check_decides
from bigbatch.trainers.ensemble.members import Member, require_labels
from bigbatch.trainers.evaluation.record import EVALUATION, WORST
from bigbatch.trainers.evaluation.words import in_words
from bigbatch.trainers.inference import ahead, pretrained, targets
from bigbatch.trainers.inference import ensemble as making
from bigbatch.trainers.inference import evaluate as evaluation
from bigbatch.trainers.inference.agreement import require_same, require_same_images
from bigbatch.trainers.inference.cost import cost_of
from bigbatch.trainers.inference.forward import Forward
from bigbatch.trainers.inference.joined import check_joinable, make_joined
from bigbatch.trainers.inference.looks import TTA, check_tta
from bigbatch.trainers.inference.predict import predict
from bigbatch.trainers.inference.soup import SOUPS, make_soup
from bigbatch.trainers.monitoring.output import leave, reader_has_gone
from bigbatch.trainers.recovery.failures import report

Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    engine: Engine | None = None
    try:
        engine = open_engine("ddp", "fp32")  # each member brings its own precision
        if options.command in pretrained.COMMANDS:
            status = pretrained.COMMANDS[options.command](options, engine)
            sys.stdout.flush()
            return status
        ensemble = open_ensemble(options.model, options.members)
        found = [f"{m.name} {recipe_hash(m.recipe)}" for m in ensemble.members]
        require_same(engine, "members", found, "wait until the run has ended, or name them")
        if targets.answers_targets(ensemble) and options.command in ("ensemble", "samples"):
            require_labels(ensemble.members, f"`bigbatch {options.command}`")
        status = _COMMANDS[options.command](options, engine, ensemble)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return reader_has_gone()
    except Exception as error:
        return report(error, engine)
    finally:
        if engine is not None:
            engine.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bigbatch.trainers.inference")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in _COMMANDS:
        command = commands.add_parser(name)
        command.add_argument("model", type=Path, nargs="+")
        command.add_argument("--members", default="auto")
        command.add_argument("--source", required=True)
        command.add_argument("--tta", choices=TTA, default="none")
        command.add_argument("--batch", type=int)
        command.add_argument("--json", action="store_true")
        command.add_argument("--out", type=Path)
        command.add_argument("--mc-dropout", type=int, default=0)
    pretrained.add_commands(commands)
    samples = commands.choices["samples"]
    samples.add_argument("--top", type=int, required=True)
    samples.add_argument("--weights", type=Path)
    samples.add_argument("--weigh", default="errors")
    samples.add_argument("--drop", type=float)
    commands.choices["predict"].add_argument("--features", action="store_true")
    combine = commands.choices["ensemble"]
    combine.add_argument("--report")
    combine.add_argument("--combine", choices=making.METHODS, default="mean")
    combine.add_argument("--margin", type=float, default=1.0)
    combine.add_argument("--coverage", type=float)
    combine.add_argument("--folds", type=int, default=5)
    combine.add_argument("--seed", type=int, default=0)
    combine.add_argument("--soup", choices=SOUPS)
    return parser


def _forward(options: argparse.Namespace, engine: Engine, ensemble: Ensemble) -> Forward:
    for member in ensemble.members:
        check_tta(options.tta, member.recipe, member.name)
    features = options.command == "predict" and options.features
    if features and len(ensemble.members) > 1:
        raise UserError(
            f"--features are those of one member, and there are {len(ensemble.members)}; choose "
            "one with --members"
        )
    members = ensemble.members
    return Forward(
        engine,
        members,
        tta=options.tta,
        mc_dropout=options.mc_dropout,
        batch=options.batch,
        features=features,
        begun=ahead.begun,
    )


def _evaluate(options: argparse.Namespace, engine: Engine, ensemble: Ensemble) -> int:
    if targets.answers_targets(ensemble):
        return targets.evaluate(options, engine, ensemble, _forward(options, engine, ensemble))
    listing = _open_labelled(options.source, engine, ensemble)
    forward = _forward(options, engine, ensemble)
    started = time.perf_counter()
    whole = forward.statistics(ensemble, listing.index)
    if whole is None:
        return 0
    cost = cost_of(forward, len(listing.index), time.perf_counter() - started)
    statistics = whole.summary()
    result = about(ensemble, options.model, listing.index, listing.notes) | statistics
    result |= {"source": options.source, "tta": options.tta, "mc_dropout": options.mc_dropout}
    result["cost"] = cost
    if options.out is not None:
        evaluation.save_evaluation(options.out, ensemble, listing, result, whole.outcomes()[0])
        report = evaluation.renew_report(options.out)
    if options.json:
        print(to_json(result, indent=1))
        return 0
    rows = evaluation.rows_of(statistics, ensemble.members[0].name)
    _say(listing.notes, {Path(options.source).name: rows}, in_words(result))
    if options.out is not None:
        print(f"figures  {options.out / EVALUATION}")
        if result["mistakes_drawn"]:
            print(f"mistakes {options.out / WORST}")
        if report is not None:
            print(f"report   {report}")
    return 0


def _open_labelled(source: str, engine: Engine, ensemble: Ensemble) -> Listing:
    listing = evaluation.open_labelled(source, ensemble.classes)
    require_same_images(engine, source, listing)
    return listing


def _say(notes: list[str], splits: dict[str, evaluation.Rows], lines: list[str]) -> None:
    from bigbatch.configs.terminal import Terminal

    for note in notes:
        notice(note)
    console = Terminal()
    if not console.is_terminal:  # no cell is cut
        console.width = 200
    console.print(evaluation.table_of(splits))
    for line in lines:
        print(line)


def _ensemble(options: argparse.Namespace, engine: Engine, ensemble: Ensemble) -> int:
    if options.tta != "none" or options.mc_dropout:
        name = f"--tta {options.tta}" if options.tta != "none" else "--mc-dropout"
        raise UserError(f"{name}: an ensemble is fitted on plain looks; leave it out")
    fit_on = _open_labelled(options.source, engine, ensemble)
    report_on = None
    if options.report is not None:
        report_on = _open_labelled(options.report, engine, ensemble)
    splits = [split for split in (fit_on, report_on) if split is not None]
    engine.on_main(lambda: making.check_room(ensemble.members, splits))
    with _one_model(options, engine, ensemble, fit_on) as one:
        return _combined(options, engine, one, fit_on, report_on)


def _combined(
    options: argparse.Namespace,
    engine: Engine,
    one: "_Candidates",
    fit_on: Listing,
    report_on: Listing | None,
) -> int:
    forward = _forward(options, engine, one.ensemble)
    # All ranks take part in the forward passes, of which rank 0 makes something.
    logits = {id(fit_on): one.logits if one.judged else forward.logits(fit_on.index)}
    if report_on is not None:
        logits[id(report_on)] = forward.logits(report_on.index)
    method = "mean" if options.combine == making.FEATURES else options.combine
    plan = making.Plan(method, options.margin, options.coverage, options.folds, options.seed)

    def make() -> None:
        made = making.make(
            one.ensemble, plan, fit_on, report_on, lambda split: _there(logits, split)
        )
        made.record.update(one.record)
        write_ensemble(options.out, made.ensemble, made.record | _figures(made))
        _tell(options, made)

    engine.on_main(make)
    return 0


@dataclass(frozen=True, eq=False)
class _Candidates:
    """What is combined: members as they are, or one model that was made of them."""

    ensemble: Ensemble
    record: Record  # how that model was made
    judged: bool = False  # its logits on the split that decides are there, on rank 0:
    logits: Logits | None = None  # [1, N, C], out of fold


@contextmanager
def _one_model(
    options: argparse.Namespace, engine: Engine, ensemble: Ensemble, fit_on: Listing
) -> Iterator[_Candidates]:
    """The members; with --soup one model of their weights, with features one of all of them."""
    joins = options.combine == making.FEATURES
    if options.soup is None and not joins:
        yield _Candidates(ensemble, {})
        return
    if options.soup is not None and options.combine != "mean":
        raise UserError(
            f"--combine {options.combine}: a soup is one model, with nothing to combine; leave "
            "out --soup, or --combine"
        )
    check_decides(making.split_name(fit_on))
    out = options.out
    folder = Path(engine.from_main(str(out.with_name(f".{out.name}.making-{time.time_ns()}"))))
    engine.on_main(lambda: folder.mkdir(parents=True))
    make = _joined if joins else _souped
    try:
        yield make(options, engine, ensemble, fit_on, folder)
    finally:  # on each rank: rank 0 may be the one that was killed
        shutil.rmtree(folder, ignore_errors=True)


def _souped(
    options: argparse.Namespace, engine: Engine, ensemble: Ensemble, fit_on: Listing, folder: Path
) -> _Candidates:
    quiet = options.json or engine.rank != 0
    member, record = make_soup(
        engine,
        ensemble.members,
        options.soup,
        fit_on.index,
        folder,
        margin=options.margin,
        say=(lambda line: None) if quiet else print,
    )
    return _Candidates(Ensemble((member,), Combination()), {"soup": record})


def _joined(
    options: argparse.Namespace, engine: Engine, ensemble: Ensemble, fit_on: Listing, folder: Path
) -> _Candidates:
    members = ensemble.members
    if options.margin != 1.0:
        raise UserError(
            f"--margin {options.margin:g}: a head on features takes all members; leave it out, or "
            "choose them with --members"
        )
    check_joinable(members)
    found = Forward(engine, members, batch=options.batch, features=True).gathered(fit_on.index)
    own: list[Logits] = []  # on rank 0

    def make() -> tuple[Member, Record]:
        assert found is not None
        logits, features = found
        data = making.fit_data(fit_on, logits)
        folds, seed = options.folds, options.seed
        member, judged, record = make_joined(members, features, data, folder, folds, seed)
        own.append(judged)
        return member, record

    member, record = engine.on_main(make)
    content = {"joined": record, "method": making.FEATURES}
    logits = own[0] if own else None
    return _Candidates(Ensemble((member,), Combination()), content, judged=True, logits=logits)


def _there(logits: dict[int, Logits | None], split: Listing) -> Logits:
    found = logits[id(split)]
    assert found is not None  # on rank 0
    return found


def _figures(made: making.Made) -> dict[str, JsonValue]:
    return {"fitted": made.fitted, "reported": made.reported}


def _tell(options: argparse.Namespace, made: making.Made) -> None:
    names = [member.name for member in made.ensemble.members]
    combination = made.ensemble.combination
    if options.json:
        content = {"out": str(options.out), "members": names, **made.record, **_figures(made)}
        print(to_json(content, indent=1))
        return
    splits = {f"{Path(options.source).name}*": evaluation.rows_of(made.fitted, names[0])}
    lines = ["* out of fold: each sample is judged by a fit on the others"]
    if options.soup == "greedy":
        lines = ["* of samples that chose the soup; its temperature is out of fold"]
    if made.reported is not None:
        splits[Path(options.report).name] = evaluation.rows_of(made.reported, names[0])
    lines += in_words(made.reported or made.fitted | {"members": None})
    left_out = [name for name in made.record["candidates"] if name not in names]
    lines += [f"left out: {', '.join(left_out)}"] if left_out else []
    if combination.weights is not None:
        pairs = zip(names, combination.weights, strict=True)
        lines.append("weights: " + ", ".join(f"{name} {weight:.3f}" for name, weight in pairs))
    lines.append(f"ensemble {options.out}")
    _say([], splits, lines)


def _predict(options: argparse.Namespace, engine: Engine, ensemble: Ensemble) -> int:
    workers = len(os.sched_getaffinity(0))
    listing = open_listing(options.source, targets.classes_of(ensemble), workers)
    require_same_images(engine, options.source, listing)
    forward = _forward(options, engine, ensemble)
    result = predict(engine, ensemble, forward, listing, options.out, features=options.features)
    if result is None:
        return 0
    if options.json:
        print(to_json(result, indent=1))
        return 0
    for note in listing.notes:
        notice(note)
    print(
        f"{result['out']}: {plural(result['rows'], 'row')}, {result['unreadable']:,} of them "
        f"without a prediction, in {result['seconds']:.1f} s "
        f"({result['images_per_s']:,.0f} images/s)"
    )
    if result["accuracy"] is not None:
        print(f"accuracy {result['accuracy']:.2%} of {result['with_target']:,} with a target")
    if result.get("mae") is not None:
        print(f"MAE {result['mae']:.4g} of {result['with_target']:,} with a target")
    return 0


def _samples(options: argparse.Namespace, engine: Engine, ensemble: Ensemble) -> int:
    from bigbatch.trainers.inference import clean  # what no other command needs

    listing = _open_labelled(options.source, engine, ensemble)
    return clean.samples(options, _forward(options, engine, ensemble), listing.index)


_COMMANDS = {
    "evaluate": _evaluate,
    "predict": _predict,
    "ensemble": _ensemble,
    "samples": _samples,
}


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    leave(until_stopped(main))
