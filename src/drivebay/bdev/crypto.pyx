"""AES-XTS between a disk and those who read and write it; OpenSSL has the cipher.

A data unit is one block, its tweak the block's number, little endian: with blocks of 512
bytes the base holds what Linux's dm-crypt (aes-xts-plain64) would have written.

Writes are encrypted into buffers of the channel, never in the guest's; when all are in use
the write waits for one. Reads are decrypted in place after the base has read, so a guest
that looks too early sees what is on the disk. A block that is not zeroes after an unmap:
the base's zeroes, decrypted. To clear is to write encrypted zeroes.

So that nobody holds up a reactor, each one works on so many bytes a turn, of all crypto
bdevs, and what is beyond goes on in the next. OpenSSL may allocate inside.
"""

from libc.errno cimport EINVAL, EIO, ENOMEM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)

from drivebay.bdev.base cimport (
    FRAME_DONE, FRAME_TAKEN, IO_READ, IO_WRITE, IO_WRITE_ZEROES, SUBMIT_DONE, SUBMIT_PENDING,
    SUBMIT_QUEUED, Bdev, Channel, channel_t, io_complete, io_push, io_t, iovec,
)
from drivebay.bdev.entry cimport bdev_submit
from drivebay.bdev.filter cimport FilterBdev
from drivebay.reactor.io cimport io_list_append, io_list_take, io_locate
from drivebay.reactor.reactor cimport engine_t, reactor_t
from drivebay.reactor.turn_engine cimport engine_of

from drivebay.errors import HostError, UsageError

cdef extern from "<openssl/evp.h>" nogil:
    ctypedef struct EVP_CIPHER:
        pass
    const EVP_CIPHER* EVP_aes_128_xts()
    const EVP_CIPHER* EVP_aes_256_xts()
    EVP_CIPHER_CTX* EVP_CIPHER_CTX_new()
    void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX* context)
    int EVP_CipherInit_ex(EVP_CIPHER_CTX* context, const EVP_CIPHER* cipher, void* engine,
                          const uint8_t* key, const uint8_t* iv, int encrypting)
    int EVP_CipherUpdate(EVP_CIPHER_CTX* context, uint8_t* into, int* into_length,
                         const uint8_t* origin, int length)

cdef extern from "<openssl/crypto.h>" nogil:
    void OPENSSL_cleanse(void* memory, size_t length)

cdef enum:
    TURN_BYTES = 524288         # worked on in one turn, some 0.6 ms
    PIECE_BYTES = 131072
    TWEAK_BYTES = 16
    HALF_MOST_BYTES = 32


# --- one block -----------------------------------------------------------------------------

cdef inline bint do_block(
    EVP_CIPHER_CTX* context, uint64_t number, uint8_t* into, const uint8_t* origin, int length
) noexcept nogil:
    """Encrypt or decrypt a data unit, also in place. Returns: did OpenSSL do it?"""
    cdef uint8_t tweak[TWEAK_BYTES]
    cdef int i, written = 0
    for i in range(8):
        tweak[i] = <uint8_t>(number >> (8 * i))
        tweak[8 + i] = 0
    return (EVP_CipherInit_ex(context, NULL, NULL, NULL, tweak, -1) == 1
            and EVP_CipherUpdate(context, into, &written, origin, length) == 1
            and written == length)


cdef inline bint may_work(crypto_t* crypto, uint64_t length) noexcept nogil:
    """Is there room in this turn? Then it is taken."""
    cdef ciphers_t* ciphers = crypto.ciphers
    if ciphers.turn != crypto.channel.reactor.now:
        ciphers.turn = crypto.channel.reactor.now
        ciphers.spent = 0
    if ciphers.spent >= TURN_BYTES:
        return False
    ciphers.spent += length
    return True


cdef void wait_a_turn(crypto_t* crypto, io_t* io, void* what) noexcept nogil:
    """Go on in the engine's poll; ``what`` is the sealed_t of a write, a read's crypto_t."""
    io.engine = <uint64_t>what
    io_list_append(&crypto.ciphers.waiting, io)
    crypto.ciphers.engine.inflight += 1


# --- reads: decrypted in place ---------------------------------------------------------------

cdef void copy_block(
    const iovec* iov, uint64_t skip, uint8_t* block, uint64_t length, bint into_block
) noexcept nogil:
    """Between one block and the caller's buffers, from ``skip`` of the first of them on."""
    cdef uint64_t part
    cdef uint8_t* place
    while length:
        place = <uint8_t*>iov.iov_base + skip
        part = min(<uint64_t>iov.iov_len - skip, length)
        if into_block:
            memcpy(block, place, part)
        else:
            memcpy(place, block, part)
        block += part
        length -= part
        skip = 0
        iov += 1


