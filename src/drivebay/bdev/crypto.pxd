"""The crypto bdev: what lies on its base is encrypted, block by block, with AES-XTS."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from drivebay.bdev.base cimport Bdev, Channel, channel_t, io_t, iovec
from drivebay.bdev.filter cimport FilterBdev
from drivebay.reactor.io cimport io_list_t
from drivebay.reactor.reactor cimport engine_t
from drivebay.reactor.turn_engine cimport TurnEngine

cdef extern from "<openssl/evp.h>" nogil:
    ctypedef struct EVP_CIPHER_CTX:
        pass

cdef enum:
    KEY_MOST_BYTES = 64         # both halves of an XTS key of 256 bits
    BUFFER_BYTES = 131072       # no smaller than the largest block
    BUFFER_COUNT = 64

# What is not encrypted or decrypted at once on one reactor, of all crypto bdevs.
cdef struct ciphers_t:
    engine_t engine             # first: the reactor knows only this
    io_list_t waiting           # these go on a piece in each turn
    uint64_t turn               # tick of the turn in which …
    uint64_t spent              # … so many bytes were worked on

# A write on its way: what is in the buffer is encrypted. Also of one that clears.
cdef struct sealed_t:
    sealed_t* next
    crypto_t* crypto
    iovec* iov                  # the caller's
    uint64_t offset
    uint64_t length
    uint64_t moved              # bytes that are on the base
    uint32_t iov_count
    uint8_t operation           # the caller's: write, or write zeroes
    iovec part                  # what the base sees
    uint8_t* buffer

# channel.module of a crypto channel
cdef struct crypto_t:
    channel_t* channel
    channel_t* base
    ciphers_t* ciphers
    EVP_CIPHER_CTX* encrypt
    EVP_CIPHER_CTX* decrypt
    sealed_t* free
    io_list_t bufferless        # writes that wait for a buffer
    uint8_t* whole              # one block, gathered from several of the guest's buffers

cdef class CryptoKey:
    cdef readonly str name
    cdef readonly str cipher
    cdef readonly int bits      # of each half
    cdef uint8_t* material      # both halves
    cdef int read_half(self, str digits, uint8_t* into, str field) except -1

cdef class CipherEngine(TurnEngine):
    cdef ciphers_t raw

cdef class CryptoChannel(Channel):
    cdef crypto_t crypto
    cdef CipherEngine ciphers
    cdef void* memory
    cdef int allocate(self) except -1
    cdef EVP_CIPHER_CTX* context(self, CryptoKey key, bint encrypting) except NULL

cdef class CryptoBdev(FilterBdev):
    cdef readonly CryptoKey key
