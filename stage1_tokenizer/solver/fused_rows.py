"""Problem (1) and its gradient for many rows on a GPU, in Triton: the kernels that `fused` launches.

Notation and equation numbers are those of docs/quantizer.md; a_k = c_k - c_n is a code relative to the row's nearest
one. A program works on several rows at a time, one in each of its *slots*. The slots go in step: they move their
supports together, and all codes stream past all of them at once. A slot whose row is solved takes the next row of one
queue, so no slot waits for the slowest row. Chance decides which slot a row comes to, but not the row's bits, because
no arithmetic of a row depends on another row.

Registers of a GPU cannot be indexed, so supports, weights and queries lie in memory that belongs to the program, with
neighbouring slots side by side. Threads read there what other threads wrote, hence the barriers.

Prices are computed in the type of ``columns``, everything else in float64. Sizes that a kernel is compiled for: DIM is
F, PADDED the next power of two, SLOTS the rows that a program holds, WORDS how many times 32 codes are priced together,
ROOM the largest support.
"""

import triton
import triton.language as tl


@triton.jit
def nearest_kernel(query, columns, nearest, n, width, DIM: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr):
    """Nearest code of every latent, the first one where several tie.

    Args:
        query: (DIM + 2, programs SLOTS) latents, centred as the codes are, 1 and 0.
        columns: (DIM + 1, width) codes and below them -|c_k|^2 / 2, which is hugely negative for padding.
        nearest: (n,) int64 to write to.
    """
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    stride = tl.num_programs(0) * SLOTS
    best, code = _stream(query + tl.program_id(0) * SLOTS, stride, columns, width, nearest, False, DIM, SLOTS, WORDS)
    _, first = _first_best(best, code, SLOTS)
    tl.store(nearest + slot, first.to(tl.int64), mask=slot < n)


