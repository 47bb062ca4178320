"""The loop of one core: polls what is busy, sleeps when nothing is.

Each source (a virtqueue) is HOT or ARMED. HOT ones are polled in every turn with
their notifications off; one that had no work for the window is armed: it turns
its notifications on and looks once more. When no source is HOT and no engine
has work, the thread sleeps in epoll, where kicks, engine descriptors and the
mailbox's doorbell wake it. A turn serves messages, sources, engines, and then
publishes what completed.

Context: all of it runs on the reactor's own thread, without the GIL.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.unistd cimport write

from drivebay.memory.platform cimport (
    CHECK, cpu_pause, fence_seq_cst, load_acquire_ptr, store_release_u32, tsc_read)
from drivebay.reactor.mailbox cimport mailbox_take, message_t
from drivebay.reactor.pacing cimport pacing_learn, pacing_nap
from drivebay.reactor.watch cimport (
    WATCH_ENGINE, WATCH_MASK, WATCH_SOURCE, epoll_event, epoll_wait, unwatch, watch)

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
    """No work for the window; while requests are in flight, no work anywhere for so long."""
    if source.kick < 0 or reactor.now - source.last_work <= reactor.pacing.window:
        return False
    return not source.inflight or reactor.now - reactor.last_work > reactor.pacing.window


cdef int serve_sources(reactor_t* reactor) noexcept nogil:
    """Poll each HOT source once; arm those that had no work for the window."""
    cdef source_t* source = reactor.hot
    cdef source_t* following
    cdef source_t* greedy = NULL
    cdef int done, work = 0
    while source != NULL:
        following = source.next
        reactor.blocks_short = 0
        done = source.poll(source, reactor)
        if done and reactor.blocks_short and greedy == NULL:
            greedy = source
        if done:
            source.last_work = reactor.now
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
    for i in range(reactor.engine_count):
        engine = reactor.engines[i]
        if engine.unflushed:
            engine.flush(engine, reactor)
        if engine.inflight:
            if reactor.running:
                reactor.now = tsc_read()    # what a flush completes at once took time too
            work += engine.poll(engine, reactor)
    return work


cdef void publish_dirty(reactor_t* reactor) noexcept nogil:
    cdef source_t* source = reactor.dirty
    cdef source_t* following
    reactor.dirty = NULL
    while source != NULL:
        following = source.next_dirty
        source.dirty = 0
        source.publish(source, reactor)
        source = following


cdef int reactor_turn(reactor_t* reactor) noexcept nogil:
    """Messages, sources, engines, publish. Returns: work done."""
    cdef int work = 0
    if load_acquire_ptr(&reactor.mailbox.messages) != NULL:
        reactor.place = PLACE_MESSAGES
        work += run_messages(reactor)
    reactor.place = PLACE_QUEUES
    if reactor.hot != NULL:
        work += serve_sources(reactor)
    if reactor.engine_count:
        reactor.place = PLACE_ENGINES
        work += serve_engines(reactor)
    if reactor.dirty != NULL:
        publish_dirty(reactor)
    reactor.loops += 1
    return work


cdef void reactor_look(reactor_t* reactor, int timeout_ms) noexcept nogil:
    """See what epoll has: kicks make their source HOT; the rest only wakes us."""
    cdef epoll_event events[LOOK_EVENTS]
    cdef int i, count
    count = epoll_wait(reactor.epoll, events, LOOK_EVENTS, timeout_ms)
    CHECK(count >= 0 or errno == EINTR)
    for i in range(count):
        if events[i].data.u64 & WATCH_MASK == WATCH_SOURCE:
            reactor_wake(reactor, <source_t*>events[i].data.u64)


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


cdef void reactor_sleep(reactor_t* reactor) noexcept nogil:
    """Nothing is HOT: wait in epoll, unless something came in meanwhile."""
    store_release_u32(&reactor.mailbox.asleep, 1)
    fence_seq_cst()  # [A]
    if load_acquire_ptr(&reactor.mailbox.messages) == NULL and not arm_engines(reactor, True):
        reactor.place = PLACE_SLEEP
        reactor_look(reactor, -1)
        reactor.place = PLACE_QUEUES
    arm_engines(reactor, False)
    store_release_u32(&reactor.mailbox.asleep, 0)


cdef void reactor_run(reactor_t* reactor) noexcept nogil:
    """Until a stop message."""
    cdef uint64_t before, after
    cdef int work
    cdef bint polling = False       # the last turns found nothing, and none slept
    reactor.running = 1
    reactor.now = tsc_read()
    while not reactor.stopping:
        before = reactor.now
        work = reactor_turn(reactor)
        after = tsc_read()
        reactor.now = after
        if work:
            if polling:
                pacing_learn(&reactor.pacing, before - reactor.last_work)
            polling = False
            reactor.busy += after - before
            reactor.last_work = after
        else:
            polling = True
            reactor.idle += after - before
        if reactor.hot == NULL and not engines_busy(reactor) and not work and (
            after - reactor.last_work > reactor.pacing.window or not engines_inflight(reactor)
        ):
            pacing_nap(&reactor.pacing)
            reactor_sleep(reactor)
            polling = False
            reactor.now = tsc_read()
            reactor.idle += reactor.now - after
        elif after >= reactor.next_look:
            reactor.next_look = after + reactor.look_every
            if reactor.armed_count:
                reactor_look(reactor, 0)
        if not work:
            cpu_pause()
    reactor.place = PLACE_SETUP


cdef bint engines_inflight(reactor_t* reactor) noexcept nogil:
    cdef uint32_t i
    for i in range(reactor.engine_count):
        if reactor.engines[i].inflight:
            return True
    return False


cdef void reactor_notify(reactor_t* reactor, int call) noexcept nogil:
    """Signal a guest. May block when the eventfd's other holder wants it to: see rescue()."""
    cdef uint64_t one = 1
    cdef uint8_t place = reactor.place
    reactor.place = PLACE_NOTIFY
    store_release_u32(<uint32_t*>&reactor.notifying, <uint32_t>call)
    write(call, &one, sizeof(one))
    store_release_u32(<uint32_t*>&reactor.notifying, <uint32_t>-1)
    reactor.place = place
