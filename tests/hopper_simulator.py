"""Runs the source of the Mosaic GPU kernels on a CPU, in numpy, and as badly for them as a GPU may.

Pallas's interpreter does not take kernels that have instructions of their own, as these have in `registers.py`. Here every warpgroup of a
program is a thread that calls the kernel with numbers for its refs; one runs at a time, and an `order` says which, at every wait,
arrival and copy. What a GPU does asynchronously is done as early and as late as it may be, whichever is worse:

- A copy to shared memory leaves NaN there from its start, and arrives when somebody has waited for its barrier.
- A product of the tensor cores, and a copy out of shared memory, reads when it begins and when it is waited for, and must find the same.
- Neither may read what threads have written and not committed, nor threads what is in flight.
- Waiting for ever is an error, as is waiting for a barrier that has moved on by two phases, which looks as if it had not moved, and an
  end of the program with anything in flight.
- What lies beyond an array is 0 to a tile's copy, and an error to a vector's, which the copy engine makes of whatever lies there.

What only the compiled kernel shows is not here: layouts, the rounding of instructions, what ptxas makes of it all.
"""

import collections
import contextlib
import functools
import itertools
import math
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flashcore_jax import logits, masks, online_softmax, rows
from flashcore_jax.kernels.mosaic_gpu import backward, clusters, forward, fragments, registers, schedule, splits
from flashcore_jax.kernels.triton import blocks, decode

SHARED_MEMORY, REGISTERS = 227 * 1024, 65536  # bytes, and numbers of 32 bits, of a multiprocessor


class Hazard(AssertionError):
    """The kernel does what a GPU may punish."""


def _bytes_of(shape, dtype) -> int:
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def _memory(size: int) -> np.ndarray:
    """uint8[2, bytes]: what they hold, at first NaN or -1, and who has written each and not committed it, 1 + the warpgroup."""
    return np.repeat(np.array([[0xFF], [0]], np.uint8), size, axis=1)


class Ref:
    """A part of an array in memory: its numbers and the writers of its bytes; `missing`: how much of each axis lies beyond the array."""

    def __init__(self, data: np.ndarray, writers: np.ndarray, missing: tuple[int, ...] | None = None):
        self.data, self.writers = data, writers
        self.missing = missing or (0,) * data.ndim
        self.shape = tuple(size + more for size, more in zip(data.shape, self.missing, strict=True))
        self.dtype = data.dtype

    @classmethod
    def of(cls, memory: np.ndarray, shape, dtype) -> "Ref":
        data, writers = (part[: _bytes_of(shape, dtype)].reshape(*shape, jnp.dtype(dtype).itemsize) for part in memory)
        return cls(data.view(jnp.dtype(dtype))[..., 0], writers)

    @classmethod
    def new(cls, shape, dtype) -> "Ref":
        return cls.of(_memory(_bytes_of(shape, dtype)), shape, dtype)

    @property
    def at(self):
        return _At(self)

    def __getitem__(self, index):
        return self.at[index].read()[()]

    def __setitem__(self, index, value):
        at = self.at[index]
        if any(at.missing):
            raise Hazard("a write beyond the array")
        at.data[...] = np.asarray(value)
        at.writers[...] = _Warpgroup.here().number + 1

    def read(self) -> np.ndarray:
        if any(self.missing):
            raise Hazard("a read beyond the array")
        return self.data.copy()

    def read_by_engine(self) -> np.ndarray:
        return np.pad(self.data, [(0, more) for more in self.missing])


class _At:
    def __init__(self, ref: Ref):
        self.ref = ref

    def __getitem__(self, index) -> Ref:
        if any(self.ref.missing):
            raise Hazard("a part of what lies beyond the array")
        index = index if isinstance(index, tuple) else (index,)
        if index == (Ellipsis,):
            return self.ref
        found, missing = [], []
        for at, size in itertools.zip_longest(index, self.ref.shape):
            if at is None:
                found.append(slice(None))
                missing.append(0)
            elif isinstance(at, pl.Slice):
                start, stop = int(at.start), int(at.start) + at.size
                if start < 0:
                    raise Hazard(f"begins {-start} before the array")
                found.append(slice(start, stop))
                missing.append(min(max(stop - size, 0), at.size))
            else:
                if not 0 <= int(at) < size:
                    raise Hazard(f"{int(at)} of {size}")
                found.append(int(at))
        found = tuple(found)
        return Ref(self.ref.data[found], self.ref.writers[found], tuple(missing))


