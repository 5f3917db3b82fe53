"""What libraries read from the environment that decides what a step computes. Free of torch.

The recipe alone says what is computed. So each such variable is one of:

- pinned: the engine gives the library an explicit value, and the variable decides nothing;
- refused: it asks for what no recipe says, and cannot be overruled;
- recorded: it chooses among ways that differ by rounding (threads, instruction sets, the order
  of sums); it stands in the start event, and is said once.

Sources, read as installed: accelerate 1.15 (its accelerator, state and utils.dataclasses),
timm 1.0.31 (its layers.config and models), oneDNN's "Primitive Attributes: floating-point math
mode" and "CPU Dispatcher Control", PyTorch's "Numerical accuracy", NCCL's "Environment
Variables".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bigbatch.configs.errors import UserError

_OFF = frozenset({"n", "no", "f", "false", "off", "0"})  # as accelerate reads them
_ON = frozenset({"y", "yes", "t", "true", "on", "1"})


@dataclass(frozen=True)
class Variable:
    """What is done with variables that share an effect, and the values that ask for nothing."""

    names: tuple[str, ...]
    done: Literal["pinned", "refused", "recorded"]
    effect: str
    harmless: frozenset[str] = frozenset()  # in any case where written in lower case
    remedy: str = "unset it; the recipe says what is computed"
    quiet: bool = False  # recorded, but a start says it already

    def find(self, env: Mapping[str, str]) -> dict[str, str]:
        """Those of the variables that are set, to a value that asks for something."""
        found = {name: env[name] for name in self.names if name in env}
        return {n: v for n, v in found.items() if not {v, v.lower()} & self.harmless}


TABLE: tuple[Variable, ...] = (
    Variable(
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS",),
        "pinned",
        "accelerate divides every gradient by it",
    ),
    Variable(
        ("ACCELERATE_MIXED_PRECISION",), "pinned", "accelerate's precision; the recipe has its own"
    ),
    Variable(
        (
            *("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"),
            *("ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_DYNAMO_USE_DYNAMIC"),
            "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
        ),
        "pinned",
        "accelerate compiles the model, and turns TF32 on",
    ),
    Variable(
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",), "pinned", "torch multiplies float32 matrices in TF32"
    ),
    Variable(("TIMM_FUSED_ATTN",), "pinned", "timm computes attention another way"),
    Variable(
        ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"),
        "refused",
        "accelerate would shard the model and step in its own way",
        _OFF,
        "drop the option of `accelerate launch` or the line of its default_config.yaml that sets "
        "it, or unset it; backend=zero1, zero2 or fsdp2 shards here",
    ),
    Variable(
        (
            *("ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"),
            "ACCELERATE_USE_SAGEMAKER",
        ),
        "refused",
        "accelerate would split the model in a way that no recipe describes",
        _OFF,
        "drop the option of `accelerate launch` or the line of its default_config.yaml that sets "
        "it, or unset it",
    ),
    Variable(
        ("ACCELERATE_TORCH_DEVICE",),
        "refused",
        "accelerate would put every rank on that device",
        remedy="unset it; CUDA_VISIBLE_DEVICES says which GPUs there are, and empty means the CPU",
    ),
    Variable(
        (
            *("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY"),
            "FORK_LAUNCHED",
        ),
        "refused",
        "accelerate takes it for neither yes nor no",
        _OFF | _ON,
        "set it to true or false, or unset it",
    ),
    Variable(
        ("ACCELERATE_FP8_BACKEND",),
        "refused",
        "accelerate would prepare for fp8",
        frozenset({"NO"}),  # it refuses "no"
        "unset it; precision in the recipe is fp32, bf16 or fp16",
    ),
    Variable(
        (*("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),),
        "refused",
        "oneDNN computes float32 layers in a narrower type where the CPU has it",
        frozenset({"strict"}),
        "unset it; precision=bf16 says so in the recipe",
    ),
    Variable(
        ("TIMM_FUSED_ATTN",),
        "refused",
        "timm takes it for no number",
        frozenset({"0", "1", "2"}),
        "unset it",
    ),
    Variable(
        ("TIMM_USE_NAFLEXVIT", "TIMM_USE_NAFLEX", "TIMM_USE_SCIPY_INTERP"),
        "refused",
        "timm builds another model under the same name",
        frozenset({"0", "false"}),
        "unset it; model.options says what differs from the model's defaults",
    ),
    Variable(
        ("FORK_LAST3",),
        "refused",
        "timm builds another FastViT under the same name",
        frozenset({""}),
        "unset it; model.options says what differs from the model's defaults",
    ),
    Variable(("ACCELERATE_USE_CPU",), "recorded", "the run is computed on the CPU", _OFF),
    Variable(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS"),
        "recorded",
        "the number of threads decides the order of some sums",
        quiet=True,
    ),
    Variable(
        (
            *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"),
            *("ONEDNN_CPU_ISA_HINTS", "DNNL_CPU_ISA_HINTS", "MKL_CBWR"),
            "MKL_ENABLE_INSTRUCTIONS",
        ),
        "recorded",
        "it chooses the CPU's instructions, and with them how sums are rounded",
    ),
    Variable(
        (
            *("OMP_DYNAMIC", "OMP_SCHEDULE", "OMP_THREAD_LIMIT", "MKL_DYNAMIC"),
            *("KMP_DETERMINISTIC_REDUCTION", "KMP_FORCE_REDUCTION"),
        ),
        "recorded",
        "it decides how threads share sums",
    ),
    Variable(
        (
            *("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE"),
            *("TORCH_BLAS_PREFER_CUBLASLT", "DISABLE_ADDMM_CUDA_LT", "PYTORCH_TUNABLEOP_ENABLED"),
        ),
        "recorded",
        "it chooses NVIDIA's kernels and their precision, over what torch asks for",
    ),
    Variable(
        (
            *("NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE"),
            *("NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_NTHREADS", "NCCL_CONF_FILE"),
        ),
        "recorded",
        "it decides in which order NCCL adds up gradients",
    ),
    Variable(
        (
            *("TORCHINDUCTOR_MAX_AUTOTUNE", "TORCHINDUCTOR_MAX_AUTOTUNE_GEMM"),
            *("TORCHINDUCTOR_MAX_AUTOTUNE_POINTWISE", "TORCHINDUCTOR_NUMERICS"),
            *("TORCHINDUCTOR_COORDINATE_DESCENT_TUNING", "TORCHINDUCTOR_USE_FAST_MATH"),
            *("TORCHINDUCTOR_EMULATE_PRECISION_CASTS", "TORCHINDUCTOR_CPP_MARCH"),
            "TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG",
        ),
        "recorded",
        "it chooses what model.compile makes of a network, and with it how sums are rounded",
        frozenset({"0"}),
    ),
    Variable(
        ("TRITON_INTERPRET",), "recorded", "LARS and LAMB are interpreted, not compiled", _OFF
    ),
    Variable(
        ("DS_ACCELERATOR",),
        "refused",
        "DeepSpeed would compute on such a device",
        frozenset({"cpu", "cuda"}),  # the engine compares it with its own
        "unset it; DeepSpeed finds the device by itself",
    ),
)


def check_environment(env: Mapping[str, str]) -> None:
    """Raise UserError where a variable would change what is computed and cannot be overruled."""
    for row in TABLE:
        if row.done == "refused":
            for name, value in row.find(env).items():
                raise UserError(f"{name}={value} in the environment: {row.effect}; {row.remedy}")


def recorded_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The set variables that a start puts on record, by name."""
    found: dict[str, str] = {}
    for row in TABLE:
        if row.done == "recorded":
            found |= row.find(env)
    return found


def said_variables(env: Mapping[str, str]) -> list[str]:
    """A line for each recorded variable that departs from what runs without it."""
    return [
        f"{name}={value} in the environment: {row.effect}; it is recorded in events.jsonl"
        for row in TABLE
        if row.done == "recorded" and not row.quiet
        for name, value in row.find(env).items()
    ]


def asks_for_cpu(env: Mapping[str, str]) -> bool:
    """Whether `accelerate launch --cpu` started this process."""
    return env.get("ACCELERATE_USE_CPU", "").lower() in _ON
