"""epoll, as the reactor uses it: each event carries a pointer and what it points to."""

from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from posix.time cimport timespec

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL
    enum: EPOLLIN
    enum: EPOLLET
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int op, int fd, epoll_event* event)
    int epoll_pwait2(int epoll, epoll_event* events, int count, const timespec* timeout,
                     const void* signals)

# What an epoll event points to, in the low bits of its pointer.
cdef enum:
    WATCH_SOURCE = 0
    WATCH_ENGINE = 1
    WATCH_MAILBOX = 2
    WATCH_MASK = 3

cdef inline int watch(int epoll, int fd, void* what, uint32_t kind) noexcept nogil:
    """Edge-triggered, so that it need never be read. Returns: 0 or -errno."""
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLET
    event.data.u64 = <uint64_t>what | kind
    if epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) != 0:
        return -errno
    return 0

cdef inline void unwatch(int epoll, int fd) noexcept nogil:
    cdef epoll_event unused
    if fd >= 0:
        epoll_ctl(epoll, EPOLL_CTL_DEL, fd, &unused)