def _no_rest(part: Ref):
    """What ends within eight rows of a tile must be all that there is of the array."""
    if part.missing[-2] and part.data.shape[-2] > 8 and part.data.shape[-2] % 8:
        raise Hazard(f"a tile of which the array has {part.data.shape[-2]} rows, no multiple of 8")


class Barrier:
    def __init__(self, arrivals: int):
        self.needed, self.arrived, self.phase = arrivals, 0, 0
        self.waited = collections.Counter()  # for how many phases each warpgroup has waited
        self.landing = []  # copies that have begun: their phase, and what writes them

    def arrive(self):
        self.arrived += 1
        if self.arrived == self.needed:
            self.arrived, self.phase = 0, self.phase + 1

    def land(self):
        """Ends the copies of the phases that are over."""
        while self.landing and self.landing[0][0] < self.phase:
            self.landing.pop(0)[1]()


class Barriers:
    def __init__(self, spec):
        self.all = [Barrier(spec.num_arrivals) for _ in range(math.prod(spec.num_barriers))]
        self.at = self

    def __getitem__(self, i) -> Barrier:
        return self.all[int(i)]


class _InFlight:
    """Something that runs asynchronously, and reads `refs` all the time."""

    def __init__(self, refs, finish):
        self.refs, self.finish, self.done = refs, finish, False
        if any(ref.writers.any() for ref in refs):
            raise Hazard("what reads this has not been told, by commit_smem, that it was written")
        self.seen = [ref.read_by_engine() for ref in refs]

    def end(self):
        now = [ref.read_by_engine() for ref in self.refs]
        if not all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(self.seen, now, strict=True)):
            raise Hazard("what is being read asynchronously was overwritten")
        self.value, self.done = self.finish(*now), True


class _Warpgroup(threading.Thread):
    """A thread, which runs only while it has the turn."""

    def __init__(self, number: int, member: "_Member", program: "_Program", run):
        super().__init__(daemon=True)
        self.number, self.member, self.program, self.run_kernel = number, member, program, run
        self.turn, self.waits_for, self.over, self.error = threading.Event(), None, False, None
        self.products, self.copies = [], []  # in flight
        self.registers = 0

    @staticmethod
    def here() -> "_Warpgroup":
        return threading.current_thread()

    def run(self):
        try:
            self.turn.wait()
            with np.errstate(all="ignore"):
                self.run_kernel()
            if self.products or self.copies:
                raise Hazard("the program ends with something in flight")
        except BaseException as error:
            self.error = self.error or error
        self.over = True
        self.program.next_turn()

    def give_way(self):
        self.turn.clear()
        self.program.next_turn()
        self.turn.wait()
        if self.program.failed:
            raise SystemExit

    def wait(self, in_flight: list, leave: int):
        while len(in_flight) > leave:
            in_flight.pop(0).end()


def _scratch_of(specs):
    """(what the kernel gets, the memories of it)"""
    refs, memories = [], []
    for spec in specs:
        if isinstance(spec, plgpu.Barrier):
            refs.append(Barriers(spec) if spec.num_barriers else Barrier(spec.num_arrivals))
            continue
        parts = spec.refs if isinstance(spec, plgpu.RefUnion) else [spec]
        memories.append(_memory(max(_bytes_of(part.shape, part.dtype) for part in parts)))
        of_parts = [Ref.of(memories[-1], part.shape, part.dtype) for part in parts]
        refs.append(of_parts if isinstance(spec, plgpu.RefUnion) else of_parts[0])
    return refs, memories


