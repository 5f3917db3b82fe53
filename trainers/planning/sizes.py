"""Progressive resizing: which step is trained on images of which size. Free of torch."""

from bisect import bisect_right

from bigbatch.configs.errors import UserError
from bigbatch.configs.schema import Recipe
from bigbatch.configs.size import height_width, largest
from bigbatch.data.geometry import Growth


def image_sizes(recipe: Recipe, epoch_samples: int) -> Growth:
    """The sizes of a run by the first step of each; none where they are data.image_size throughout.

    Each side grows linearly from `start` in step `after` to image_size in step `until`, with the
    samples seen, rounded to the nearest multiple. Raises UserError where the run would end before.
    """
    grows, last = recipe.data.progressive, recipe.data.image_size
    if grows is None:
        return ()
    line = recipe.timeline(epoch_samples)
    ends = [line.steps(length) for length in (grows.after, grows.until, recipe.duration)]
    begin, end, total = map(line.units, ends)
    if not begin < end < total:
        raise UserError(
            f"data.progressive grows from step {ends[0]:,} to {ends[1]:,} of {ends[2]:,}: it has "
            "to end after it begins, and before the run does, whose last steps are of "
            "data.image_size; change data.progressive.after, data.progressive.until or duration"
        )

    first, growing = height_width(grows.start), end - begin

    def side(small: int, large: int, step: int) -> int:
        # In integers: half a multiple is rounded up on any machine.
        over = small * growing + (large - small) * (step - begin)
        unit = grows.multiple * growing
        return min(max((2 * over + unit) // (2 * unit) * grows.multiple, small), large)

    def size(step: int) -> tuple[int, int]:
        if step >= end:
            return height_width(last)
        height, width = (side(a, b, max(step, begin)) for a, b in pairs)
        return (height, width) if step > begin else first

    pairs = list(zip(first, height_width(last), strict=True))
    found = [(0, size(0))]
    while found[-1][1] != size(end):  # sides only grow, so that sizes rise as pairs do
        step = bisect_right(range(end + 1), found[-1][1], key=size)
        found.append((step, size(step)))
    by_step = {line.reaching(units * line.unit): pair for units, pair in found}  # the last of each
    return tuple((step, largest([pair])) for step, pair in by_step.items())
