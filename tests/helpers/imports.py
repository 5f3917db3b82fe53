"""What the processes of this product may not import at their start, and why: one list for the tests
and for benchmarks/startup.py, which measures what importing costs."""

from collections.abc import Mapping

_LOGIN = "a login node waits for it, and `--help` needs none of it"
_ELSEWHERE = "no process of a plain run uses it; whoever does imports it where it is used"
_REPORT = "the table at a run's end would wait for it, and every rank would hold it"
_BACKEND = "seconds, for the recipes with that backend"
_MODEL = "two seconds: what is wrong with a start is said before, and the agent builds no model"
_OPTIMIZERS = "a second, for four optimizers"

_NOWHERE = {
    "matplotlib": _REPORT,
    "jinja2": _REPORT,
    "sklearn": _ELSEWHERE,
    "scipy": _ELSEWHERE,
    "pandas": _ELSEWHERE,
    "optuna": _ELSEWHERE,
    "cmaes": _ELSEWHERE,
    "datasets": _ELSEWHERE,
    "transformers": _ELSEWHERE,
    "networkx": _ELSEWHERE,
    "tensorboard": _ELSEWHERE,
    "plotext": _ELSEWHERE,
    "onnx": _ELSEWHERE,
    "onnxruntime": _ELSEWHERE,
    "onnxscript": _ELSEWHERE,
    "torch_pruning": _ELSEWHERE,
    "kornia": "jitter alone is computed by it",
    "webdataset": "streams alone read by it",
    "fsspec": "remote shards alone are read by it",
    "s3fs": "remote shards alone are read by it",
    "deepspeed": _BACKEND,
    "pytorch_optimizer": _OPTIMIZERS,
}
_BEFORE_A_MODEL = {
    "timm": _MODEL,
    "torchvision": _MODEL,
    "torch._dynamo": _MODEL,
    "torch._inductor": _MODEL,
    "torch.distributed.fsdp": _MODEL,
    "torch.distributed.tensor": _MODEL,
    "torch.onnx": _MODEL,
    "sympy": _MODEL,
    "triton": _MODEL,
    "huggingface_hub": _MODEL,
    "wandb": "0.4 s, on rank 0 alone and on a thread of its own",
    "pyarrow": "what is wrong with a start is said before",
    "PIL": "what is wrong with a start is said before",
}
# Of each module that a process is started as, or that it imports at once: what is not loaded then.
# In an order in which each may be imported after the ones before.
DENIED: dict[str, Mapping[str, str]] = {
    "bigbatch.launcher.cli.main": dict.fromkeys(
        ("torch", "numpy", "pydantic", "yaml", "rich", "pyarrow", "psutil", "matplotlib"), _LOGIN
    ),
    "bigbatch.trainers.agent": {
        **_NOWHERE,
        **_BEFORE_A_MODEL,
        "accelerate": "the agent computes nothing",
        "safetensors": "the agent loads nothing",
        "rich": "the agent draws nothing",
    },
    "bigbatch.trainers.worker": {
        **_NOWHERE,
        **_BEFORE_A_MODEL,
        "rich": "rank 0 alone draws, once it has a run",
    },
    "bigbatch.trainers.inference.__main__": _NOWHERE,
    "bigbatch.trainers.replay.__main__": _NOWHERE,
    "bigbatch.trainers.run": _NOWHERE,  # what a rank imports once its engine is open
}
