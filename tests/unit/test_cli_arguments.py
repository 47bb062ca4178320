"""What is typed: sizes, cpumasks, vhost's options, and how they are refused."""

from __future__ import annotations

import argparse
import doctest
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.cli import completion, vhost
from drivebay.cli.arguments import parse_size
from drivebay.disks import sizes
from drivebay.errors import DrivebayError, HostError, NotFound, UsageError
from drivebay.target import options as target_options
from drivebay.target.options import (
    Options,
    check_options,
    format_cpumask,
    parse_cpumask,
)


@pytest.mark.parametrize("module", [sizes, completion, target_options])
def test_the_examples_in_the_docstrings_hold(module: object) -> None:
    results = doctest.testmod(module)  # type: ignore[arg-type]
    assert results.attempted
    assert not results.failed


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("4k", 4096),
        ("4K", 4096),
        ("10G", 10 << 30),
        ("1.5T", 3 << 39),
        ("0.5k", 512),
        ("16MiB", 16 << 20),
        ("16MB", 16 << 20),
        ("7b", 7),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_sizes_are_binary(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "G", "-1", "1.5", "0.0001k", "1e3", "10 G", "4kk", "0x10", "8192P", "\u0664k", "1,5G"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"size|whole number|more than"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("0x1", (0,)),
        ("0X5", (0, 2)),
        ("f", (0, 1, 2, 3)),
        ("[0]", (0,)),
        ("[0,2-3]", (0, 2, 3)),
        ("[3, 0, 3]", (0, 3)),
    ],
)
def test_cpumasks(text: str, cores: tuple[int, ...]) -> None:
    assert parse_cpumask(text, range(4)) == cores
    assert parse_cpumask(format_cpumask(cores), range(4)) == cores


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "neither a hexadecimal mask nor a list"),
        ("-1", "neither a hexadecimal mask nor a list"),
        ("[0", "neither a hexadecimal mask nor a list"),
        ("0", "names no possible core"),
        ("[2-1]", "names cores 2 to 1"),
        ("0x10", "names core 4, which is not among .* 0-3"),
        ("[1,5-6,9]", "names core 5-6,9, which is not among .* 0-3"),
    ],
)
def test_bad_cpumasks_are_refused_by_value(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_cpumask(text, range(4))
    assert caught.value.field == "cpumask"


def read(*words: str) -> Options:
    return vhost.read_options(vhost.build_parser().parse_args(words))


def test_without_options_it_is_spdks_defaults() -> None:
    options = read()
    assert options == Options()
    assert options.rpc_socket == "/var/tmp/spdk.sock"
    assert options.cores == (0,)
    assert options.socket_dir == "."


def test_every_option_of_vhost_is_understood() -> None:
    options = read(
        *("-S", "/run/d", "-m", "[0]", "-p", "0", "-r", "/run/d/rpc", "-s", "1024"),
        *("-c", "a.json", "-L", "vhost", "-L", "bdev", "-f", "/run/d/pid", "--wait-for-rpc"),
        *("--json-ignore-init-errors", "--rpcs-allowed", "bdev_get_bdevs, spdk_get_version"),
        *("--silence-noticelog", "--poll-us", "-1", "--autosave", "--socket-mode", "0660"),
        *("--socket-group", "kvm"),
    )
    assert options == Options(
        socket_dir="/run/d",
        cores=(0,),
        main_core=0,
        rpc_socket="/run/d/rpc",
        memory_mb=1024,
        config="a.json",
        log_flags=("vhost", "bdev"),
        pid_file="/run/d/pid",
        wait_for_rpc=True,
        ignore_init_errors=True,
        rpcs_allowed=frozenset({"bdev_get_bdevs", "spdk_get_version"}),
        silence_notice=True,
        poll_us=-1,
        autosave=True,
        socket_mode=0o660,
        socket_group="kvm",
    )


@pytest.mark.parametrize(
    ("words", "value"),
    [(["-s", "2G"], 2048), (["-s2048"], 2048), (["--mem-size=0"], 0)],
)
def test_memory_is_megabytes_or_a_size(words: list[str], value: int) -> None:
    assert read(*words).memory_mb == value


@pytest.mark.parametrize("word", ["-c", "--config", "--json"])
def test_a_configuration_has_three_names(word: str) -> None:
    assert read(word, "x.json").config == "x.json"


def test_no_rpc_server() -> None:
    assert read("--no-rpc-server", "-r", "/x").rpc_socket is None


def test_what_has_no_meaning_here_is_accepted_with_one_warning_each(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    words = ["-n", "4", "-i0", "-g", "-g", "-R", "--huge-dir", "/h", "-u", "--iova-mode=va"]
    assert vhost.main([*words, "-S", str(missing)]) == 1
    lines = capsys.readouterr().err.splitlines()
    warned = [line.split()[3] for line in lines if line.startswith("drivebay: warning: option ")]
    assert warned == ["-n", "-i", "-g", "-R", "--huge-dir", "-u", "--iova-mode"]
    assert all(" is ignored: " in line for line in lines[:7])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nosuch"], "unrecognized arguments: --nosuch"),
        (["--rpc-sock", "/x"], "unrecognized arguments"),
        (["-s", "lots"], "'lots' is not a size"),
        (["-p", "-1"], "argument -p"),
        (["--poll-us", "-2"], "'-2' is not a number of microseconds"),
        (["--socket-mode", "999"], "'999' is not a mode"),
        (["word"], "unrecognized arguments: word"),
        (["-c"], "expected one argument"),
    ],
)
def test_a_malformed_command_line_is_a_usage_error(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        vhost.main(words)
    assert caught.value.hint == "see 'drivebay vhost --help'"


def test_rpc_over_tcp_is_refused() -> None:
    with pytest.raises(UsageError, match="RPC over TCP is not offered"):
        read("-r", "127.0.0.1:5260")


def good(tmp_path: Path, **changes: object) -> Options:
    settings = {"socket_dir": str(tmp_path), "rpc_socket": str(tmp_path / "rpc.sock"), **changes}
    return Options(**settings)  # type: ignore[arg-type]


def test_good_options_pass_and_create_nothing(tmp_path: Path) -> None:
    config = tmp_path / "new.json"
    check_options(good(tmp_path, config=str(config), autosave=True, pid_file=str(tmp_path / "p")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (
            {"socket_dir": "{tmp}/no"},
            NotFound,
            "'{tmp}/no' for controllers' sockets does not exist",
        ),
        ({"socket_dir": "{tmp}/file"}, UsageError, "'{tmp}/file' is not a folder"),
        ({"socket_dir": "{long}"}, UsageError, "leaves no room for a socket's name"),
        ({"rpc_socket": "{tmp}/no/rpc.sock"}, NotFound, "'{tmp}/no' for the RPC socket"),
        ({"rpc_socket": "{long}/rpc.sock"}, UsageError, "a socket address holds at most 107"),
        ({"pid_file": "{tmp}/no/pid"}, NotFound, "'{tmp}/no' for the pid file"),
        ({"config": "{tmp}/no.json"}, NotFound, "file '{tmp}/no.json' does not exist"),
        ({"autosave": True}, UsageError, "--autosave has no file to write"),
        ({"main_core": 4000}, UsageError, "main core 4000 is not among the cores"),
    ],
)
def test_what_can_not_work_on_this_host_is_refused(
    tmp_path: Path, changes: dict[str, object], error: type[DrivebayError], said: str
) -> None:
    (tmp_path / "file").touch()
    long = tmp_path / ("x" * 110)
    long.mkdir()

    def fill(text: object) -> object:
        return text.format(tmp=tmp_path, long=long) if isinstance(text, str) else text

    with pytest.raises(error) as caught:
        check_options(good(tmp_path, **{name: fill(value) for name, value in changes.items()}))
    assert str(fill(said)) in str(caught.value)


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder in which everybody may look; the test then runs as nobody if it was root."""
    own = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        if own == 0:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(own)


def test_what_the_user_may_not_do_is_said(unprivileged: Path) -> None:
    sealed = unprivileged / "sealed"
    owner = os.geteuid()
    os.seteuid(os.getuid())
    sealed.mkdir(0o500)
    (sealed / "a.json").touch(0o000)
    os.seteuid(owner)
    with pytest.raises(HostError, match=f"user {owner} can't write to the folder '{sealed}' for c"):
        check_options(Options(socket_dir=str(sealed)))
    with pytest.raises(HostError, match="the configuration file"):
        check_options(Options(socket_dir="/tmp", config=str(sealed / "a.json")))


def test_without_a_target_completion_knows_no_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drivebay.disks.connection.find_socket", lambda named: f"{tmp_path}/none")
    assert completion.candidates(["rpc", ""]) == ["save_config", "load_config"]
    assert completion.candidates(["rpc", "--s"]) == ["--socket"]


def test_completion_of_options_and_subcommands() -> None:
    assert completion.candidates([""])[:2] == ["vhost", "target"]
    assert completion.candidates(["target", "st"]) == ["start", "stop", "status"]
    assert completion.candidates(["target", "stop", "--f"]) == ["--force"]
    assert completion.candidates(["completion", "z"]) == ["zsh"]
    assert "--rpc-socket" in completion.candidates(["vhost", "--r"])
    assert "--huge-dir" not in completion.candidates(["vhost", "--"])
    assert completion.candidates(["nosuch", ""]) == []
