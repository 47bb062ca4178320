"""Whose I/O may go: prices, turns and lists. See qos.pxd for the idea.

While an I/O waits here its ``engine`` word is the tick at which it came.
"""

from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t

from drivebay.memory.platform cimport (
    compare_exchange_u64, load_relaxed_u32, load_relaxed_u64, store_relaxed_u64)
from drivebay.reactor.io cimport IO_READ, io_list_append, io_list_take, io_t

cdef enum:
    BURST_US = 5000
    SLICE_US = 100
    GRACE_US = 2000

cdef uint64_t NOBODY = UINT64_MAX
cdef double MOST_TICKS = 1e18


cdef bint qos_set(throttle_t* throttle, const uint64_t* rates, uint64_t tick_rate) noexcept nogil:
    """Take new limits, a second; 0 is none. What an old one left unpaid is forgotten.

    Returns: is there any?
    """
    cdef int i
    cdef double price
    cdef bint limited = False
    throttle.burst = tick_rate * BURST_US // 1_000_000
    throttle.slice = tick_rate * SLICE_US // 1_000_000
    throttle.grace = tick_rate * GRACE_US // 1_000_000
    for i in range(LIMITS):
        price = <double>tick_rate / <double>rates[i] if rates[i] else 0.0
        if price != throttle.price[i]:
            throttle.price[i] = price
            store_relaxed_u64(&throttle.budget.paid[i], 0)
        limited |= rates[i] != 0
    return limited


# --- prices --------------------------------------------------------------------------------

cdef inline uint32_t direction_of(const io_t* io) noexcept nogil:
    return 0 if io.operation == IO_READ else 1


cdef inline bint applies(const throttle_t* throttle, uint32_t limit, uint32_t way) noexcept nogil:
    """Whether a limit is set and concerns this direction."""
    return throttle.price[limit] > 0 and (
        limit < LIMIT_READ_BYTES or limit == LIMIT_READ_BYTES + way)


cdef inline uint64_t paid_until(const throttle_t* throttle, uint32_t way) noexcept nogil:
    """The tick from which on the limits of one direction let something go."""
    cdef uint64_t latest = 0
    cdef uint32_t i
    for i in range(LIMITS):
        if applies(throttle, i, way):
            latest = max(latest, load_relaxed_u64(&throttle.budget.paid[i]))
    return latest


cdef void pay(uint64_t* paid, uint64_t least, uint64_t ticks) noexcept nogil:
    """Bound: tried again only while others win."""
    cdef uint64_t before
    while True:
        before = load_relaxed_u64(paid)
        if compare_exchange_u64(paid, before, max(before, least) + ticks):
            return


cdef inline uint64_t less(uint64_t value, uint64_t amount) noexcept nogil:
    return value - amount if value > amount else 0


cdef void charge(
    throttle_t* throttle, const io_t* io, uint64_t tag, uint64_t now
) noexcept nogil:
    """It goes: every limit is paid. Its flow had a turn, as long as what all flows share."""
    cdef budget_t* budget = throttle.budget
    cdef flow_t* flow = &throttle.flows[io.flow % QOS_FLOWS]
    cdef uint32_t i, way = direction_of(io)
    cdef uint64_t ticks, common = 0, own = 0, before
    for i in range(LIMITS):
        if applies(throttle, i, way):
            ticks = <uint64_t>min(
                throttle.price[i] * (1.0 if i == LIMIT_IOS else <double>io.length) + 0.5,
                MOST_TICKS)
            pay(&budget.paid[i], less(now, throttle.burst), ticks)
            if i < LIMIT_READ_BYTES:
                common = max(common, ticks)
            else:
                own = ticks
    flow.tag = tag + (common or own)
    before = load_relaxed_u64(&budget.turn)
    if tag > before:
        compare_exchange_u64(&budget.turn, before, tag)     # one that loses is as good


# --- turns ---------------------------------------------------------------------------------

cdef inline uint64_t tag_of(const throttle_t* throttle, const flow_t* flow) noexcept nogil:
    """Who was away has not saved its turns up, but for a burst's worth."""
    return max(flow.tag, less(load_relaxed_u64(&throttle.budget.turn), throttle.burst))


cdef bint others_may_go(const throttle_t* throttle, uint32_t way, uint64_t now) noexcept nogil:
    """Can what waits in this direction use what a request of the other one would?"""
    cdef uint32_t own = LIMIT_READ_BYTES + way
    if throttle.price[LIMIT_IOS] == 0 and throttle.price[LIMIT_BYTES] == 0:
        return False
    return throttle.price[own] == 0 or load_relaxed_u64(&throttle.budget.paid[own]) <= now


cdef bint keeps_back(
    const throttle_t* throttle, uint32_t way, uint64_t tag, uint64_t now
) noexcept nogil:
    """Is it the turn of somebody else, who does not leave the limit unused?"""
    cdef const budget_t* budget = throttle.budget
    cdef uint64_t bar = less(tag, throttle.slice)
    cdef uint32_t i
    cdef bint both
    if bar == 0 or paid_until(throttle, way) < less(now, throttle.grace):
        return False
    both = others_may_go(throttle, 1 - way, now)
    for i in range(load_relaxed_u32(&budget.share_count)):
        if load_relaxed_u64(&budget.shares[i].first[way]) < bar:
            return True
        if both and load_relaxed_u64(&budget.shares[i].first[1 - way]) < bar:
            return True
    return False