class _Member:
    """Of a cluster; a program that is in none is its own."""

    def __init__(self, number: int, program: "_Program", kernel, warpgroups: int, operands, scratch):
        self.number = number
        self.refs, self.memories = _scratch_of(scratch)
        if sum(memory.shape[1] for memory in self.memories) > SHARED_MEMORY:
            raise Hazard("more shared memory than there is")
        self.threads = [_Warpgroup(i, self, program, lambda: kernel(*operands, *self.refs)) for i in range(warpgroups)]


class _Program:
    def __init__(self, kernel, number: int, warpgroups: int, operands, scratch, order, members: int):
        self.number, self.order, self.failed = number, order, False
        self.ended = threading.Event()
        self.members = [_Member(i, self, kernel, warpgroups, operands, scratch) for i in range(members)]
        self.threads = [thread for member in self.members for thread in member.threads]
        barriers = [x for member in self.members for x in member.refs if isinstance(x, (Barrier, Barriers))]
        self.barriers = [one for x in barriers for one in (x.all if isinstance(x, Barriers) else [x])]
        self.met, self.meetings, self.on_their_way = 0, 0, []

    def run(self):
        for thread in self.threads:
            thread.start()
        self.next_turn()
        self.ended.wait()
        for thread in self.threads:
            if thread.error is not None and not isinstance(thread.error, SystemExit):
                raise thread.error
        if any(barrier.landing or barrier.arrived for barrier in self.barriers):
            raise Hazard("the program ends with a copy that nobody waited for")
        if self.on_their_way:
            raise Hazard("the program ends with something written to another's memory, and not met")
        held = [thread.registers for thread in self.members[0].threads]
        if sum(held) * registers.THREADS > REGISTERS:
            raise Hazard(f"{held} registers a thread are more than there are")

    def next_turn(self):
        if any(thread.error for thread in self.threads):
            self.failed = True
        living = [thread for thread in self.threads if not thread.over]
        ready = [thread for thread in living if self.failed or thread.waits_for is None or thread.waits_for()]
        if ready:
            (ready[0] if self.failed else self.order(ready)).turn.set()
        elif living:
            self.failed = True
            living[0].error = Hazard(f"warpgroups {[thread.number for thread in living]} wait for ever")
            living[0].turn.set()
        else:
            self.ended.set()


def _at_random():
    rng = np.random.default_rng(0)
    return lambda ready: ready[rng.integers(len(ready))]


# Which of the warpgroups that can go on does, the fetching one being the last: as far ahead as it may be, as late, or neither.
ORDERS = {"fetching first": lambda: lambda ready: ready[-1], "fetching last": lambda: lambda ready: ready[0], "at random": _at_random}


def _barrier_arrive(barrier: Barrier):
    barrier.arrive()
    _Warpgroup.here().give_way()


def _barrier_wait(barrier: Barrier):
    me = _Warpgroup.here()
    phase = barrier.waited[me.number]
    barrier.waited[me.number] += 1
    me.waits_for = lambda: barrier.phase > phase
    me.give_way()
    me.waits_for = None
    if barrier.phase > phase + 1:
        raise Hazard("the barrier has moved on by two phases")
    barrier.land()


def _copy_gmem_to_smem(source: Ref, target: Ref, barrier: Barrier):
    if source.shape != target.shape:
        raise Hazard(f"{source.shape} to {target.shape}")
    if len(target.shape) == 1 and any(source.missing):
        raise Hazard("a vector beyond the array")
    if len(target.shape) > 1:
        _no_rest(source)
    barrier.land()
    numbers = source.read_by_engine()
    target.data[...] = np.nan

    def write():
        target.data[...] = numbers
        target.writers[...] = 0

    barrier.landing.append((barrier.phase, write))
    barrier.arrive()
    _Warpgroup.here().give_way()


def _copy_smem_to_gmem(source: Ref, target: Ref):
    if source.shape != target.shape:
        raise Hazard(f"{source.shape} to {target.shape}")
    if len(source.shape) == 1 and any(target.missing):
        raise Hazard("a vector beyond the array")
    if len(source.shape) > 1:
        _no_rest(target)

    def write(numbers):
        target.data[...] = numbers[tuple(slice(size) for size in target.data.shape)]

    me = _Warpgroup.here()
    me.copies.append(_InFlight([source], write))
    me.give_way()


