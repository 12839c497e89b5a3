"""FLOPs of one op: matmuls as dots, as a TPU's convolutions, and inside kernels."""

import functools
import math
import re

import numpy as np

from instructjax.preflight.hlo import Buffer, Computation, Op


def flops(where: Computation, op: Op) -> float | None:
    """FLOPs of an op of that computation: 0 if it is no matmul, None if a kernel's are unknown.

    A Pallas kernel's FLOPs are read from its `cost_estimate`. Of kernels without an estimate only
    the compiler's own softmax is known.
    """
    if op.opcode == "dot":
        return _dot(where, op)
    if op.opcode == "convolution":
        return _convolution(where, op)
    if op.opcode == "custom-call" and op.attribute("custom_call_target") == "tpu_custom_call":
        return _kernel(where, op)
    return 0


def _dot(where: Computation, op: Op) -> float:
    left = where.ops[op.operands[0]].result[0]
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
    summed = [left.dims[int(i)] for i in match.group(1).split(",") if i] if match else []
    return 2 * math.prod(op.result[0].dims) * math.prod(summed)


def _convolution(where: Computation, op: Op) -> float:
    """XLA's own count: without products that involve padding or holes."""
    left, right = (where.ops[name].result[0] for name in op.operands)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {op.name}")
    left_axes, right_axes, result_axes = labels.groups()
    match = re.search(r"window=\{([^}]*)\}", op.attributes)
    window = dict(part.split("=") for part in match.group(1).split()) if match else {}
    products = 1
    for axis in filter(str.isdigit, left_axes):

        def dim(key: str, default: str, axis=int(axis)) -> str:
            return window[key].split("x")[axis] if key in window else default

        products *= _positions(
            _size(left, left_axes, axis),
            _size(right, right_axes, axis),
            _size(op.result[0], result_axes, axis),
            stride=int(dim("stride", "1")),
            pad=int(dim("pad", "0_0").split("_")[0]),
            lhs_dilate=int(dim("lhs_dilate", "1")),
            rhs_dilate=int(dim("rhs_dilate", "1")),
        )
    batch = _size(left, left_axes, "b") // int(op.attribute("batch_group_count") or 1)
    features = _size(left, left_axes, "f") // int(op.attribute("feature_group_count") or 1)
    return 2 * products * batch * features * _size(op.result[0], result_axes, "f")


def _size(buffer: Buffer, labels: str, axis: str) -> int:
    return buffer.dims[labels.index(axis)]


@functools.cache
def _positions(
    size: int, kernel: int, result: int, *, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs of a result and a kernel position that read an element, not padding or a hole."""
    at = np.arange(result)[:, None] * stride + np.arange(kernel)[None] * rhs_dilate - pad
    is_element = (at >= 0) & (at % lhs_dilate == 0) & (at // lhs_dilate < size)
    return int(is_element.sum())


def _kernel(where: Computation, op: Op) -> float | None:
    if stated := re.search(r'"cost_estimate":\{"flops":"?(\d+)', op.attributes):
        return float(stated.group(1))
    arrays = [where.ops[name].result[0] for name in op.operands]
    if "online-softmax" in op.where:  # the compiler's own: softmax(scores) @ values
        scores, values = arrays
        return 2 * math.prod(scores.dims) * values.dims[-1]
    return None
