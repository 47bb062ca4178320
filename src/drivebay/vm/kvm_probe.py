"""The program that asks /dev/kvm to run a loop, and says by its exit code whether it was fast.

Context: a short-lived child process of ``vm.kvm``; it may hang, its parent ends it then.
It imports nothing of Drivebay, and it must never be called in a process that matters.

An accessible /dev/kvm is no proof: a nested or para-virtual KVM may emulate real-mode
code one instruction at a time, and then a kernel seems to hang in its first second. A
million turns of a two-instruction loop take about a millisecond on hardware and most
of a second when emulated.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import sys
import time

__all__ = ["LIMIT_SECONDS", "loop_seconds"]

LIMIT_SECONDS = 0.1
LOOP_TURNS = 1_000_000
GUEST_BYTES = 0x1000

# linux/kvm.h, x86-64
KVM_API_VERSION = 12
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_RUN = 0xAE80
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_EXIT_HLT = 5

SIZEOF_SREGS = 312
SIZEOF_REGS = 144
SREGS_CS_BASE = 0
SREGS_CS_SELECTOR = 12
REGS_RIP = 128
REGS_RFLAGS = 136
RUN_EXIT_REASON = 8
RFLAGS_ALWAYS_SET = 2


def loop_seconds() -> float | None:
    """Run the loop in a new virtual CPU; None when it did not end by its HLT."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    if fcntl.ioctl(kvm, KVM_GET_API_VERSION, 0) != KVM_API_VERSION:
        return None
    machine = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    memory = mmap.mmap(-1, GUEST_BYTES)
    # mov ecx, LOOP_TURNS; again: dec ecx; jnz again; hlt    (16-bit code, 32-bit operands)
    code = b"\x66\xb9" + struct.pack("<I", LOOP_TURNS) + b"\x66\x49\x75\xfc\xf4"
    memory[: len(code)] = code
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    region = struct.pack("=IIQQQ", 0, 0, 0, GUEST_BYTES, address)
    fcntl.ioctl(machine, KVM_SET_USER_MEMORY_REGION, region)

    cpu = fcntl.ioctl(machine, KVM_CREATE_VCPU, 0)
    run = mmap.mmap(cpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
    special = bytearray(SIZEOF_SREGS)
    fcntl.ioctl(cpu, KVM_GET_SREGS, special, True)
    struct.pack_into("=Q", special, SREGS_CS_BASE, 0)
    struct.pack_into("=H", special, SREGS_CS_SELECTOR, 0)
    fcntl.ioctl(cpu, KVM_SET_SREGS, bytes(special))
    general = bytearray(SIZEOF_REGS)
    struct.pack_into("=Q", general, REGS_RFLAGS, RFLAGS_ALWAYS_SET)
    struct.pack_into("=Q", general, REGS_RIP, 0)
    fcntl.ioctl(cpu, KVM_SET_REGS, bytes(general))

    start = time.monotonic()
    fcntl.ioctl(cpu, KVM_RUN, 0)
    seconds = time.monotonic() - start
    (reason,) = struct.unpack_from("=I", run, RUN_EXIT_REASON)
    return seconds if reason == KVM_EXIT_HLT else None


if __name__ == "__main__":
    try:
        measured = loop_seconds()
    except OSError as error:
        sys.exit(f"/dev/kvm: {error.strerror}")
    if measured is None:
        sys.exit("/dev/kvm did not run the probe to its end")
    if measured > LIMIT_SECONDS:
        sys.exit(f"/dev/kvm emulates instructions: {measured:.2f} s for a loop of about 0.001 s")
