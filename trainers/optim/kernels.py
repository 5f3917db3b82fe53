"""The Triton kernels of LARS and LAMB; `gpu` launches them.

A program handles one chunk of one layer. It finds its layer in a table of chunks, int64
[chunks, 2] of layer and number within the layer, and the layer's memory in a table of
addresses, int64 [roles, layers]. Both live on the GPU, so that a captured step reads nothing
from the host.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _load(address, kind: tl.constexpr, start, left, FAST: tl.constexpr, CHUNK: tl.constexpr):
    """A chunk in float32. FAST: it is whole, and may be read 16 bytes at a time."""
    pointer = address.to(tl.pointer_type(kind)) + start
    at = tl.arange(0, CHUNK)
    if FAST:
        return tl.load(tl.multiple_of(pointer, 16) + at).to(tl.float32)
    else:
        return tl.load(pointer + at, mask=at < left, other=0.0).to(tl.float32)


@triton.jit
def _store(
    values, address, kind: tl.constexpr, start, left, FAST: tl.constexpr, CHUNK: tl.constexpr
):
    pointer = address.to(tl.pointer_type(kind)) + start
    at = tl.arange(0, CHUNK)
    if FAST:
        tl.store(tl.multiple_of(pointer, 16) + at, values.to(kind))
    else:
        tl.store(pointer + at, values.to(kind), mask=at < left)


@triton.jit
def _chunk(number, chunks, sizes, CHUNK: tl.constexpr):
    """The layer of a chunk, where the chunk starts, and how much of the layer is left there."""
    layer = tl.load(chunks + 2 * number)
    start = tl.load(chunks + 2 * number + 1) * CHUNK
    return layer, start, tl.load(sizes + layer) - start


@triton.jit
def _from_the_end():
    """The chunk of a program of an update: the cache still holds what the squares read last."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def layer_sums(partial, first, out, chunks, BLOCK: tl.constexpr):
    layer = tl.program_id(0)
    begin = tl.load(first + layer)
    end = tl.load(first + layer + 1)
    a = tl.zeros([BLOCK], tl.float64)
    b = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a += tl.load(partial + at, mask=at < end, other=0.0).to(tl.float64)
        b += tl.load(partial + chunks + at, mask=at < end, other=0.0).to(tl.float64)
    tl.store(out + 2 * layer, tl.sum(a))
    tl.store(out + 2 * layer + 1, tl.sum(b))


@triton.jit
def lars_squares(
    addresses, chunks, sizes, partial, layers, count, kind: tl.constexpr, CHUNK: tl.constexpr
):
    layer, start, left = _chunk(tl.program_id(0), chunks, sizes, CHUNK)
    w_at = tl.load(addresses + layer)
    g_at = tl.load(addresses + layers + layer)
    sums = partial + tl.program_id(0)
    if (left >= CHUNK) & ((w_at | g_at) % 16 == 0):
        _lars_squares_of(w_at, g_at, sums, count, start, left, kind, True, CHUNK)
    else:
        _lars_squares_of(w_at, g_at, sums, count, start, left, kind, False, CHUNK)


