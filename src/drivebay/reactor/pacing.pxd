"""How long a reactor polls before it sleeps. Context: reactor.

Polling pays while the next work comes within the window, for a wake-up takes as long
(50 us in a virtual machine); else it only burns the core. So the gaps between work and
work are averaged, as far as polling sees them, and while the average is longer than the
window the reactor sleeps at once. Now and then it polls all the same, to see whether
that has changed.
"""

from libc.stdint cimport INT64_MAX, UINT64_MAX, int64_t, uint32_t, uint64_t

cdef enum:
    LEARN_SHARE = 8         # a new gap's weight: one part in so many
    NAPS_A_PROBE = 13       # odd: gaps that take turns, a disk's and a guest's, are both seen

cdef struct pacing_t:
    uint64_t window         # ticks of polling after the last work, now
    uint64_t longest        # its bound (--poll-us)
    int64_t gap             # ticks from work to work, averaged
    uint32_t naps           # sleeps that no polling went before

cdef inline void pacing_set(pacing_t* pacing, uint64_t ticks_a_second, int poll_us) noexcept nogil:
    """poll_us -1: for ever."""
    pacing.longest = INT64_MAX
    if poll_us >= 0:
        pacing.longest = ticks_a_second * <uint64_t>poll_us // 1_000_000
    pacing.window = pacing.longest

cdef inline void pacing_learn(pacing_t* pacing, uint64_t gap) noexcept nogil:
    """Polling saw work come after this gap."""
    gap = min(gap, pacing.longest + pacing.longest // 4)
    pacing.gap += (<int64_t>gap - pacing.gap) // LEARN_SHARE
    pacing.window = pacing.longest if pacing.gap <= <int64_t>pacing.longest else 0

cdef inline void pacing_nap(pacing_t* pacing) noexcept nogil:
    """About to sleep: polling was in vain, and the gap is longer than it saw; or there was none.

    A gap that polling did not see the end of counts little more than the window: that
    one poll in four wins is enough, where a wake-up is so slow.
    """
    if pacing.window:
        pacing_learn(pacing, UINT64_MAX)
        return
    pacing.naps += 1
    if pacing.naps % NAPS_A_PROBE == 0:
        pacing.window = pacing.longest