def _wait_smem_to_gmem(n: int, wait_read_only: bool = False):
    me = _Warpgroup.here()
    me.wait(me.copies, n)


def _commit_smem():
    me = _Warpgroup.here()
    for _, writers in me.member.memories:
        writers[writers == me.number + 1] = 0


def _set_max_registers(n: int, *, action: str):
    del action
    _Warpgroup.here().registers = n


def _product(a, b):
    return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.float32)  # with no order of additions to speak of


class _Accumulator:
    def __init__(self):
        self.value, self.last = None, None

    def __setitem__(self, index, value):
        if self.last is not None and not self.last.done:
            raise Hazard("an accumulator is written while a product is added to it")
        self.value = value


def _wgmma(acc: _Accumulator, a, b: Ref):
    def add(*operands):
        acc.value = acc.value + _product(*(operands if isinstance(a, Ref) else (a, *operands)))

    acc.last = _InFlight([x for x in (a, b) if isinstance(x, Ref)], add)
    _Warpgroup.here().products.append(acc.last)


def _wgmma_accumulator_load(acc: _Accumulator, wait_n: int):
    _Warpgroup.here().wait(_Warpgroup.here().products, wait_n)
    if not acc.last.done:
        raise Hazard("an accumulator is read while a product is added to it")
    return acc.value


def _run_scoped(run, *specs):
    return run(*(_Accumulator() for _ in specs))


def _inner_products(left: Ref, right: Ref):
    product = _InFlight([left, right], lambda a, b: _product(a, b.T))
    _Warpgroup.here().products.append(product)
    return product


def _finished(product: _InFlight, wait_n: int):
    _Warpgroup.here().wait(_Warpgroup.here().products, wait_n)
    if not product.done:
        raise Hazard("a product is read before it is done")
    return product.value


def _update(scores, running_max, row_sum, log2_scale: float, dtype, real_rows: int = schedule.ROWS):
    if real_rows <= 8:  # of a warp's 16 rows the second eight lie beside them, in the same threads
        scores = np.where(np.arange(len(scores))[:, None] % 16 < 8, scores, np.nan)
    row_sum = np.zeros((*row_sum.shape, 2, 2), np.float32) if row_sum.ndim == 1 else row_sum  # of nothing yet: in four parts from here on
    weights = []
    before = online_softmax.Partial((), row_sum, running_max)
    after = online_softmax.update(before, scores, log2_scale, lambda p: weights.append(p) or ())
    return weights[0].astype(dtype), after.running_max, after.row_sum, np.exp2(running_max - after.running_max)


def _quad_sum(row_sum):
    return online_softmax.close(online_softmax.Partial((), row_sum, None)).row_sum if row_sum.ndim == 3 else row_sum


def _parked(ref: Ref, tile):
    return ref[...].reshape(tile.shape)


def _park(ref: Ref, tile):
    ref[...] = tile.reshape(-1)


def _plus_parked(ref, tile, of_parked, of_tile):
    return _parked(ref, tile) * of_parked[:, None] + tile * of_tile[:, None]


def _clear_rows(ref: Ref, first, stop):
    for row in range(ref.shape[0]):
        if not first <= row < stop:
            ref.at[row][...] = 0


def _over_columns(row, columns: int):
    return np.broadcast_to(row[:, None], (len(row), columns))


def _by_length(lengths_ref: Ref, order_ref: Ref, place: int):
    order_ref[...] = np.argsort(-lengths_ref[...], kind="stable")[place]
    return order_ref[...][0]


def _meet():
    me, program = _Warpgroup.here(), _Warpgroup.here().program
    meeting, program.met = program.meetings, program.met + 1
    if program.met == len(program.threads):
        for write in program.on_their_way:
            write()
        program.met, program.meetings, program.on_their_way = 0, meeting + 1, []
    me.waits_for = lambda: program.meetings > meeting
    me.give_way()
    me.waits_for = None


def _tell(ref: Ref, index, numbers):
    """Writes to the same place of every member's memory, where they are when all have met, and NaN until then."""
    me = _Warpgroup.here()
    at = next(i for i, own in enumerate(me.member.refs) if own is ref)
    for member in me.program.members:
        data = member.refs[at].data[index]
        data[...] = np.nan
        me.program.on_their_way.append(functools.partial(np.copyto, data, numbers))


