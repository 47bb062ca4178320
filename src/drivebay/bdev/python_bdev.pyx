"""A disk in plain Python: its methods run in threads of the bdev, never on a reactor.

A reactor hands each I/O to the threads as a request, which comes from a list of the
channel; an I/O that finds none free waits there. A thread takes the oldest request, copies
the guest's data in pieces, calls the disk, and posts the outcome to the mailbox of the
reactor that the I/O came from, which completes it there. A VM monitor may cut its memory
off under a copy: the handler in memory/guest_memory puts other memory in its place.

Context: reactor for submit, act_finish and post; the bdev's threads from run() on; control.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EIO, errno
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.unistd cimport close, read, write

from drivebay.bdev.base cimport (
    BDEV_VOLATILE_CACHE, Bdev, Channel, IO_FLUSH, IO_READ, IO_UNMAP, IO_WRITE, IO_WRITE_ZEROES,
    SUBMIT_PENDING, channel_t, io_complete, io_t,
)
from drivebay.memory.platform cimport (
    compare_exchange_ptr, exchange_ptr, fence_seq_cst, load_acquire_ptr, load_relaxed_u32,
    store_release_u32,
)
from drivebay.reactor.io cimport io_list_append, io_list_take, io_locate
from drivebay.reactor.mailbox cimport mailbox_post, message_t

import logging
import threading

from drivebay.bdev.python_disk import Faults, PythonDisk
from drivebay.errors import HostError, UsageError

cdef extern from "<sys/eventfd.h>" nogil:
    int EFD_CLOEXEC
    int EFD_SEMAPHORE
    int eventfd(unsigned int value, int flags)

_log = logging.getLogger(__name__)

MOST_THREADS = 64
OPERATIONS = {IO_READ: "read", IO_WRITE: "write", IO_FLUSH: "flush", IO_UNMAP: "unmap",
              IO_WRITE_ZEROES: "write_zeroes"}


# --- on the reactor ------------------------------------------------------------------------

cdef int python_submit(channel_t* channel, io_t* io) noexcept nogil:
    cdef python_t* state = <python_t*>channel.module
    if state.free == NULL:
        io_list_append(&state.waiting, io)
    else:
        post(state, io)
    return SUBMIT_PENDING


cdef void post(python_t* state, io_t* io) noexcept nogil:
    """Hand it to the threads. Bound: retried only while other reactors win."""
    cdef calls_t* calls = state.calls
    cdef request_t* request = state.free
    cdef uint64_t ring = 1
    state.free = request.next
    request.io = io
    while True:
        request.next = <request_t*>load_acquire_ptr(&calls.posted)
        if compare_exchange_ptr(&calls.posted, request.next, request):
            break
    # Behind another one it needs no ring: who takes that one takes both, and wakes the next.
    fence_seq_cst()     # pairs with [A] in wait
    if request.next == NULL and load_relaxed_u32(&calls.sleepers):
        write(calls.doorbell, &ring, sizeof(ring))


cdef void act_finish(message_t* message, void* reactor) noexcept nogil:
    """A thread is done with a request."""
    cdef request_t* request = <request_t*>message
    cdef python_t* state = <python_t*>message.target
    cdef io_t* io = request.io
    io.status = <int32_t>message.result
    request.next = state.free
    state.free = request
    if state.waiting.first != NULL:
        post(state, io_list_take(&state.waiting))
    io_complete(io)


# --- in the bdev's threads -----------------------------------------------------------------

cdef void copy_guest(io_t* io, uint8_t* data, uint64_t length) noexcept nogil:
    """Move the next bytes of an I/O between the guest and ``data``; they fit."""
    cdef uint64_t skip = 0, part
    cdef uint32_t i = io_locate(io, &skip)
    io.done += length
    while length:
        part = min(<uint64_t>io.iov[i].iov_len - skip, length)
        if io.operation == IO_READ:
            memcpy(<uint8_t*>io.iov[i].iov_base + skip, data, part)
        else:
            memcpy(data, <uint8_t*>io.iov[i].iov_base + skip, part)
        data += part
        length -= part
        skip = 0
        i += 1


cdef class PythonChannel(Channel):
    def __init__(self, PythonBdev bdev, reactor):
        cdef request_t* request
        cdef int i
        Channel.__init__(self, bdev, reactor)
        self.state.calls = &bdev.calls
        for i in range(REQUESTS):
            request = &self.state.requests[i]
            request.message.act = act_finish
            request.message.target = &self.state
            request.message.reply_to = &self.reactor.raw.mailbox
            request.next = self.state.free
            self.state.free = request
        self.raw.submit = python_submit
        self.raw.module = &self.state


cdef class PythonBdev(Bdev):
    product_name = "Python disk"
    module = "python"

    def __cinit__(self):
        self.calls.doorbell = -1

    def __init__(self, str name, uuid, disk):
        if not isinstance(disk, PythonDisk):
            raise UsageError(f"{type(disk).__name__} is no PythonDisk: derive it from that class")
        if not 1 <= disk.threads <= MOST_THREADS:
            raise UsageError(f"{disk.threads} threads for bdev '{name}'; 1 to {MOST_THREADS} are "
                             "possible", field="threads")
        Bdev.__init__(self, name, uuid, disk.block_size, disk.num_blocks)
        self.disk = disk
        self.threads = []
        self.starting = threading.Lock()
        self.faults = Faults(f"Python disk '{name}'")
        for operation, method in OPERATIONS.items():
            if disk.has(method):
                self.raw.operations |= 1 << operation
        self.readonly = not disk.has("write")
        if self.readonly:
            self.raw.operations &= 1 << IO_READ
        if not self.raw.operations & 1 << IO_READ:
            raise UsageError(f"the class {type(disk).__name__} has no method read")
        if self.raw.operations & 1 << IO_FLUSH:
            self.raw.flags = BDEV_VOLATILE_CACHE
        self.calls.doorbell = eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE)
        if self.calls.doorbell < 0:
            raise HostError("cannot make an eventfd", errno)

    def open_channel(self, reactor, *bases):
        self.start()
        return PythonChannel(self, reactor)

    def start(self):
        """Start the threads, with the first channel."""
        with self.starting:
            while len(self.threads) < self.disk.threads:
                number = len(self.threads)
                thread = threading.Thread(
                    target=self.run, name=f"{self.name}_{number}", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise HostError(f"no thread for bdev '{self.name}'", EAGAIN) from error
                self.threads.append(thread)

    def run(self):
        """One thread: serve the oldest request, or wait for one."""
        cdef request_t* request
        while True:
            request = self.take()
            if request != NULL:
                request.message.result = self.serve(request)
                # From here on the request is the reactor's again.
                with nogil:
                    mailbox_post(request.message.reply_to, &request.message)
            elif self.stopping:
                return
            else:
                self.wait()

    cdef request_t* take(self):
        """The oldest request, or NULL. The GIL keeps the other threads out meanwhile."""
        cdef request_t* request
        cdef request_t* following
        cdef uint64_t ring = 1
        if self.oldest == NULL:
            request = <request_t*>exchange_ptr(&self.calls.posted, NULL)
            while request != NULL:
                following = request.next
                request.next = self.oldest
                self.oldest = request
                request = following
        request = self.oldest
        if request != NULL:
            self.oldest = request.next
            if self.oldest != NULL and self.calls.sleepers:
                write(self.calls.doorbell, &ring, sizeof(ring))
        return request

    cdef int wait(self) except -1:
        """Until somebody rings; a ring for nothing is possible."""
        cdef uint64_t ring = 0
        store_release_u32(&self.calls.sleepers, self.calls.sleepers + 1)
        with nogil:
            fence_seq_cst()     # [A]
            if load_acquire_ptr(&self.calls.posted) == NULL:
                read(self.calls.doorbell, &ring, sizeof(ring))
        store_release_u32(&self.calls.sleepers, self.calls.sleepers - 1)
        return 0

    cdef int serve(self, request_t* request) noexcept:
        """Returns: 0 or -errno; whatever the disk's code does, the I/O ends with one of them."""
        try:
            self.call(request.io)
            return 0
        except BaseException as error:
            try:
                return -self.faults.add(OPERATIONS[request.io.operation], error)
            except BaseException:
                return -EIO     # even the report of the fault failed

    cdef int call(self, io_t* io) except -1:
        if io.operation == IO_READ:
            return self.read_pieces(io)
        if io.operation == IO_WRITE:
            return self.write_pieces(io)
        if io.operation == IO_FLUSH:
            self.disk.flush()
        elif io.operation == IO_UNMAP:
            self.disk.unmap(io.offset, io.length)
        else:
            self.disk.write_zeroes(io.offset, io.length)
        return 0

    cdef int read_pieces(self, io_t* io) except -1:
        cdef Py_buffer view
        cdef uint64_t length
        io.done = 0
        while io.done < io.length:
            length = min(<uint64_t>PIECE_BYTES, io.length - io.done)
            data = self.disk.read(io.offset + io.done, length)
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            try:
                if <uint64_t>view.len != length:
                    raise ValueError(
                        f"read({io.offset + io.done}, {length}) gave {view.len} bytes")
                with nogil:
                    copy_guest(io, <uint8_t*>view.buf, length)
            finally:
                PyBuffer_Release(&view)
        return 0

    cdef int write_pieces(self, io_t* io) except -1:
        cdef bytes data
        cdef uint8_t* place
        cdef uint64_t offset, length
        io.done = 0
        while io.done < io.length:
            offset = io.offset + io.done
            length = min(<uint64_t>PIECE_BYTES, io.length - io.done)
            data = PyBytes_FromStringAndSize(NULL, length)
            place = <uint8_t*>PyBytes_AS_STRING(data)
            with nogil:
                copy_guest(io, place, length)
            self.disk.write(offset, data)
        return 0

    # --- control -----------------------------------------------------------------------

    def driver_specific(self):
        return {"python": {"class": type(self.disk).__name__, "threads": self.disk.threads,
                           "failed_calls": self.faults.count}}

    def close(self):
        """No I/O is in flight any more, so the threads are idle and end at once."""
        cdef uint64_t ring = 1
        self.stopping = True
        for _ in self.threads:
            write(self.calls.doorbell, &ring, sizeof(ring))
        for thread in self.threads:
            thread.join()
        self.threads = []
        if self.calls.doorbell >= 0:
            close(self.calls.doorbell)
            self.calls.doorbell = -1
            try:
                self.disk.close()
            except BaseException as error:
                self.faults.add("close", error)

    def __dealloc__(self):
        if self.calls.doorbell >= 0:
            close(self.calls.doorbell)
