"""Sums neighbouring values of a line by in-register permutations, on processors with AVX2.

A compiler loads the neighbours of each output one by one, which takes longer than all other arithmetic of a series. The
neighbours of eight outputs in a row lie within one or two vectors, from which one instruction picks eight at a time.
The products and sums are those of the loop over single outputs, so results are the same bit by bit.

References
----------
Intel Intrinsics Guide, ``_mm256_permutevar8x32_ps`` (VPERMPS).
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from gpuprep.compute.resample_taps import LANES

PERMUTES = bool(binding.get_host_cpu_features().get("avx2")) and binding.get_process_triple().startswith("x86_64")
"""Whether this processor has the instruction."""

_FLOATS, _INTEGERS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)


def _picked(builder: ir.IRBuilder, vectors: list[Any], index: Any) -> Any:
    """Return the values at eight indices of one or two vectors in a row."""
    name = "llvm.x86.avx2.permps"
    permute = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(_FLOATS, [_FLOATS, _INTEGERS]), name
    )
    values = [builder.call(permute, [vector, index]) for vector in vectors]  # by the index modulo 8
    if len(values) == 1:
        return values[0]
    return builder.select(builder.icmp_signed("<", index, ir.Constant(_INTEGERS, [LANES] * LANES)), *values)


def _eight_sums(taps: int, vectors: int) -> Any:
    """Return an intrinsic that writes eight outputs in a row, with `taps` weights each."""

    @intrinsic
    def write(typingctx: Any, line: Any, base: Any, start: Any, weights: Any, out: Any, x: Any) -> Any:  # noqa: ARG001
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            line_, base_, start_, weights_, out_, x_ = args

            def address(array: Any, kind: Any, *index: Any) -> Any:
                made = context.make_array(kind)(context, builder, array)
                if len(index) == 1:
                    return builder.gep(made.data, index)
                columns = builder.extract_value(made.shape, 1)
                return builder.gep(made.data, [builder.add(builder.mul(index[0], columns), index[1])])

            def load(pointer: Any, kind: Any) -> Any:
                return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=4)

            def number(value: int) -> Any:
                return ir.Constant(ir.IntType(64), value)

            kinds = signature.args
            assert all(k.layout == "C" for k in kinds if isinstance(k, types.Array))  # noqa: S101 - adjacent values
            loaded = [
                load(address(line_, kinds[0], builder.add(base_, number(n * LANES))), _FLOATS) for n in range(vectors)
            ]
            first = builder.trunc(base_, ir.IntType(32))
            firsts = ir.Constant(_INTEGERS, ir.Undefined)
            for lane in range(LANES):
                firsts = builder.insert_element(firsts, first, ir.Constant(ir.IntType(32), lane))
            index = builder.sub(load(address(start_, kinds[2], x_), _INTEGERS), firsts)
            total = None
            for tap in range(taps):
                weight = load(address(weights_, kinds[3], number(tap), x_), _FLOATS)
                value = _picked(builder, loaded, builder.add(index, ir.Constant(_INTEGERS, [tap] * LANES)))
                product = builder.fmul(weight, value, flags=("contract",))
                total = product if total is None else builder.fadd(total, product, flags=("contract",))
            pointer = builder.bitcast(address(out_, kinds[4], x_), _FLOATS.as_pointer())
            builder.store(total, pointer, align=4)
            return context.get_dummy_value()

        return types.void(line, types.int64, start, weights, out, types.int64), generate

    return write


two_of_one, two_of_two = _eight_sums(2, 1), _eight_sums(2, 2)
four_of_one, four_of_two = _eight_sums(4, 1), _eight_sums(4, 2)