def _keep(scores_ref: Ref, highest_ref: Ref, scores, own: int, block: int, log2_scale: float, rows: int, programs: int):
    size = fragments.size_of_scores(rows)
    scores_ref[pl.ds(own * size, size)] = scores[:rows].reshape(-1)
    _tell(highest_ref, (slice(None), block), online_softmax.highest_of(scores[:rows], log2_scale))


def _weigh(
    scores_ref, highest_ref, weights_ref, warpgroup, warpgroups: int, member, start, stop, log2_scale: float, dtype, rows: int, programs: int
):  # fmt: skip
    blocks, size = (highest_ref.shape[1] - fragments.PAD) // programs, fragments.size_of_weights(rows)
    for own in range(blocks):
        block = member * blocks + own
        if start <= block < stop and own // 4 % warpgroups == warpgroup:
            scores = scores_ref[pl.ds(own * fragments.size_of_scores(rows), fragments.size_of_scores(rows))].reshape(rows, -1)
            so_far = np.zeros((rows, 2, 2), np.float32), _highest(highest_ref, start, block, rows)[:rows]
            probabilities, _, row_sum, rescale = _update(scores, so_far[1], so_far[0], log2_scale, dtype)
            words = probabilities.reshape(-1).view(np.float32), row_sum.reshape(-1), np.repeat(rescale, 4)
            _tell(weights_ref, slice(block * size, (block + 1) * size), np.concatenate(words))