@triton.jit
def solve_kernel(
    z,
    codes,
    reg,
    columns,
    order,
    count,
    queue,
    members,
    shares,
    wanted,
    queries,
    taken,
    support,
    weights,
    nearest,
    residual,
    moves,
    farthest,
    tol,
    max_moves,
    width,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Solve (1) for the first ``count`` rows that ``order`` lists.

    Args:
        z: (N, DIM) latents and codes (K, DIM) float64, centred alike; reg: (N,) float64.
        columns: (DIM + 1, width) as for `nearest_kernel`.
        order: (N,) int64; count: () int32, in memory, since the host does not know it; queue: () int32, 0.
        members: (programs, ROOM, SLOTS) int32, shares and wanted, likewise in float64, queries (programs, DIM + 2,
            SLOTS) in the type of ``columns``: memory of the programs.
        taken: (programs, width / 32, SLOTS) int32, a bit for each code that is not priced, since it is in the support
            or is padding. Left as it is found.
        support: (N, ROOM) int64, weights (N, ROOM), nearest (N,) int64, residual (N,) float64, moves (N,) int32 to
            write to.
        farthest: () float64 that no |a_k| exceeds.
        tol: what the residual is asked to stay below; max_moves: of a row's support.
    """
    program = tl.program_id(0)
    slot, room = tl.arange(0, SLOTS), tl.arange(0, ROOM)
    axis = tl.arange(0, PADDED)
    members += program.to(tl.int64) * ROOM * SLOTS + slot  # (SLOTS,) pointers, as are the next ones
    shares += program.to(tl.int64) * ROOM * SLOTS + slot
    wanted += program.to(tl.int64) * ROOM * SLOTS + slot
    queries += program * (DIM + 2) * SLOTS
    taken += program.to(tl.int64) * (width // 32) * SLOTS
    query = queries + slot  # (SLOTS,) pointers
    far, rows_left = tl.load(farthest), tl.load(count)

    row = tl.full((SLOTS,), -1, tl.int64)  # -1: the slot is free
    anchor, size, moved = tl.zeros((SLOTS,), tl.int32), tl.zeros((SLOTS,), tl.int32), tl.zeros((SLOTS,), tl.int32)
    # Of the codes that entered at the last pricing, how many; how often a weight could not move since; how many may.
    entered, blocked, entering = tl.zeros_like(size), tl.zeros_like(size), tl.zeros_like(size)
    has_anchor = size > 0  # whether c_n is in the support
    shift = tl.zeros((SLOTS,), tl.float64)  # the last correction of prices
    lead, excess = tl.zeros_like(shift), tl.zeros_like(shift)  # -tau, and the highest price above it
    moving = size > 0  # whether the slot's support was changed and is to be solved
    is_open, busy = rows_left > 0, 1
    while busy > 0:
        # Free slots take rows; a fresh row first looks for its nearest code.
        free = (row < 0).to(tl.int32)
        fresh = row < -1
        if is_open:
            asked = tl.sum(free, 0)
            if asked > 0:
                head = tl.atomic_add(queue, asked)
                is_open = head + asked < rows_left
                place = head + tl.cumsum(free, 0) - 1  # (SLOTS,)
                fresh = (free > 0) & (place < rows_left)
                row = tl.where(fresh, tl.load(order + place, mask=fresh, other=-1), row)
                for f in tl.static_range(DIM):
                    coordinate = tl.load(z + row * DIM + f, mask=fresh, other=0.0)
                    tl.store(query + f * SLOTS, coordinate.to(columns.dtype.element_ty), mask=fresh)
                unit = tl.full((SLOTS,), 1.0, columns.dtype.element_ty)
                tl.store(query + DIM * SLOTS, unit, mask=fresh)
                tl.store(query + (DIM + 1) * SLOTS, unit - unit, mask=fresh)

        # Move each changed support until its weights are optimal on it.
        while tl.max(moving.to(tl.int32), 0) > 0:
            lam = tl.load(reg + row, mask=moving, other=1.0)
            origin = _row_of(codes, anchor, moving, DIM, axis)  # (SLOTS, PADDED)
            target = _row_of(z, row, moving, DIM, axis) - origin
            most = tl.max(tl.where(moving, size, 0), 0)
            mean, system = tl.zeros_like(target), tl.zeros((SLOTS, PADDED, PADDED), tl.float64)
            for r in range(0, most):
                used = moving & (r < size)
                member = tl.load(members + r * SLOTS, mask=used, other=0)
                a = tl.where(used[:, None], _row_of(codes, member, used, DIM, axis) - origin, 0.0)
                mean += a
                system += a[:, :, None] * a[:, None, :]
            inverse, mean = _inverse(system, mean, size, lam, DIM, axis)
            missing = tl.where(has_anchor, 0.0, 1.0).to(tl.float64)  # weight that is not yet given away
            rest = target
            y, lead_now, shift_now = tl.zeros_like(target), tl.zeros_like(lead), tl.zeros_like(shift)
            # The first turn solves the system. The others take rounding errors out, which a tiny lambda magnifies.
            for _ in range(0, 3):
                step = _product(inverse, rest - missing[:, None] * mean)  # (SLOTS, PADDED)
                lift = missing / tl.maximum(size, 1) - tl.sum(mean * step, 1)
                y += step
                lead_now += lift
                shift_now = tl.abs(lift) + far * tl.sqrt(tl.sum(step * step, 1))
                missing, rest = 1.0 + tl.zeros_like(lead), target - lam[:, None] * y
                for r in range(0, most):
                    used = moving & (r < size)
                    member = tl.load(members + r * SLOTS, mask=used, other=0)
                    a = tl.where(used[:, None], _row_of(codes, member, used, DIM, axis) - origin, 0.0)
                    weight = lead_now + tl.sum(a * y, 1) + tl.where(member == anchor, 1.0, 0.0)
                    weight = tl.where(used, weight, 0.0)
                    missing -= weight
                    rest -= weight[:, None] * a
                    tl.store(wanted + r * SLOTS, weight, mask=used)
            tl.debug_barrier()

            # Go there as far as no weight turns negative. One that reaches zero leaves, and the rest is solved again.
            in_use = moving[:, None] & (room[None, :] < size[:, None])  # (SLOTS, ROOM)
            cell = room[None, :] * SLOTS
            now = tl.load(shares[:, None] + cell, mask=in_use, other=0.0)
            goal = tl.load(wanted[:, None] + cell, mask=in_use, other=0.0)
            held = tl.load(members[:, None] + cell, mask=in_use, other=0)
            reach = tl.where(goal < 0, now / (now - goal), 2.0)
            step_length = tl.min(reach, 1)
            leaves = moving & (step_length <= 1)
            leaver = tl.min(tl.where(reach == step_length[:, None], room[None, :], ROOM), 1)
            now += tl.where(leaves, step_length, 1.0)[:, None] * (goal - now)
            is_leaver = leaves[:, None] & (room[None, :] == leaver[:, None])
            is_last = room[None, :] == size[:, None] - 1
            gone = tl.sum(tl.where(is_leaver, held, 0), 1)
            now = tl.where(is_leaver, tl.sum(tl.where(is_last, now, 0.0), 1)[:, None], now)
            held = tl.where(is_leaver, tl.sum(tl.where(is_last, held, 0), 1)[:, None], held)
            tl.debug_barrier()
            tl.store(shares[:, None] + cell, now, mask=in_use)
            tl.store(members[:, None] + cell, held, mask=in_use)
            _flip(taken + slot, gone, leaves & (gone != anchor), SLOTS)
            has_anchor = has_anchor & ~(leaves & (gone == anchor))
            size -= leaves.to(tl.int32)
            blocked += (leaves & (step_length == 0)).to(tl.int32)
            moved += moving.to(tl.int32)
            optimal = moving & ~leaves
            shift, lead = tl.where(optimal, shift_now, shift), tl.where(optimal, lead_now, lead)
            # Prices of codes as they are stored: a_k.y - tau = c_k.y - (c_n.y + tau).
            tl.store(query[:, None] + axis[None, :] * SLOTS, y.to(columns.dtype.element_ty),
                     mask=optimal[:, None] & (axis[None, :] < DIM))  # fmt: skip
            zero = tl.zeros((SLOTS,), columns.dtype.element_ty)
            tl.store(query + DIM * SLOTS, zero, mask=optimal)
            tl.store(query + (DIM + 1) * SLOTS, (lead_now - tl.sum(origin * y, 1)).to(zero.dtype), mask=optimal)
            moving = leaves & (moved < max_moves)
            tl.debug_barrier()
        tl.debug_barrier()

        best, code = _stream(queries, SLOTS, columns, width, taken, True, DIM, SLOTS, WORDS)
        low = code % 32 < 16
        # The best codes of both halves: where two enter together, fewer passes are needed.
        first_price, first_code = _first_best(
            tl.where(low, best, float("-inf")), tl.where(low, code, 2147483647), SLOTS
        )
        other_price, other_code = _first_best(
            tl.where(low, float("-inf"), best), tl.where(low, 2147483647, code), SLOTS
        )
        swap = (other_price > first_price) | ((other_price == first_price) & (other_code < first_code))
        one, two = first_price.to(tl.float64), other_price.to(tl.float64)
        one, two = tl.where(swap, two, one), tl.where(swap, one, two)
        code_one, code_two = tl.where(swap, other_code, first_code), tl.where(swap, first_code, other_code)
        # c_n is never among those priced above, because of its e; a_n is 0.
        back = tl.where(has_anchor | fresh, float("-inf"), 1.0 + lead)
        two, code_two = tl.where(back > two, back, two), tl.where(back > two, anchor, code_two)
        swap = two > one
        one, two = tl.where(swap, two, one), tl.where(swap, one, two)
        code_one, code_two = tl.where(swap, code_two, code_one), tl.where(swap, code_one, code_two)

        # A row ends where no price is above the threshold, or where the best code cannot gain weight: then its excess
        # is rounding. Codes that enter together may block each other, so the best one gets a turn alone.
        at_work = (row >= 0) & ~fresh
        priced = at_work & (moved < max_moves)
        excess = tl.where(priced, tl.maximum(one, 0.0), excess)
        is_blocked = (entered > 0) & (blocked >= entered)
        ends = at_work & (~priced | (one <= tol) | (is_blocked & (entering == 1)) | (size == ROOM))
        entering = tl.where(is_blocked, 1, entering)
        goes_on = at_work & ~ends
        both = goes_on & (entering == 2) & (size + 1 < ROOM) & (two > tl.maximum(tol, 0.5 * one))

        if tl.max(ends.to(tl.int32), 0) > 0:
            in_use = ends[:, None] & (room[None, :] < size[:, None])
            cell = room[None, :] * SLOTS
            held = tl.load(members[:, None] + cell, mask=in_use, other=0)
            goal = tl.load(shares[:, None] + cell, mask=in_use, other=0.0)
            where_to = row[:, None] * ROOM + room[None, :]
            padded = tl.where(in_use, held, anchor[:, None])
            tl.store(support + where_to, padded.to(tl.int64), mask=ends[:, None])
            tl.store(weights + where_to, tl.where(goal < 0, 0.0, goal), mask=ends[:, None])
            tl.store(nearest + row, anchor.to(tl.int64), mask=ends)
            tl.store(residual + row, tl.where(shift == shift, tl.maximum(excess, shift), shift), mask=ends)
            tl.store(moves + row, moved, mask=ends)
            for r in range(0, tl.max(tl.where(ends, size, 0), 0)):
                leaving = ends & (r < size)
                member = tl.load(members + r * SLOTS, mask=leaving, other=0)
                _flip(taken + slot, member, leaving & (member != anchor), SLOTS)
            _flip(taken + slot, anchor, ends, SLOTS)
            row = tl.where(ends, -1, row)

        # Codes enter. A fresh row starts at its nearest code, with all of the weight.
        anchor = tl.where(fresh, code_one, anchor)
        size = tl.where(fresh, 0, size)
        enters = fresh | goes_on
        tl.store(members + size * SLOTS, code_one, mask=enters)
        tl.store(shares + size * SLOTS, tl.where(fresh, 1.0, 0.0).to(tl.float64), mask=enters)
        tl.store(members + (size + 1) * SLOTS, code_two, mask=both)
        tl.store(shares + (size + 1) * SLOTS, tl.zeros((SLOTS,), tl.float64), mask=both)
        _flip(taken + slot, code_one, fresh | (goes_on & (code_one != anchor)), SLOTS)
        _flip(taken + slot, code_two, both & (code_two != anchor), SLOTS)
        has_anchor = has_anchor | fresh | (goes_on & (code_one == anchor)) | (both & (code_two == anchor))
        entered = tl.where(goes_on, 1 + both.to(tl.int32), tl.where(fresh, 0, entered))
        blocked, moved = tl.where(enters, 0, blocked), tl.where(fresh, 0, moved)
        entering, excess = tl.where(fresh, 2, entering), tl.where(fresh, 1.0, excess)
        shift, lead = tl.where(fresh, 0.0, shift), tl.where(fresh, 0.0, lead)
        size += enters.to(tl.int32) + both.to(tl.int32)
        moving = enters
        tl.debug_barrier()
        busy = tl.sum((row >= 0).to(tl.int32), 0) + is_open.to(tl.int32)


@triton.jit
def combine_kernel(
    codes, support, weights, combined, n, width, DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):
    """C^T p (N, DIM) of weights and support (N, width)."""
    row, axis = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    total = tl.zeros((ROWS, PADDED), tl.float64)
    for s in range(0, width):
        weight = tl.load(weights + row * width + s, mask=row < n, other=0.0).to(tl.float64)
        used = (row < n) & (weight != 0)  # which a NaN is, too
        code = tl.load(support + row * width + s, mask=used, other=0)
        total += weight[:, None] * _row_of(codes, code, used, DIM, axis)
    inside = (row < n)[:, None] & (axis < DIM)[None, :]
    tl.store(combined + row[:, None] * DIM + axis[None, :], total, mask=inside)


@triton.jit
def gradient_kernel(
    grad,
    target,
    codes,
    reg,
    support,
    weights,
    nearest,
    grad_z,
    grad_reg,
    through,
    multiplier,
    along,
    n,
    width,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What eq. (3) says of each row.

    Args:
        grad: (N, DIM), target (N, DIM) z - c_n, codes (K, DIM) and reg (N,), all in float64.
        support: (N, width) and weights of the same shape; nearest: (N,).
        grad_z: (N, DIM), grad_reg (N,), through (N, DIM) for u, multiplier (N, DIM) for y, and along (N, width) for
            (c_k - m).u, all float64, to write to.
    """
    row, axis = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    real = row < n
    anchor = tl.load(nearest + row, mask=real, other=0)
    lam = tl.load(reg + row, mask=real, other=1.0)
    origin = _row_of(codes, anchor, real, DIM, axis)  # (ROWS, PADDED)
    g, y = _row_of(grad, row, real, DIM, axis), _row_of(target, row, real, DIM, axis)
    mean, size = tl.zeros_like(g), tl.zeros((ROWS,), tl.int32)
    system = tl.zeros((ROWS, PADDED, PADDED), tl.float64)
    for s in range(0, width):
        weight = tl.load(weights + row * width + s, mask=real, other=0.0).to(tl.float64)
        used = weight > 0
        code = tl.load(support + row * width + s, mask=used, other=0)
        a = tl.where(used[:, None], _row_of(codes, code, used, DIM, axis) - origin, 0.0)
        y -= weight[:, None] * a
        mean += a
        system += a[:, :, None] * a[:, None, :]
        size += used.to(tl.int32)
    inverse, mean = _inverse(system, mean, size, lam, DIM, axis)
    u = lam[:, None] * _product(inverse, g)
    y /= lam[:, None]
    for s in range(0, width):
        used = tl.load(weights + row * width + s, mask=real, other=0.0) > 0
        code = tl.load(support + row * width + s, mask=used, other=0)
        a = _row_of(codes, code, used, DIM, axis) - origin
        tl.store(along + row * width + s, tl.sum((a - mean) * u, 1), mask=used)
    cell, inside = row[:, None] * DIM + axis[None, :], real[:, None] & (axis < DIM)[None, :]
    tl.store(grad_z + cell, g - u, mask=inside)
    tl.store(through + cell, u, mask=inside)
    tl.store(multiplier + cell, y, mask=inside)
    tl.store(grad_reg + row, -tl.sum((g - u) * y, 1), mask=real)


@triton.jit
def sum_kernel(
    first, entry, weights, along, through, multiplier, summed, width, DIM: tl.constexpr, PADDED: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Add up dL/dc_k = sum of p_k u + ((c_k - m).u) y over the rows that use code k, a program for each code.

    The order of the sum is that of the rows, so it has the same bits every time.

    Args:
        first: (K + 1,) where each code's entries begin in ``entry``, whose values point into weights (N, width).
        summed: (K, DIM) float64 to write to.
    """
    code, axis = tl.program_id(0), tl.arange(0, PADDED)
    begin, end = tl.load(first + code), tl.load(first + code + 1)
    total = tl.zeros((ENTRIES, PADDED), tl.float64)
    for start in range(begin, end, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        real = place < end
        cell = tl.load(entry + place, mask=real, other=0)
        weight = tl.load(weights + cell, mask=real, other=0.0).to(tl.float64)
        lift = tl.load(along + cell, mask=real, other=0.0)
        row = cell // width
        total += weight[:, None] * _row_of(through, row, real, DIM, axis)
        total += lift[:, None] * _row_of(multiplier, row, real, DIM, axis)
    tl.store(summed + code.to(tl.int64) * DIM + axis, tl.sum(total, 0), mask=axis < DIM)


@triton.jit
def _row_of(matrix, row, real, DIM: tl.constexpr, axis):
    """Rows (n,) of a matrix (.., DIM) as (n, PADDED), 0 where not ``real`` and in the padding."""
    cell = row.to(tl.int64)[:, None] * DIM + axis[None, :]
    return tl.load(matrix + cell, mask=real[:, None] & (axis < DIM)[None, :], other=0.0)


@triton.jit
def _inverse(system, total, size, lam, DIM: tl.constexpr, axis):
    """J^-1 (n, PADDED, PADDED) and m - c_n (n, PADDED), from the sums of a_k a_k^T and of a_k over a support."""
    mean = total / tl.maximum(size, 1)[:, None]
    row, column = axis[None, :, None], axis[None, None, :]
    system -= total[:, :, None] * mean[:, None, :]
    system += tl.where(row == column, tl.where(row < DIM, lam[:, None, None], 1.0), 0.0)
    # Sweeping every pivot of a symmetric matrix leaves minus its inverse, and keeps it symmetric on the way.
    for k in range(0, DIM):
        left = tl.sum(tl.where(column == k, system, 0.0), 2)  # (n, PADDED), column k
        above = tl.sum(tl.where(row == k, system, 0.0), 1)  # (n, PADDED), row k
        scale = 1.0 / tl.sum(tl.where(axis[None, :] == k, above, 0.0), 1)  # (n,)
        left, above = left[:, :, None], above[:, None, :]
        scale = scale[:, None, None]
        swept = tl.where(row == k, above * scale, tl.where(column == k, left * scale, system - left * above * scale))
        system = tl.where((row == k) & (column == k), -scale, swept)
    return -system, mean


@triton.jit
def _product(matrix, vector):
    """(n, D, D) symmetric and (n, D) -> (n, D)."""
    return tl.sum(matrix * vector[:, None, :], 2)


@triton.jit
def _stream(
    query,
    stride,
    columns,
    width,
    taken,
    SKIP: tl.constexpr,
    DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Score all codes for all slots, a tile of codes at a time, and keep the best score of each column of the tiles.

    A score is the product of a query and a column, plus an offset.

    Args:
        query: what (DIM + 2, SLOTS) queries begin at, a ``stride`` from row to row: DIM + 1 factors and the offset.
        columns: (DIM + 1, width).
        taken: what (width / 32, SLOTS) words begin at, of a bit for each code that is to be left out; read if SKIP.

    Returns:
        The best scores (4, WORDS, SLOTS / 4, 32), and which codes have them. -inf and a code of the first tile
        stand for codes left out and for NaN.
    """
    # Triton shares axes from the last to the first among lanes, then warps; what is left is one thread's. So a thread
    # has four rows, whose queries stay in its registers, and a few codes: it loads one number for four that it adds.
    slot = tl.arange(0, 4)[:, None] * (SLOTS // 4) + tl.arange(0, SLOTS // 4)[None, :]  # (4, SLOTS / 4)
    word, bit = tl.arange(0, WORDS), tl.arange(0, 32)
    within = word[:, None] * 32 + bit[None, :]  # (WORDS, 32)
    mask = (tl.zeros_like(bit) + 1) << bit
    best = tl.full((4, WORDS, SLOTS // 4, 32), float("-inf"), columns.dtype.element_ty)
    where = tl.zeros((4, WORDS, SLOTS // 4, 32), tl.int32)
    for tile in range(0, width // (WORDS * 32)):
        column = columns + tile * (WORDS * 32) + within
        score = tl.zeros_like(best) + tl.load(query + (DIM + 1) * stride + slot)[:, None, :, None]
        for f in tl.static_range(DIM + 1):
            factor = tl.load(query + f * stride + slot)
            score += factor[:, None, :, None] * tl.load(column + f * width)[None, :, None, :]
        if SKIP:
            words = tl.load(taken + (tile * WORDS + word)[None, :, None] * SLOTS + slot[:, None, :])
            score = tl.where((words[:, :, :, None] & mask[None, None, None, :]) == 0, score, float("-inf"))
        better = score > best
        best, where = tl.where(better, score, best), tl.where(better, tile, where)
    return best, where * (WORDS * 32) + within[None, :, None, :]


@triton.jit
def _first_best(score, code, SLOTS: tl.constexpr):
    """The largest (SLOTS,) of scores as `_stream` returns them, and the first of the codes that have it."""
    highest = tl.max(tl.max(score, 3), 1)
    ties = tl.where(score == highest[:, None, :, None], code, 2147483647)
    return tl.reshape(highest, (SLOTS,)), tl.reshape(tl.min(tl.min(ties, 3), 1), (SLOTS,))


@triton.jit
def _flip(taken, code, where, SLOTS: tl.constexpr):
    """Flip the bits of codes (SLOTS,) in ``taken``, pointers to the first words (SLOTS,)."""
    tl.debug_barrier()
    word = taken + (code // 32) * SLOTS
    tl.store(word, tl.load(word, mask=where, other=0) ^ (1 << (code % 32)), mask=where)
    tl.debug_barrier()