@triton.jit
def _lars_squares_of(
    w_at, g_at, sums, count, start, left,
    kind: tl.constexpr, FAST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    w = _load(w_at, kind, start, left, FAST, CHUNK)
    g = _load(g_at, kind, start, left, FAST, CHUNK)
    tl.store(sums, tl.sum(w * w))
    tl.store(sums + count, tl.sum(g * g))


@triton.jit
def lars_update(
    addresses, chunks, sizes, squares, ratios, lr, momentum, decay, coefficient, eps, layers,
    kind: tl.constexpr, ADAPT: tl.constexpr, INSIDE: tl.constexpr, NESTEROV: tl.constexpr,
    CLIP: tl.constexpr, LR_ON_DEVICE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    layer, start, left = _chunk(_from_the_end(), chunks, sizes, CHUNK)
    if LR_ON_DEVICE:
        rate = tl.load(lr).to(tl.float32)
    else:
        rate = lr
    ratio = 1.0
    if ADAPT:
        w_norm = tl.sqrt(tl.load(squares + 2 * layer)).to(tl.float32)
        g_norm = tl.sqrt(tl.load(squares + 2 * layer + 1)).to(tl.float32)
        if (w_norm > 0) & (g_norm > 0):
            ratio = coefficient * w_norm / (g_norm + decay * w_norm + eps)
            if CLIP:
                ratio = tl.minimum(ratio / rate, 1.0)
    if start == 0:
        tl.store(ratios + layer, ratio)
    if INSIDE:
        inside, outside = ratio * rate, 1.0
    else:
        inside, outside = ratio, rate
    w_at = tl.load(addresses + layer)
    g_at = tl.load(addresses + layers + layer)
    v_at = tl.load(addresses + 2 * layers + layer)
    if (left >= CHUNK) & ((w_at | g_at | v_at) % 16 == 0):
        _lars_update_of(
            w_at, g_at, v_at, inside, outside, momentum, decay, start, left,
            kind, NESTEROV, True, CHUNK,
        )  # fmt: skip
    else:
        _lars_update_of(
            w_at, g_at, v_at, inside, outside, momentum, decay, start, left,
            kind, NESTEROV, False, CHUNK,
        )  # fmt: skip


@triton.jit
def _lars_update_of(
    w_at, g_at, v_at, inside, outside, momentum, decay, start, left,
    kind: tl.constexpr, NESTEROV: tl.constexpr, FAST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    w = _load(w_at, kind, start, left, FAST, CHUNK)
    g = _load(g_at, kind, start, left, FAST, CHUNK)
    v = _load(v_at, tl.float32, start, left, FAST, CHUNK)
    step = inside * (g + decay * w)
    v = momentum * v + step
    _store(v, v_at, tl.float32, start, left, FAST, CHUNK)
    if NESTEROV:
        v = step + momentum * v
    _store(w - outside * v, w_at, kind, start, left, FAST, CHUNK)


@triton.jit
def _lamb_corrections(step_at, log_beta1, log_beta2, CORRECT: tl.constexpr):
    """1 - beta^t of both moments; in float64, for in float32 1 - 0.999 has four digits."""
    if CORRECT:
        t = tl.load(step_at.to(tl.pointer_type(tl.float32))).to(tl.float64)
        first = (1.0 - tl.exp(t * log_beta1)).to(tl.float32)
        second = (1.0 - tl.exp(t * log_beta2)).to(tl.float32)
    else:
        first, second = 1.0, 1.0
    return first, second


@triton.jit
def _lamb_direction(w, m, v, first, second, eps, decay):
    """u of algorithm 2: the corrected moments' quotient and the decay."""
    return (m / first) / (tl.sqrt(v / second) + eps) + decay * w


@triton.jit
def lamb_moments(
    addresses, chunks, sizes, partial, beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps,
    decay, layers, count, kind: tl.constexpr, CORRECT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    layer, start, left = _chunk(tl.program_id(0), chunks, sizes, CHUNK)
    w_at = tl.load(addresses + layer)
    g_at = tl.load(addresses + layers + layer)
    m_at = tl.load(addresses + 2 * layers + layer)
    v_at = tl.load(addresses + 3 * layers + layer)
    step_at = tl.load(addresses + 4 * layers + layer)
    first, second = _lamb_corrections(step_at, log_beta1, log_beta2, CORRECT)
    sums = partial + tl.program_id(0)
    if (left >= CHUNK) & ((w_at | g_at | m_at | v_at) % 16 == 0):
        _lamb_moments_of(
            w_at, g_at, m_at, v_at, sums, count, beta1, beta2, rest1, rest2, first, second, eps,
            decay, start, left, kind, True, CHUNK,
        )  # fmt: skip
    else:
        _lamb_moments_of(
            w_at, g_at, m_at, v_at, sums, count, beta1, beta2, rest1, rest2, first, second, eps,
            decay, start, left, kind, False, CHUNK,
        )  # fmt: skip


@triton.jit
def _lamb_moments_of(
    w_at, g_at, m_at, v_at, sums, count, beta1, beta2, rest1, rest2, first, second, eps, decay,
    start, left, kind: tl.constexpr, FAST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    w = _load(w_at, kind, start, left, FAST, CHUNK)
    g = _load(g_at, kind, start, left, FAST, CHUNK)
    m = beta1 * _load(m_at, tl.float32, start, left, FAST, CHUNK) + rest1 * g
    v = beta2 * _load(v_at, tl.float32, start, left, FAST, CHUNK) + rest2 * g * g
    _store(m, m_at, tl.float32, start, left, FAST, CHUNK)
    _store(v, v_at, tl.float32, start, left, FAST, CHUNK)
    u = _lamb_direction(w, m, v, first, second, eps, decay)
    if not FAST:  # beyond the layer's end 0 was read, and without eps that makes 0 / 0
        u = tl.where(tl.arange(0, CHUNK) < left, u, 0.0)
    tl.store(sums, tl.sum(w * w))
    tl.store(sums + count, tl.sum(u * u))


@triton.jit
def lamb_update(
    addresses, chunks, sizes, squares, ratios, lr, low, high, log_beta1, log_beta2, eps, decay,
    layers, kind: tl.constexpr, CORRECT: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    layer, start, left = _chunk(_from_the_end(), chunks, sizes, CHUNK)
    if LR_ON_DEVICE:
        rate = tl.load(lr).to(tl.float32)
    else:
        rate = lr
    w_norm = tl.sqrt(tl.load(squares + 2 * layer)).to(tl.float32)
    u_norm = tl.sqrt(tl.load(squares + 2 * layer + 1)).to(tl.float32)
    ratio = 1.0
    if (w_norm > 0) & (u_norm > 0):
        ratio = tl.minimum(tl.maximum(w_norm / u_norm, low), high)
    if start == 0:
        tl.store(ratios + layer, ratio)
    w_at = tl.load(addresses + layer)
    m_at = tl.load(addresses + 2 * layers + layer)
    v_at = tl.load(addresses + 3 * layers + layer)
    step_at = tl.load(addresses + 4 * layers + layer)
    first, second = _lamb_corrections(step_at, log_beta1, log_beta2, CORRECT)
    if (left >= CHUNK) & ((w_at | m_at | v_at) % 16 == 0):
        _lamb_update_of(
            w_at, m_at, v_at, rate * ratio, first, second, eps, decay, start, left,
            kind, True, CHUNK,
        )  # fmt: skip
    else:
        _lamb_update_of(
            w_at, m_at, v_at, rate * ratio, first, second, eps, decay, start, left,
            kind, False, CHUNK,
        )  # fmt: skip


@triton.jit
def _lamb_update_of(
    w_at, m_at, v_at, rate, first, second, eps, decay, start, left,
    kind: tl.constexpr, FAST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    w = _load(w_at, kind, start, left, FAST, CHUNK)
    m = _load(m_at, tl.float32, start, left, FAST, CHUNK)
    v = _load(v_at, tl.float32, start, left, FAST, CHUNK)
    u = _lamb_direction(w, m, v, first, second, eps, decay)
    _store(w - rate * u, w_at, kind, start, left, FAST, CHUNK)
