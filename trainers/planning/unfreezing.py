"""When the stages of a network start to learn. Free of torch."""

from bigbatch.configs.durations import Length
from bigbatch.configs.timeline import Timeline


def start_of(number: int, every: Length, line: Timeline) -> int:
    """Finished steps before a stage learns, the `number`-th from the top, the classifier being 0.

    A pure function of the samples seen: period `number` begins with the first step that has
    `number` times `every` behind it (Howard and Ruder 2018, arXiv:1801.06146, section 3.3).
    """
    return line.steps(Length(number * every.value, every.unit))
