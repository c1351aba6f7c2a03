"""The assembler against an interpreter of classic BPF, and the default profile."""

from __future__ import annotations

import errno
import itertools
import struct
from typing import Any

import pytest

from mlenv.container import seccomp
from mlenv.container.syscall_table import numbers

ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
MACHINES = ("x86_64", "aarch64")


def evaluate(program: bytes, number: int, arguments: tuple[int, ...] = (), arch: int = 0xC000003E) -> int:
    """Run the filter as the kernel would. Source: Documentation/networking/filter.rst."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *(arguments + (0,) * 6)[:6])
    code = list(struct.iter_unpack("<HBBI", program))
    at = accumulator = steps = 0
    while True:
        opcode, jump_true, jump_false, value = code[at]
        at += 1
        steps += 1
        assert steps < 200
        if opcode == 0x06:
            return value
        if opcode == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif opcode == 0x54:
            accumulator &= value
        elif opcode == 0x05:
            at += value
        else:
            holds = {
                0x15: accumulator == value,
                0x25: accumulator > value,
                0x35: accumulator >= value,
            }[opcode]
            at += jump_true if holds else jump_false


def profile(*rules: dict[str, Any], default: str = "SCMP_ACT_ERRNO") -> dict[str, Any]:
    return {"defaultAction": default, "syscalls": list(rules)}


@pytest.mark.parametrize("machine", MACHINES)
def test_every_number_gets_its_rule(machine: str) -> None:
    arch = seccomp.ARCHITECTURES[machine][1]
    table = numbers(machine)
    rules = seccomp.default_profile(["CAP_SYS_CHROOT"])
    program = seccomp.assemble(rules, machine)
    allowed = set(rules["syscalls"][0]["names"])
    for name, number in table.items():
        if name not in {"clone", "clone3", "personality", "socket"}:
            wanted = ALLOW if name in allowed else ERRNO | errno.EPERM
            assert evaluate(program, number, arch=arch) == wanted, name


@pytest.mark.parametrize("number", [470, 1000, 0x40000000, 0xFFFFFFFF])
def test_unknown_numbers_do_not_exist(number: int) -> None:
    program = seccomp.assemble(seccomp.default_profile([]), "x86_64")
    assert evaluate(program, number) == ERRNO | errno.ENOSYS


def test_another_architecture_is_killed() -> None:
    assert evaluate(seccomp.assemble(seccomp.default_profile([]), "x86_64"), 0, arch=0x40000003) == KILL


def test_clone_makes_processes_and_no_namespaces() -> None:
    program = seccomp.assemble(seccomp.default_profile([]), "x86_64")
    number = numbers("x86_64")["clone"]
    assert evaluate(program, number, (0x11,)) == ALLOW
    for bit in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert evaluate(program, number, (0x11 | bit,)) == ERRNO | errno.EPERM
    assert evaluate(program, numbers("x86_64")["clone3"]) == ERRNO | errno.ENOSYS


def test_vsock_is_the_only_family_refused() -> None:
    program = seccomp.assemble(seccomp.default_profile([]), "x86_64")
    number = numbers("x86_64")["socket"]
    assert [family for family in range(48) if evaluate(program, number, (family,)) != ALLOW] == [40]


@pytest.mark.parametrize("high", [1, 0x80000000, 0xFFFFFFFF])
def test_a_family_is_told_by_the_bits_that_the_kernel_takes(high: int) -> None:
    program = seccomp.assemble(seccomp.default_profile([]), "x86_64")
    number = numbers("x86_64")["socket"]
    assert evaluate(program, number, (high << 32 | 40,)) == ERRNO | errno.EPERM
    assert evaluate(program, number, (high << 32 | 2,)) == ALLOW


def test_chown_that_succeeds_without_doing() -> None:
    program = seccomp.assemble(seccomp.default_profile(["CAP_CHOWN"], ignore_chown=True), "x86_64")
    for name in ("chown", "fchown", "lchown", "fchownat"):
        assert evaluate(program, numbers("x86_64")[name]) == ERRNO


VALUES = (0, 1, 5, 0xFFFFFFFF, 0x100000000, 0x100000005, 0xFFFFFFFFFFFFFFFF)


@pytest.mark.parametrize(
    ("operator", "holds"),
    [
        ("SCMP_CMP_EQ", lambda a, b: a == b),
        ("SCMP_CMP_NE", lambda a, b: a != b),
        ("SCMP_CMP_LT", lambda a, b: a < b),
        ("SCMP_CMP_LE", lambda a, b: a <= b),
        ("SCMP_CMP_GT", lambda a, b: a > b),
        ("SCMP_CMP_GE", lambda a, b: a >= b),
    ],
)
def test_operators_compare_64_bits(operator: str, holds: Any) -> None:
    for argument, value in itertools.product(VALUES, VALUES):
        rule = {
            "names": ["read"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 2, "value": value, "op": operator}],
        }
        program = seccomp.assemble(profile(rule), "x86_64")
        wanted = ALLOW if holds(argument, value) else ERRNO | errno.EPERM
        assert evaluate(program, 0, (0, 0, argument)) == wanted, (argument, value)


def test_masked_comparison() -> None:
    test = {"index": 0, "value": 0xF0, "valueTwo": 0x20, "op": "SCMP_CMP_MASKED_EQ"}
    program = seccomp.assemble(
        profile({"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [test]}), "x86_64"
    )
    assert evaluate(program, 0, (0x2F,)) == ALLOW
    assert evaluate(program, 0, (0x30,)) == ERRNO | errno.EPERM


def test_conditions_of_a_rule_all_hold_and_rules_are_alternatives() -> None:
    def when(*tests: tuple[int, int]) -> dict[str, Any]:
        args = [{"index": index, "value": value, "op": "SCMP_CMP_EQ"} for index, value in tests]
        return {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": args}

    program = seccomp.assemble(profile(when((0, 1), (1, 2)), when((0, 9))), "x86_64")
    found = [
        arguments
        for arguments in itertools.product(range(10), range(4))
        if evaluate(program, 0, arguments) == ALLOW
    ]
    assert found == [(1, 2), (9, 0), (9, 1), (9, 2), (9, 3)]


def test_more_rules_than_a_short_jump_reaches() -> None:
    rules = [
        {"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": number + 1}
        for name, number in numbers("x86_64").items()
    ]
    program = seccomp.assemble(profile(*rules), "x86_64")
    assert all(evaluate(program, number) == ERRNO | number + 1 for number in numbers("x86_64").values())


@pytest.mark.parametrize(
    "rule",
    [
        {"names": ["read"], "action": "SCMP_ACT_NOTIFY"},
        {
            "names": ["read"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_ODD"}],
        },
    ],
)
def test_what_it_cannot_do_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not supported"):
        seccomp.assemble(profile(rule), "x86_64")


@pytest.mark.parametrize("capability", ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_SYS_TIME"])
def test_a_capability_opens_its_calls(capability: str) -> None:
    without = set(seccomp.default_profile([])["syscalls"][0]["names"])
    gained = set(seccomp.default_profile([capability])["syscalls"][0]["names"]) - without
    assert gained
    assert not without & gained
