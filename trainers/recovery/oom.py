"""Memory that runs out: how it shows, and how it is said. Free of torch."""

# What the worker says; `bigbatch find-micro-batch` knows by it why a probe ended.
OUT_OF_MEMORY = "out of memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the device, or the host, had no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch, CPU


def explain(error: BaseException, rank: int) -> str:
    reason = str(error).split("\n")[0][:300]
    return (
        f"rank {rank} is {OUT_OF_MEMORY}: {reason}; lower micro_batch (`bigbatch "
        "find-micro-batch` finds the largest that fits) or evaluate.batch, then start a new run"
    )
