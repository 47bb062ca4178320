"""io_uring as the kernel has it: io_uring_setup(2), io_uring_enter(2), Linux 6.1.

Nothing but declarations.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

cdef extern from "<linux/io_uring.h>" nogil:
    cdef struct io_sqring_offsets:
        uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array
    cdef struct io_cqring_offsets:
        uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags
    cdef struct io_uring_params:
        uint32_t sq_entries, cq_entries, flags, features
        io_sqring_offsets sq_off
        io_cqring_offsets cq_off
    cdef struct io_uring_sqe:
        uint8_t opcode
        uint8_t flags
        int32_t fd
        uint64_t off
        uint64_t addr
        uint32_t len
        uint32_t rw_flags
        uint64_t user_data
    cdef struct io_uring_cqe:
        uint64_t user_data
        int32_t res
        uint32_t flags
    cdef struct io_uring_rsrc_register:
        uint32_t nr
        uint32_t flags
    cdef struct io_uring_files_update:
        uint32_t offset
        uint64_t fds
    enum:
        IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC, IORING_OP_FALLOCATE
        IORING_OP_READ, IORING_OP_WRITE
        IOSQE_ASYNC, IOSQE_FIXED_FILE
        IORING_SETUP_R_DISABLED, IORING_SETUP_SINGLE_ISSUER, IORING_SETUP_DEFER_TASKRUN
        IORING_SETUP_TASKRUN_FLAG, IORING_SETUP_CQSIZE, IORING_SETUP_IOPOLL
        IORING_ENTER_GETEVENTS, IORING_SQ_TASKRUN, IORING_SQ_CQ_OVERFLOW
        IORING_CQ_EVENTFD_DISABLED
        IORING_REGISTER_EVENTFD, IORING_REGISTER_ENABLE_RINGS, IORING_REGISTER_IOWQ_AFF
        IORING_REGISTER_FILES2, IORING_REGISTER_FILES_UPDATE, IORING_RSRC_REGISTER_SPARSE
        IORING_OFF_SQ_RING, IORING_OFF_SQES

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register
    long syscall(long number, ...)
