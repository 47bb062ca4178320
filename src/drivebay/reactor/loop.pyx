"""The loop of one core: polls what is busy, sleeps when nothing is.

Each source (a virtqueue) is HOT or ARMED. HOT ones are polled in every turn with
their notifications off; one that had no work for the window is armed: it turns
its notifications on and looks once more. When no source is HOT and no engine
has work, the thread sleeps in epoll, where kicks, engine descriptors and the
mailbox's doorbell wake it, and the next timer's deadline. A turn runs due timers, serves
messages, sources, engines, and then publishes what completed.

Context: all of it runs on the reactor's own thread, without the GIL.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.time cimport timespec
from posix.unistd cimport write

from drivebay.memory.platform cimport (
    CHECK, cpu_pause, fence_seq_cst, load_acquire_ptr, load_acquire_u64, store_release_u32,
    tsc_read)
from drivebay.reactor.mailbox cimport mailbox_take, message_t, sched_getcpu
from drivebay.reactor.pacing cimport pacing_nap, pacing_woken, pacing_worked
from drivebay.reactor.timer cimport timers_due, timers_run
from drivebay.reactor.watch cimport (
    WATCH_ENGINE, WATCH_MAILBOX, WATCH_MASK, WATCH_SOURCE, epoll_event, epoll_pwait2, unwatch,
    watch)

cdef enum:
    LOOK_EVENTS = 64


# --- sources -------------------------------------------------------------------------------

cdef void make_hot(reactor_t* reactor, source_t* source) noexcept nogil:
    source.state = SOURCE_HOT
    source.last_work = reactor.now
    source.previous = NULL
    source.next = reactor.hot
    if reactor.hot != NULL:
        reactor.hot.previous = source
    else:
        reactor.hot_last = source
    reactor.hot = source
    reactor.hot_count += 1


cdef void leave_hot(reactor_t* reactor, source_t* source) noexcept nogil:
    if source.previous != NULL:
        source.previous.next = source.next
    else:
        reactor.hot = source.next
    if source.next != NULL:
        source.next.previous = source.previous
    else:
        reactor.hot_last = source.previous
    reactor.hot_count -= 1


cdef void serve_last(reactor_t* reactor, source_t* source) noexcept nogil:
    """From the next turn on: it had all the blocks that there were, the others come first."""
    if source.next == NULL:
        return
    leave_hot(reactor, source)
    source.previous = reactor.hot_last
    source.next = NULL
    reactor.hot_last.next = source
    reactor.hot_last = source
    reactor.hot_count += 1


cdef int reactor_attach(reactor_t* reactor, source_t* source) noexcept nogil:
    """Serve a source from now on; it is looked at in the next turn without a kick."""
    cdef int status = 0
    if source.kick >= 0:
        status = watch(reactor.epoll, source.kick, source, WATCH_SOURCE)
        if status != 0:
            return status
    source.disarm(source)
    make_hot(reactor, source)
    return 0


cdef void reactor_detach(reactor_t* reactor, source_t* source) noexcept nogil:
    if source.state == SOURCE_DETACHED:
        return
    unwatch(reactor.epoll, source.kick)
    if source.state == SOURCE_HOT:
        leave_hot(reactor, source)
    else:
        reactor.armed_count -= 1
    source.state = SOURCE_DETACHED


cdef int reactor_rewatch(reactor_t* reactor, source_t* source, int kick) noexcept nogil:
    """Replace the kick descriptor; the source is polled next, so no kick is lost."""
    cdef int status = 0
    if source.state == SOURCE_DETACHED:     # it could not be watched; nobody would unwatch it
        return status
    unwatch(reactor.epoll, source.kick)
    source.kick = -1
    if kick >= 0:
        status = watch(reactor.epoll, kick, source, WATCH_SOURCE)
        if status == 0:
            source.kick = kick
    if source.state == SOURCE_ARMED:
        reactor_wake(reactor, source)
    return status


cdef void reactor_wake(reactor_t* reactor, source_t* source) noexcept nogil:
    if source.state == SOURCE_ARMED:
        reactor.armed_count -= 1
        source.disarm(source)
        make_hot(reactor, source)


cdef void arm_source(reactor_t* reactor, source_t* source) noexcept nogil:
    """HOT to ARMED, unless work came in at the last look."""
    if source.arm(source):
        source.disarm(source)
        source.last_work = reactor.now
        return
    leave_hot(reactor, source)
    source.state = SOURCE_ARMED
    reactor.armed_count += 1


# --- engines -------------------------------------------------------------------------------

cdef void reactor_add_engine(reactor_t* reactor, engine_t* engine) noexcept nogil:
    """Cannot fail: an engine that epoll will not watch is polled while it has I/O."""
    CHECK(reactor.engine_count < REACTOR_MAX_ENGINES)
    engine.watched = (
        engine.fd >= 0 and watch(reactor.epoll, engine.fd, engine, WATCH_ENGINE) == 0)
    reactor.engines[reactor.engine_count] = engine
    reactor.engine_count += 1


# --- one turn ------------------------------------------------------------------------------

cdef int run_messages(reactor_t* reactor) noexcept nogil:
    """Bound: what was in the mailbox when taken."""
    cdef message_t* message = mailbox_take(&reactor.mailbox)
    cdef message_t* following
    cdef int count = 0
    while message != NULL:
        following = message.next
        message.act(message, reactor)
        message = following
        count += 1
    return count


cdef inline bint is_resting(const reactor_t* reactor, const source_t* source) noexcept nogil:
    """No work anywhere for the window; or, of one with nothing in flight, for the longest one.

    While there is work anywhere a look at a quiet queue costs less than a kick.
    """
    if source.kick < 0:
        return False
    if reactor.now - reactor.last_work > reactor.pacing.window:
        return True
    return not source.inflight and reactor.now - source.last_work > reactor.pacing.longest


cdef inline void count_time(reactor_t* reactor, source_t* source, uint64_t now) noexcept nogil:
    """The time since the last count was for this one."""
    source.busy += now - reactor.counted
    reactor.counted = now


cdef inline void count_poll(reactor_t* reactor, source_t* source) noexcept nogil:
    """Who was served, and how long that took: of a single one, the end of the turn tells."""
    source.last_work = reactor.now
    source.busy_polls += 1
    reactor.served = source
    if reactor.hot_count > 1 and reactor.running:
        count_time(reactor, source, tsc_read())


cdef int serve_sources(reactor_t* reactor) noexcept nogil:
    """Poll each HOT source once; arm those that had no work for the window."""
    cdef source_t* source = reactor.hot
    cdef source_t* following
    cdef source_t* greedy = NULL
    cdef int done, work = 0
    while source != NULL:
        following = source.next
        reactor.blocks_short = 0
        source.polls += 1
        done = source.poll(source, reactor)
        if done and reactor.blocks_short and greedy == NULL:
            greedy = source
        if done:
            count_poll(reactor, source)
            work += done
        elif is_resting(reactor, source):
            arm_source(reactor, source)
        source = following
    if greedy != NULL:
        serve_last(reactor, greedy)
    return work


cdef int serve_engines(reactor_t* reactor) noexcept nogil:
    """Flush what the sources prepared, once per engine, then reap."""
    cdef uint32_t i
    cdef engine_t* engine
    cdef int work = 0
    cdef bint used = False
    for i in range(reactor.engine_count):
        engine = reactor.engines[i]
        used |= engine.unflushed or engine.inflight
        if engine.unflushed:
            engine.flush(engine, reactor)
        if engine.inflight:
            if reactor.running:
                reactor.now = tsc_read()    # what a flush completes at once took time too
            work += engine.poll(engine, reactor)
    if used and reactor.running:
        count_engines(reactor)
    return work


cdef void count_engines(reactor_t* reactor) noexcept nogil:
    """Their time is for those whose requests completed, else for the last one that sent some."""
    cdef source_t* source = reactor.dirty
    cdef uint64_t now, share
    if reactor.dirty_count < 2:
        if source != NULL:
            reactor.served = source     # the end of the turn tells
        return
    now = tsc_read()
    share = (now - reactor.counted) // reactor.dirty_count
    reactor.counted = now
    while source != NULL:
        source.busy += share
        source = source.next_dirty


cdef void publish_dirty(reactor_t* reactor) noexcept nogil:
    """Guests see what completed. If polling pays, their next requests need no kick."""
    cdef source_t* source = reactor.dirty
    cdef source_t* following
    reactor.dirty = NULL
    reactor.dirty_count = 0
    while source != NULL:
        following = source.next_dirty
        source.dirty = 0
        if reactor.pacing.window:
            reactor_wake(reactor, source)
        source.publish(source, reactor)
        source = following


cdef bint engines_inflight(const reactor_t* reactor) noexcept nogil:
    cdef uint32_t i
    for i in range(reactor.engine_count):
        if reactor.engines[i].inflight:
            return True
    return False


cdef int reactor_turn(reactor_t* reactor) noexcept nogil:
    """Timers, messages, sources, engines, publish. Returns: work done."""
    cdef int work = 0
    cdef uint64_t started = reactor.now
    reactor.counted = started
    reactor.served = NULL
    if timers_due(&reactor.timers, started):
        timers_run(&reactor.timers, started)
    if load_acquire_ptr(&reactor.mailbox.messages) != NULL:
        reactor.place = PLACE_MESSAGES
        work += run_messages(reactor)
    reactor.place = PLACE_QUEUES
    if reactor.hot != NULL:
        work += serve_sources(reactor)
    if reactor.engine_count:
        reactor.place = PLACE_ENGINES
        work += serve_engines(reactor)
    if work:
        pacing_worked(&reactor.pacing, started - reactor.last_work, engines_inflight(reactor))
        reactor.last_work = reactor.now
    else:
        reactor.pacing.waiting = True
    if reactor.dirty != NULL:
        publish_dirty(reactor)
    reactor.loops += 1
    return work


cdef const timespec* until_deadline(const reactor_t* reactor, timespec* left) noexcept nogil:
    """How long to sleep; NULL: until something comes. Rounded up, so that it is due then."""
    cdef uint64_t ticks = 0
    if reactor.timers.earliest == NULL:
        return NULL
    if reactor.timers.earliest.deadline > reactor.now:
        ticks = reactor.timers.earliest.deadline - reactor.now
    left.tv_sec = <long>(ticks // reactor.ticks_a_second)
    ticks %= reactor.ticks_a_second
    left.tv_nsec = min(<long>(<double>ticks * 1e9 / <double>reactor.ticks_a_second) + 1,
                       <long>999_999_999)
    return left


cdef void measure_wake_up(reactor_t* reactor) noexcept nogil:
    """What it took from the doorbell to here. From the same core it was none: that was awake."""
    cdef uint64_t rung = load_acquire_u64(&reactor.mailbox.rung)
    if reactor.mailbox.rung_on != sched_getcpu():
        pacing_woken(&reactor.pacing, tsc_read() - rung)


cdef void reactor_look(reactor_t* reactor, bint wait) noexcept nogil:
    """See what epoll has: kicks make their source HOT; the rest only wakes us."""
    cdef epoll_event events[LOOK_EVENTS]
    cdef timespec at_once = timespec(0, 0)
    cdef timespec left = timespec(0, 0)
    cdef const timespec* timeout = until_deadline(reactor, &left) if wait else &at_once
    cdef int i, count
    count = epoll_pwait2(reactor.epoll, events, LOOK_EVENTS, timeout, NULL)
    CHECK(count >= 0 or errno == EINTR)
    for i in range(count):
        if events[i].data.u64 & WATCH_MASK == WATCH_SOURCE:
            reactor_wake(reactor, <source_t*>events[i].data.u64)
        elif wait and events[i].data.u64 & WATCH_MASK == WATCH_MAILBOX:
            measure_wake_up(reactor)


cdef bint engines_busy(reactor_t* reactor) noexcept nogil:
    cdef uint32_t i
    for i in range(reactor.engine_count):
        if reactor.engines[i].unflushed:
            return True
        if reactor.engines[i].inflight and not reactor.engines[i].watched:
            return True
    return False


cdef bint arm_engines(reactor_t* reactor, bint armed) noexcept nogil:
    cdef uint32_t i
    cdef bint pending = False
    for i in range(reactor.engine_count):
        if reactor.engines[i].inflight and reactor.engines[i].watched:
            pending |= reactor.engines[i].arm(reactor.engines[i], armed)
    return pending


cdef bint reactor_may_sleep(reactor_t* reactor) noexcept nogil:
    """After a turn without work; a wait for engines is polled for the window."""
    if reactor.hot != NULL or engines_busy(reactor):
        return False
    return (reactor.now - reactor.last_work > reactor.pacing.window
            or not engines_inflight(reactor))


cdef void reactor_sleep(reactor_t* reactor) noexcept nogil:
    """Nothing is HOT: wait in epoll, unless something came in meanwhile."""
    store_release_u32(&reactor.mailbox.asleep, 1)
    fence_seq_cst()  # [A]
    if load_acquire_ptr(&reactor.mailbox.messages) == NULL and not arm_engines(reactor, True):
        reactor.place = PLACE_SLEEP
        reactor_look(reactor, True)
        reactor.place = PLACE_QUEUES
    arm_engines(reactor, False)
    store_release_u32(&reactor.mailbox.asleep, 0)


cdef void reactor_run(reactor_t* reactor) noexcept nogil:
    """Until a stop message."""
    cdef uint64_t before, after
    cdef int work
    reactor.running = 1
    reactor.now = reactor.last_work = tsc_read()
    while not reactor.stopping:
        before = reactor.now
        work = reactor_turn(reactor)
        after = tsc_read()
        reactor.now = after
        if work:
            reactor.busy += after - before
            if reactor.served != NULL:
                count_time(reactor, reactor.served, after)
            reactor.last_work = after
        else:
            reactor.idle += after - before
        if not work and reactor_may_sleep(reactor):
            pacing_nap(&reactor.pacing)
            reactor_sleep(reactor)
            reactor.now = tsc_read()
            reactor.idle += reactor.now - after
        elif after >= reactor.next_look:
            reactor.next_look = after + reactor.look_every
            if reactor.armed_count:
                reactor_look(reactor, False)
        if not work:
            cpu_pause()
    reactor.place = PLACE_SETUP


cdef void reactor_notify(reactor_t* reactor, int call) noexcept nogil:
    """Signal a guest. May block when the eventfd's other holder wants it to: see rescue()."""
    cdef uint64_t one = 1
    cdef uint8_t place = reactor.place
    reactor.place = PLACE_NOTIFY
    store_release_u32(<uint32_t*>&reactor.notifying, <uint32_t>call)
    write(call, &one, sizeof(one))
    store_release_u32(<uint32_t*>&reactor.notifying, <uint32_t>-1)
    reactor.place = place