cdef flow_t* first_of(throttle_t* throttle, uint32_t way, uint64_t* tag) noexcept nogil:
    """The flow whose turn it is in one direction; NULL: nothing waits. Bound: QOS_FLOWS."""
    cdef flow_t* found = NULL
    cdef flow_t* flow
    cdef uint64_t its
    cdef uint32_t i
    tag[0] = NOBODY
    if throttle.held[way] == 0:
        return NULL
    for i in range(throttle.active_count):
        flow = &throttle.flows[throttle.active[i]]
        its = tag_of(throttle, flow)
        if flow.waiting[way].first != NULL and its < tag[0]:
            found = flow
            tag[0] = its
    return found


cdef void show(throttle_t* throttle) noexcept nogil:
    """Let the other channels know who is first here."""
    cdef uint64_t tag
    cdef uint32_t way
    for way in range(DIRECTIONS):
        first_of(throttle, way, &tag)
        store_relaxed_u64(&throttle.share.first[way], tag)


# --- what the entry asks -------------------------------------------------------------------

cdef bint qos_may_pass(throttle_t* throttle, const io_t* io, uint64_t now) noexcept nogil:
    """May a new one go at once? It is charged then."""
    cdef uint32_t way = direction_of(io)
    cdef uint64_t tag
    if throttle.held[way] or paid_until(throttle, way) > now:
        return False
    tag = tag_of(throttle, &throttle.flows[io.flow % QOS_FLOWS])
    if keeps_back(throttle, way, tag, now):
        return False
    charge(throttle, io, tag, now)
    return True


cdef void qos_hold(throttle_t* throttle, io_t* io) noexcept nogil:
    cdef uint32_t number = io.flow % QOS_FLOWS, way = direction_of(io)
    cdef flow_t* flow = &throttle.flows[number]
    if flow.waiting[0].first == NULL and flow.waiting[1].first == NULL:
        throttle.active[throttle.active_count] = number
        throttle.active_count += 1
    io_list_append(&flow.waiting[way], io)
    throttle.held[way] += 1
    show(throttle)


cdef io_t* take(throttle_t* throttle, flow_t* flow, uint32_t way) noexcept nogil:
    cdef io_t* io = io_list_take(&flow.waiting[way])
    cdef uint32_t i
    throttle.held[way] -= 1
    if flow.waiting[0].first == NULL and flow.waiting[1].first == NULL:
        for i in range(throttle.active_count):
            if &throttle.flows[throttle.active[i]] == flow:
                throttle.active_count -= 1
                throttle.active[i] = throttle.active[throttle.active_count]
                break
    return io


cdef io_t* qos_next(throttle_t* throttle, uint64_t now) noexcept nogil:
    """Take and charge the one whose turn it is; NULL: none may go now."""
    cdef flow_t* flow
    cdef flow_t* chosen = NULL
    cdef io_t* io = NULL
    cdef uint64_t tag = 0, lowest = NOBODY
    cdef uint32_t way, chosen_way = 0
    for way in range(DIRECTIONS):
        flow = first_of(throttle, way, &tag)
        if flow == NULL or paid_until(throttle, way) > now:
            continue
        if keeps_back(throttle, way, tag, now):
            continue
        if tag < lowest or (
                tag == lowest
                and flow.waiting[way].first.engine < chosen.waiting[chosen_way].first.engine):
            chosen = flow
            chosen_way = way
            lowest = tag
    if chosen != NULL:
        io = take(throttle, chosen, chosen_way)
        charge(throttle, io, lowest, now)
        show(throttle)
    throttle.last_run = now
    return io


cdef io_t* qos_oldest(throttle_t* throttle) noexcept nogil:
    """Take the one that waits longest, uncharged; NULL: none does. Bound: QOS_FLOWS."""
    cdef flow_t* flow
    cdef flow_t* chosen = NULL
    cdef io_t* io = NULL
    cdef uint64_t earliest = NOBODY
    cdef uint32_t i, way, chosen_way = 0
    for i in range(throttle.active_count):
        flow = &throttle.flows[throttle.active[i]]
        for way in range(DIRECTIONS):
            if flow.waiting[way].first != NULL and flow.waiting[way].first.engine < earliest:
                earliest = flow.waiting[way].first.engine
                chosen = flow
                chosen_way = way
    if chosen != NULL:
        io = take(throttle, chosen, chosen_way)
    show(throttle)
    return io


cdef uint64_t qos_due(const throttle_t* throttle, uint64_t now) noexcept nogil:
    """When to look again; only while something waits."""
    cdef uint64_t due = NOBODY, until
    cdef uint32_t way
    for way in range(DIRECTIONS):
        if throttle.held[way]:
            until = paid_until(throttle, way)
            due = min(due, until if until > now else now + throttle.slice)
    return max(due, throttle.last_run + throttle.slice)