cdef bint decrypt_piece(crypto_t* crypto, io_t* io) noexcept nogil:
    """Decrypt the next blocks of what was read; io.done counts. Returns: are all done?"""
    cdef uint64_t block = crypto.channel.bdev.block_size, skip = 0
    cdef uint64_t stop = min(io.length, io.done + PIECE_BYTES)
    cdef uint64_t number = (io.offset + io.done) // block
    cdef iovec* iov = &io.iov[io_locate(io, &skip)]
    cdef uint8_t* place
    while io.done < stop:
        while skip >= iov.iov_len:
            skip -= iov.iov_len
            iov += 1
        if iov.iov_len - skip >= block:
            place = <uint8_t*>iov.iov_base + skip
        else:
            place = crypto.whole
            copy_block(iov, skip, place, block, True)
        if not do_block(crypto.decrypt, number, place, place, block):
            io.status = -EIO
        if place == crypto.whole:
            copy_block(iov, skip, place, block, False)
        skip += block
        io.done += block
        number += 1
    return io.done == io.length


cdef bint decrypt(crypto_t* crypto, io_t* io) noexcept nogil:
    """As much as may be done now. Returns: is all done? Else it goes on in later turns."""
    while io.status == 0:
        if not may_work(crypto, min(<uint64_t>PIECE_BYTES, io.length - io.done)):
            wait_a_turn(crypto, io, crypto)
            return False
        if decrypt_piece(crypto, io):
            break
    return True


cdef int read_done(io_t* io, void* context, uint64_t saved, uint64_t stamp) noexcept nogil:
    cdef crypto_t* crypto = <crypto_t*>context
    io.done = 0
    return FRAME_DONE if decrypt(crypto, io) else FRAME_TAKEN


cdef int submit_read(crypto_t* crypto, io_t* io) noexcept nogil:
    cdef int how
    io_push(io, read_done, crypto, 0)
    how = bdev_submit(crypto.base, io)
    if how != SUBMIT_DONE:
        return how
    io.frame_count -= 1
    io.done = 0
    return SUBMIT_DONE if decrypt(crypto, io) else SUBMIT_PENDING


# --- writes: encrypted into a buffer ----------------------------------------------------------

cdef bint seal_part(sealed_t* sealed, uint64_t length) noexcept nogil:
    """Encrypt the next part into the buffer. Returns: did OpenSSL do all of it?"""
    cdef crypto_t* crypto = sealed.crypto
    cdef uint64_t block = crypto.channel.bdev.block_size, done = 0, skip = sealed.moved
    cdef uint64_t number = (sealed.offset + sealed.moved) // block
    cdef uint8_t* into = sealed.buffer
    cdef const uint8_t* origin
    cdef iovec* iov = sealed.iov
    if sealed.operation == IO_WRITE_ZEROES:
        memset(crypto.whole, 0, block)
    while done < length:
        origin = crypto.whole
        if sealed.operation != IO_WRITE_ZEROES:
            while skip >= iov.iov_len:
                skip -= iov.iov_len
                iov += 1
            if iov.iov_len - skip >= block:
                origin = <uint8_t*>iov.iov_base + skip
            else:
                copy_block(iov, skip, crypto.whole, block, True)
            skip += block
        if not do_block(crypto.encrypt, number, into, origin, block):
            return False
        into += block
        done += block
        number += 1
    return True


cdef int send(sealed_t* sealed, io_t* io) noexcept nogil:
    """Encrypt and submit parts until one is pending. Returns: SUBMIT_DONE or SUBMIT_PENDING."""
    cdef crypto_t* crypto = sealed.crypto
    cdef uint64_t length
    io.status = 0
    while sealed.moved < sealed.length:
        length = min(<uint64_t>BUFFER_BYTES, sealed.length - sealed.moved)
        if not may_work(crypto, length):
            wait_a_turn(crypto, io, sealed)
            return SUBMIT_PENDING
        if not seal_part(sealed, length):
            io.status = -EIO
            break
        sealed.part.iov_base = sealed.buffer
        sealed.part.iov_len = length
        io.iov = &sealed.part
        io.iov_count = 1
        io.operation = IO_WRITE
        io.offset = sealed.offset + sealed.moved
        io.length = length
        io_push(io, part_done, sealed, 0)
        if bdev_submit(crypto.base, io) != SUBMIT_DONE:
            return SUBMIT_PENDING
        io.frame_count -= 1
        if io.status < 0:
            break
        sealed.moved += length
    give_back(sealed, io)
    return SUBMIT_DONE


