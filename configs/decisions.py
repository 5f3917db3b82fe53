"""What a run has decided about its batch, from events.jsonl, and its recipe with that decided."""

from bigbatch.configs.batch import ByNoise
from bigbatch.configs.files import iter_jsonl
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.schema import Recipe

KIND = "batch"  # of the event
Decisions = list[tuple[int, int]]  # (samples, batch): at which position, rising, for which batch


def read_decisions(run: RunDir) -> Decisions:
    """The decisions on record. Of several at one position the first stands.

    An event that somebody has damaged is none.
    """
    found: dict[int, int] = {}
    for event in iter_jsonl(run.events, b'"batch"'):
        samples, batch = event.get("samples"), event.get("global_batch")
        if event.get("kind") == KIND and type(samples) is int and type(batch) is int:
            found.setdefault(samples, batch)
    return sorted(found.items())


def following(recipe: Recipe, decided: Decisions) -> Recipe:
    """The recipe with these decisions, where it leaves any; elsewhere itself."""
    batch = recipe.global_batch
    if not isinstance(batch, ByNoise):
        return recipe
    return recipe.model_copy(update={"global_batch": batch.following(decided)})


def recipe_of(run: RunDir) -> Recipe:
    """A run's recipe with what the run has decided so far. UserError where it is no run."""
    recipe = run.recipe()
    if not isinstance(recipe.global_batch, ByNoise):
        return recipe
    return following(recipe, read_decisions(run))
