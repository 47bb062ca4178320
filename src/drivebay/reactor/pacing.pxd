"""How long a reactor polls before it sleeps. Context: reactor.

Polling until the next work costs the gap before it; sleeping costs a wake-up, which the
reactor measures: whoever rings its doorbell notes when. So the gaps between work and work
are remembered by their length, and the window is the one that would have cost least: short
when the next work comes soon or far too late, as long as the usual gap when that is below
the cost of a wake-up. Waits for a disk and waits for a guest are learnt apart.

A sleeping reactor makes the guest pay for kicks, so the gaps that it sees are longer than
polling would see them. Those after no polling at all teach nothing therefore; now and then
it polls all the same, to see whether polling has begun to pay.
"""

from libc.stdint cimport INT64_MAX, uint8_t, uint32_t, uint64_t

cdef enum:
    GAP_SIZES = 12          # the n-th: below 2 ** n units; the last one: all longer ones
    GAP_UNITS_A_SECOND = 1000000
    LEARN_LEAST = 8         # gaps before anything is concluded
    LEARN_MOST = 64         # then what is old counts half
    CHOOSE_EVERY = 8
    NAPS_A_PROBE = 13
    WAKE_FIRST_US = 50      # until one was measured: a virtual machine's
    WAKE_LEAST_US = 2
    WAKE_MOST_US = 200      # a slower one was no wake-up, but a core that others used
    WAKE_SHARE = 8          # a new measure's weight: one part in so many

# What the wait was for.
cdef enum:
    WAIT_GUEST = 0
    WAIT_DISK = 1
    WAIT_KINDS = 2

cdef struct gaps_t:
    uint64_t window         # that costs least
    uint64_t sum[GAP_SIZES]
    uint32_t count[GAP_SIZES]
    uint32_t learnt
    uint32_t since_choice
    uint32_t naps           # sleeps that no polling went before

cdef struct pacing_t:
    uint64_t window         # ticks of polling after the last work, now
    uint64_t longest        # its bound (--poll-us)
    uint64_t unit           # ticks of the smallest gap
    uint64_t wake           # ticks that a wake-up costs
    uint8_t waiting         # the last turn found nothing
    uint8_t napping         # it would sleep, or slept
    uint8_t kind
    gaps_t gaps[WAIT_KINDS]

cdef inline void pacing_set(pacing_t* pacing, uint64_t ticks_a_second, int poll_us) noexcept nogil:
    """poll_us -1: for ever."""
    cdef int kind
    pacing.unit = max(ticks_a_second // GAP_UNITS_A_SECOND, <uint64_t>1)
    pacing.wake = WAKE_FIRST_US * ticks_a_second // 1000000
    pacing.longest = INT64_MAX
    if poll_us >= 0:
        pacing.longest = ticks_a_second * <uint64_t>poll_us // 1000000
    for kind in range(WAIT_KINDS):
        pacing.gaps[kind].window = pacing.longest
    pacing.window = pacing.longest

cdef inline void pacing_choose(pacing_t* pacing, gaps_t* gaps) noexcept nogil:
    """Try each length as the window; of equal ones the shortest. Bound: GAP_SIZES."""
    cdef uint64_t polled = 0, best, window = 0, cost, edge
    cdef uint32_t left = 0
    cdef int size
    gaps.since_choice = 0
    for size in range(GAP_SIZES):
        left += gaps.count[size]
    best = left * pacing.wake
    for size in range(GAP_SIZES - 1):
        polled += gaps.sum[size]
        left -= gaps.count[size]
        edge = pacing.unit << size
        if edge // 2 >= pacing.longest:
            break
        cost = polled + left * (min(edge, pacing.longest) + pacing.wake)
        if cost < best:
            best = cost
            window = min(edge, pacing.longest)
    gaps.window = window

cdef inline void pacing_learn(pacing_t* pacing, uint64_t gap) noexcept nogil:
    """Work came after such a gap without any, in which the reactor polled, slept, or both."""
    cdef gaps_t* gaps = &pacing.gaps[pacing.kind]
    cdef int size = 0
    if pacing.napping:
        if pacing.window == 0:
            return
        gap = max(gap - min(gap, pacing.wake), pacing.window)
    gap = min(gap, pacing.unit << (GAP_SIZES - 1))
    while size < GAP_SIZES - 1 and gap >= pacing.unit << size:
        size += 1
    gaps.count[size] += 1
    gaps.sum[size] += gap
    gaps.learnt += 1
    gaps.since_choice += 1
    if gaps.learnt >= LEARN_LEAST and (gaps.since_choice == CHOOSE_EVERY or pacing.napping):
        pacing_choose(pacing, gaps)
    if gaps.learnt == LEARN_MOST:
        for size in range(GAP_SIZES):
            gaps.count[size] //= 2
            gaps.sum[size] = gaps.sum[size] // 2 if gaps.count[size] else 0
        gaps.learnt = LEARN_MOST // 2

cdef inline void pacing_worked(pacing_t* pacing, uint64_t gap, bint disk) noexcept nogil:
    """A turn did work, after this gap; what comes next is a wait for a disk or for a guest."""
    if pacing.waiting and 0 < pacing.longest < INT64_MAX:
        pacing_learn(pacing, gap)
    pacing.waiting = pacing.napping = False
    pacing.kind = WAIT_DISK if disk else WAIT_GUEST
    pacing.window = pacing.gaps[pacing.kind].window

cdef inline void pacing_nap(pacing_t* pacing) noexcept nogil:
    """About to sleep, perhaps again without any work since."""
    cdef gaps_t* gaps = &pacing.gaps[pacing.kind]
    if pacing.napping:
        return
    pacing.napping = True
    if pacing.window == 0:
        gaps.naps += 1
        if gaps.naps % NAPS_A_PROBE == 0:       # the next wait of this kind
            gaps.window = min(pacing.longest, pacing.wake + pacing.wake // 4)

cdef inline void pacing_woken(pacing_t* pacing, uint64_t ticks) noexcept nogil:
    """A wake-up took this long from the doorbell to the loop."""
    ticks = max(min(ticks, WAKE_MOST_US * pacing.unit), WAKE_LEAST_US * pacing.unit)
    pacing.wake = ((WAKE_SHARE - 1) * pacing.wake + ticks) // WAKE_SHARE