def _add(acc, row_sum, weights_ref: Ref, values_ref: Ref, first: int, dtype, rows: int):
    acc, size, width = acc.copy(), fragments.size_of_weights(rows), acc.shape[1]
    row_sum = np.zeros((*row_sum.shape, 2, 2), np.float32) if row_sum.ndim == 1 else row_sum.copy()
    values = values_ref[...]
    for i in range(len(values) // schedule.BLOCK):
        words = weights_ref[pl.ds((first + i) * size, size)]
        probabilities, added, rescale = np.split(words, [rows * schedule.BLOCK // 2, rows * (schedule.BLOCK // 2 + 4)])
        probabilities, rescale = probabilities.view(dtype).reshape(rows, -1), rescale[::4]
        product = _product(probabilities, values[i * schedule.BLOCK : (i + 1) * schedule.BLOCK])
        for warp, own in enumerate(_of_warps(rows)):
            start = warp * width % product.shape[1]
            acc[own] = acc[own] * rescale[:, None] + product[:, start : start + width]
            row_sum[own] = row_sum[own] * rescale[:, None, None] + added.reshape(rows, 2, 2)
    return acc, row_sum


def _put(ref: Ref, acc, rows: int):
    for warp, own in enumerate(_of_warps(rows)):
        ref[pl.ds(0, rows), pl.ds(warp * acc.shape[1] % ref.shape[1], acc.shape[1])] = acc[own].astype(ref.dtype)


def _highest(highest_ref: Ref, start, stop, rows: int):
    found = np.full(schedule.ROWS, online_softmax.LOWEST, np.float32)
    for own in _of_warps(rows):
        found[own] = np.max(highest_ref[...][:, start:stop], axis=1, initial=online_softmax.LOWEST)
    return found


def _of_warps(rows: int):
    """The real rows of each warp's part of a tile."""
    return [slice(first, first + rows) for first in range(0, schedule.ROWS, 16)]


_INSTRUCTIONS = {
    fragments: dict(meet=_meet, keep=_keep, weigh=_weigh, add=_add, put=_put, highest=_highest),
    registers: dict(
        over_columns=_over_columns,
        uniform=lambda x: x,
        by_length=_by_length,
        update=_update,
        rescale=lambda old, new: np.exp2(old - new),
        quad_sum=_quad_sum,
        scaled_exp2=lambda scores, shift, log2_scale: online_softmax.scaled_exp2(scores, log2_scale, shift),
        tanh=np.tanh,
        inner_products=_inner_products,
        finished=_finished,
        in_use=lambda x: None,
        park=_park,
        add_to_parked=lambda ref, *arguments: _park(ref, _plus_parked(ref, *arguments)),
        plus_parked=_plus_parked,
        times_parked=lambda ref, tile: _parked(ref, tile) * tile,
        clear_rows=_clear_rows,
    ),
    plgpu: dict(
        barrier_arrive=_barrier_arrive,
        barrier_wait=_barrier_wait,
        broadcasted_iota=lambda dtype, shape, dimension, *, layout: np.broadcast_to(
            np.expand_dims(np.arange(shape[dimension], dtype=dtype), [i for i in range(len(shape)) if i != dimension]), shape
        ),
        commit_smem=_commit_smem,
        copy_gmem_to_smem=_copy_gmem_to_smem,
        copy_smem_to_gmem=_copy_smem_to_gmem,
        layout_cast=lambda x, layout: x,
        load=lambda ref, *, layout, optimized: ref[...],
        set_max_registers=_set_max_registers,
        wait_smem_to_gmem=_wait_smem_to_gmem,
        wgmma=_wgmma,
        wgmma_accumulator_load=_wgmma_accumulator_load,
    ),
    forward: dict(over_columns=_over_columns),
    clusters: dict(over_columns=_over_columns),
    splits: dict(over_columns=_over_columns),
    pl: dict(run_scoped=_run_scoped, when=lambda condition: lambda run: run() if condition else None),
}


class _Numpy:
    """`jax.numpy` at once, by numpy: a hundred times faster than jax.numpy where nothing is jitted."""

    dtype = staticmethod(jnp.dtype)

    def __getattr__(self, name):
        return getattr(np, name)


class _Lax:
    """What the kernels use of `jax.lax`, at once."""

    div, rem = staticmethod(np.floor_divide), staticmethod(np.remainder)  # of numbers that are not below 0

    @staticmethod
    def axis_index(name: str):
        me = _Warpgroup.here()
        return np.int32({"program": me.program.number, "member": me.member.number, "warpgroup": me.number}[name])

    @staticmethod
    def broadcast_in_dim(x, shape, axes):
        return np.broadcast_to(x[:, None] if axes == (0,) else x, shape)

    @staticmethod
    def cond(condition, yes, no):
        return yes() if condition else no()

    @staticmethod
    def fori_loop(start, stop, run, carry):
        for i in range(start, stop):
            carry = run(np.int32(i), carry)
        return carry

    @staticmethod
    def slice(x, start, stop):
        return x[tuple(map(slice, start, stop))]


def _launch(order, kernel, *operands, name: str, programs: int, warpgroups: int, out_type, scratch, cluster: int = 1):
    inputs = []
    for x in operands:
        inputs.append(Ref.new(x.shape, x.dtype))
        inputs[-1].data[...] = np.asarray(x)
    outputs = [Ref.new(x.shape, x.dtype) for x in out_type]
    with _by_numpy():
        for number in range(programs):
            _Program(kernel, number, warpgroups, [*inputs, *outputs], scratch, order, cluster).run()
    return tuple(jnp.asarray(x.data) for x in outputs)


_MODULES = (backward, blocks, clusters, decode, forward, logits, masks, online_softmax, registers, rows, schedule, splits)


def install(monkeypatch, order):
    """From here on `forward.forward`, `backward.backward`, `clusters.decode` and `splits.decode` of the Mosaic GPU kernels run here, in an order of `ORDERS`."""
    for module, replaced in _INSTRUCTIONS.items():
        for name, instead in replaced.items():
            monkeypatch.setattr(module, name, instead)
    for module in (forward, backward, clusters, splits):
        monkeypatch.setattr(module, "launch", functools.partial(_launch, order))


@contextlib.contextmanager
def _by_numpy():
    """What the kernels' modules call `jnp` and `lax` is numpy."""
    with pytest.MonkeyPatch.context() as patch:
        for module, (name, instead) in itertools.product(_MODULES, (("jnp", _Numpy()), ("lax", _Lax()))):
            patch.setattr(module, name, instead, raising=False)
        yield