cdef int part_done(io_t* io, void* context, uint64_t saved, uint64_t stamp) noexcept nogil:
    cdef sealed_t* sealed = <sealed_t*>context
    cdef crypto_t* crypto = sealed.crypto
    sealed.moved = sealed.length if io.status < 0 else sealed.moved + io.length
    if io.status < 0:
        give_back(sealed, io)
    elif send(sealed, io) != SUBMIT_DONE:
        return FRAME_TAKEN
    serve_bufferless(crypto)
    return FRAME_DONE


cdef void give_back(sealed_t* sealed, io_t* io) noexcept nogil:
    """Restore the caller's view; the buffer is free."""
    io.iov = sealed.iov
    io.iov_count = sealed.iov_count
    io.operation = sealed.operation
    io.offset = sealed.offset
    io.length = sealed.length
    sealed.next = sealed.crypto.free
    sealed.crypto.free = sealed


cdef void serve_bufferless(crypto_t* crypto) noexcept nogil:
    """Writes that waited for a buffer, as long as there is one. Bound: those that wait."""
    cdef io_t* io
    while crypto.free != NULL and crypto.bufferless.first != NULL:
        io = io_list_take(&crypto.bufferless)
        if start(crypto, io) == SUBMIT_DONE:
            io_complete(io)


cdef int start(crypto_t* crypto, io_t* io) noexcept nogil:
    cdef sealed_t* sealed = crypto.free
    crypto.free = sealed.next
    sealed.iov = io.iov
    sealed.iov_count = io.iov_count
    sealed.offset = io.offset
    sealed.length = io.length
    sealed.operation = io.operation
    sealed.moved = 0
    return send(sealed, io)


cdef int crypto_submit(channel_t* channel, io_t* io) noexcept nogil:
    cdef crypto_t* crypto = <crypto_t*>channel.module
    if io.operation == IO_READ:
        return submit_read(crypto, io)
    if io.operation != IO_WRITE and io.operation != IO_WRITE_ZEROES:
        return bdev_submit(crypto.base, io)     # flush and unmap concern no content
    if crypto.free == NULL:
        io_list_append(&crypto.bufferless, io)
        return SUBMIT_QUEUED
    return start(crypto, io)


# --- what goes on in later turns ---------------------------------------------------------------

cdef int ciphers_poll(engine_t* engine, reactor_t* reactor) noexcept nogil:
    """Go on with those that wait, the oldest first. Bound: TURN_BYTES, and one more each."""
    cdef ciphers_t* ciphers = <ciphers_t*>engine
    cdef io_t* io
    cdef sealed_t* sealed
    cdef crypto_t* crypto
    cdef uint32_t left = engine.inflight
    while left and (ciphers.turn != reactor.now or ciphers.spent < TURN_BYTES):
        left -= 1
        engine.inflight -= 1
        io = io_list_take(&ciphers.waiting)
        if io.operation == IO_READ:
            crypto = <crypto_t*>io.engine
            if decrypt(crypto, io):
                io_complete(io)
            continue
        sealed = <sealed_t*>io.engine
        crypto = sealed.crypto
        if send(sealed, io) == SUBMIT_DONE:
            io_complete(io)
            serve_bufferless(crypto)
    return 1


cdef class CipherEngine(TurnEngine):
    def __init__(self):
        self.serve(&self.raw.engine, ciphers_poll, NULL)


# --- keys ------------------------------------------------------------------------------------

