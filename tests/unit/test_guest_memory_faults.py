"""Guest memory that is truncated under us: SIGBUS ends nobody but the one who did it.

Each test is a process of its own, for a signal's action belongs to the whole process.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

PREAMBLE = """
import mmap, os, signal, sys
from drivebay.memory.guest_memory import MemoryTable, Region, install_sigbus_handler
from drivebay.reactor.mailbox import ControlMailbox
MIB = 1 << 20
def memory(guest=0, size=MIB):
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size)
    return fd, Region(guest, size, guest, 0, fd)
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script)],
        text=True,
        capture_output=True,
        timeout=60,
    )


def expect_ok(script: str) -> None:
    done = run(script)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-2000:]}"
    assert done.stdout == "reached the end\n"


def test_truncation_breaks_the_table_and_control_hears_of_it_once() -> None:
    expect_ok("""
        install_sigbus_handler()
        control = ControlMailbox()
        heard = []
        fd, region = memory()
        table = MemoryTable([region], on_broken=lambda: heard.append("broken"))
        table.write(0, b"before")
        assert not table.broken
        os.ftruncate(fd, 0)
        assert table.read(MIB - 8, 8) == bytes(8)
        assert table.broken
        assert heard == [], "told from within a fault"
        import select
        assert select.select([control.fileno()], [], [], 10)[0], "control was not woken"
        assert control.drain() == 1
        assert heard == ["broken"]
        table.write(0, b"into nothing")
        table.read(0, MIB)
        control.drain()
        assert heard == ["broken"]
        table.release()
        print("reached the end")
    """)


def test_others_keep_their_memory_and_hear_nothing() -> None:
    """The broken region lies between two good ones of other tables."""
    expect_ok("""
        install_sigbus_handler()
        control = ControlMailbox()
        heard = []
        good = []
        for name in ("first", "second"):
            fd, region = memory()
            good.append(MemoryTable([region], on_broken=lambda name=name: heard.append(name)))
            good[-1].write(100, name.encode())
            if name == "first":
                bad_fd, bad_region = memory()
                bad = MemoryTable([bad_region], on_broken=lambda: heard.append("bad"))
        os.ftruncate(bad_fd, 4096)
        bad.write(0, bytes(MIB))
        control.drain()
        assert heard == ["bad"]
        assert bad.broken and not good[0].broken and not good[1].broken
        assert good[0].read(100, 5) == b"first" and good[1].read(100, 6) == b"second"
        print("reached the end")
    """)


def test_all_tables_that_share_a_broken_mapping_hear_of_it() -> None:
    expect_ok("""
        install_sigbus_handler()
        control = ControlMailbox()
        heard = []
        fd, region = memory()
        old = MemoryTable([region], on_broken=lambda: heard.append("old"))
        new = MemoryTable([region], old, on_broken=lambda: heard.append("new"))
        os.ftruncate(fd, 0)
        new.read(0, 1)
        control.drain()
        assert sorted(heard) == ["new", "old"]
        print("reached the end")
    """)


def test_a_broken_mapping_is_not_lent_to_the_next_table() -> None:
    """The file has its length again; the anonymous memory over it would lose all writes."""
    expect_ok("""
        install_sigbus_handler()
        control = ControlMailbox()
        fd, region = memory()
        old = MemoryTable([region])
        os.ftruncate(fd, 0)
        old.read(0, 1)
        os.ftruncate(fd, MIB)
        new = MemoryTable([region], old)
        assert not new.broken
        new.write(0, b"lasting")
        assert os.pread(fd, 7, 0) == b"lasting"
        old.release()
        new.release()
        print("reached the end")
    """)


def test_a_place_in_the_table_of_mappings_is_clean_when_used_again() -> None:
    expect_ok("""
        install_sigbus_handler()
        for _ in range(20):
            fd, region = memory()
            table = MemoryTable([region])
            assert not table.broken
            os.ftruncate(fd, 0)
            table.read(0, 1)
            assert table.broken
            table.release()
            os.close(fd)
        print("reached the end")
    """)


def test_many_threads_may_fault_at_the_same_time() -> None:
    expect_ok("""
        import threading
        install_sigbus_handler()
        control = ControlMailbox()
        heard = []
        for _ in range(20):
            fd, region = memory()
            table = MemoryTable([region], on_broken=lambda: heard.append(1))
            os.ftruncate(fd, 0)
            start = threading.Barrier(4)
            def touch():
                start.wait()
                for page in range(0, MIB, 4096):
                    table.write(page, b"x")
            threads = [threading.Thread(target=touch) for _ in range(4)]
            [t.start() for t in threads]
            [t.join() for t in threads]
            control.drain()
            table.release()
            os.close(fd)
        assert len(heard) == 20
        print("reached the end")
    """)


def test_a_fault_that_is_not_guest_memory_still_ends_the_process() -> None:
    """It is a fault of our own: hiding it would loop for ever."""
    done = run("""
        install_sigbus_handler()
        fd, region = memory()
        foreign = mmap.mmap(fd, MIB)
        os.ftruncate(fd, 0)
        foreign[0]
        print("survived")
    """)
    assert done.returncode == -signal.SIGBUS
    assert done.stdout == ""


def test_a_doorbell_that_is_gone_is_not_rung() -> None:
    """Its number may be another file's by now: eight bytes written into somebody's disk."""
    expect_ok("""
        install_sigbus_handler()
        control = ControlMailbox()
        number = control.fileno()
        del control
        victim = os.memfd_create("victim")
        os.dup2(victim, number)
        fd, region = memory()
        table = MemoryTable([region])
        os.ftruncate(fd, 0)
        table.read(0, 1)
        assert os.fstat(victim).st_size == 0
        print("reached the end")
    """)


def test_installing_the_handler_twice_keeps_the_former_action() -> None:
    done = run("""
        install_sigbus_handler()
        install_sigbus_handler()
        fd, region = memory()
        foreign = mmap.mmap(fd, MIB)
        os.ftruncate(fd, 0)
        foreign[0]
    """)
    assert done.returncode == -signal.SIGBUS