cdef class CryptoKey:
    """An AES-XTS key. Its bytes lie here alone, and are wiped at the end."""

    def __cinit__(self):
        self.material = <uint8_t*>malloc(KEY_MOST_BYTES)
        if self.material == NULL:
            raise MemoryError()
        memset(self.material, 0, KEY_MOST_BYTES)

    def __init__(self, str name, str key, str key2):
        self.name = name
        self.cipher = "AES_XTS"
        if len(key) not in (32, 64):
            raise UsageError(f"the key has {len(key)} hexadecimal digits, AES-XTS needs 32 or 64",
                             field="key")
        if len(key2) != len(key):
            raise UsageError(f"the second key has {len(key2)} hexadecimal digits, the first "
                             f"{len(key)}", field="key2")
        self.bits = 4 * len(key)
        self.read_half(key, self.material, "key")
        self.read_half(key2, self.material + self.bits // 8, "key2")
        if not memcmp(self.material, self.material + self.bits // 8, self.bits // 8):
            raise UsageError("both keys are the same, which is not secure", field="key2")

    def __repr__(self):
        return f"<CryptoKey {self.name!r}>"

    cdef int read_half(self, str digits, uint8_t* into, str field) except -1:
        cdef Py_UCS4 digit
        cdef int i = 0, value
        for digit in digits:
            if u"0" <= digit <= u"9":
                value = <int>digit - 48
            elif u"a" <= digit <= u"f":
                value = <int>digit - 87
            elif u"A" <= digit <= u"F":
                value = <int>digit - 55
            else:
                raise UsageError("the key is not made of hexadecimal digits", field=field)
            into[i // 2] = <uint8_t>(into[i // 2] << 4 | value)
            i += 1
        return 0

    def digits(self):
        cdef int half = self.bits // 8
        return ((<bytes>self.material[:half]).hex(), (<bytes>self.material[half:2 * half]).hex())

    def __reduce__(self):
        raise TypeError("a key is not pickled")

    def __dealloc__(self):
        if self.material != NULL:
            OPENSSL_cleanse(self.material, KEY_MOST_BYTES)
            free(self.material)


# --- the bdev ----------------------------------------------------------------------------------

cdef class CryptoChannel(Channel):
    def __init__(self, CryptoBdev bdev, reactor, Channel base):
        Channel.__init__(self, bdev, reactor)
        self.allocate()
        self.ciphers = engine_of(self.reactor, CipherEngine)
        self.crypto.channel = &self.raw
        self.crypto.base = &base.raw        # open for longer than this one
        self.crypto.ciphers = &self.ciphers.raw
        self.crypto.encrypt = self.context(bdev.key, True)
        self.crypto.decrypt = self.context(bdev.key, False)
        self.raw.submit = crypto_submit
        self.raw.module = &self.crypto

    cdef int allocate(self) except -1:
        """Untouched until used, so it costs address space only."""
        cdef int i
        cdef sealed_t* sealed
        self.memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if self.memory == MAP_FAILED:
            self.memory = NULL
            raise HostError(f"no memory for the buffers of bdev '{self.bdev.name}'", ENOMEM)
        self.crypto.whole = <uint8_t*>self.memory + BUFFER_COUNT * BUFFER_BYTES
        sealed = <sealed_t*>(self.crypto.whole + BUFFER_BYTES)
        for i in range(BUFFER_COUNT):
            sealed[i].buffer = <uint8_t*>self.memory + i * BUFFER_BYTES
            sealed[i].crypto = &self.crypto
            sealed[i].next = self.crypto.free
            self.crypto.free = &sealed[i]
        return 0

    cdef EVP_CIPHER_CTX* context(self, CryptoKey key, bint encrypting) except NULL:
        cdef EVP_CIPHER_CTX* made = EVP_CIPHER_CTX_new()
        cdef const EVP_CIPHER* cipher = EVP_aes_128_xts() if key.bits == 128 else EVP_aes_256_xts()
        if made == NULL:
            raise HostError(f"OpenSSL has no memory for bdev '{self.bdev.name}'", ENOMEM)
        if EVP_CipherInit_ex(made, cipher, NULL, key.material, NULL, encrypting) != 1:
            EVP_CIPHER_CTX_free(made)
            raise HostError(f"OpenSSL does not take key '{key.name}'", EINVAL)
        return made

    def __dealloc__(self):
        # OpenSSL wipes what it derived from the key.
        EVP_CIPHER_CTX_free(self.crypto.encrypt)
        EVP_CIPHER_CTX_free(self.crypto.decrypt)
        if self.memory != NULL:
            munmap(self.memory, MEMORY_BYTES)


cdef size_t MEMORY_BYTES = BUFFER_COUNT * (BUFFER_BYTES + sizeof(sealed_t)) + BUFFER_BYTES


cdef class CryptoBdev(FilterBdev):
    product_name = "crypto"
    module = "crypto"

    def __init__(self, str name, uuid, Bdev base, CryptoKey key):
        FilterBdev.__init__(self, name, uuid, base)
        self.stand_on([base], 1)
        self.key = key
        self.raw.operations &= ~<uint32_t>(1 << IO_WRITE_ZEROES)
        if base.raw.operations & (1 << IO_WRITE):
            self.raw.operations |= 1 << IO_WRITE_ZEROES

    @property
    def content_id(self):
        return f"{self.bases[0].content_id}, key '{self.key.name}'"

    def open_channel(self, reactor, *bases):
        return CryptoChannel(self, reactor, bases[0])

    def driver_specific(self):
        return {"crypto": {"base_bdev_name": self.bases[0].name, "name": self.name,
                           "key_name": self.key.name}}
