"""Seccomp profiles of the OCI runtime specification, assembled to a classic BPF program here.

libseccomp's binding costs 53 ms to import and its releases lag behind the kernel; a filter is a sorted
table and a binary search. Numbers above the last known one get ENOSYS, so a C library falls back as on an
older kernel.

Source: seccomp(2); OCI runtime-spec 1.0.2 config-linux.md "Seccomp"; the default profile follows moby's.
"""

from __future__ import annotations

import os

from mlenv.container.syscall_table import numbers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Conditions = tuple[tuple[int, str, int, int], ...]
    Verdicts = dict[int, list[tuple[Conditions, int]]]

ARCHITECTURES = {"x86_64": ("SCMP_ARCH_X86_64", 0xC000003E), "aarch64": ("SCMP_ARCH_AARCH64", 0xC00000B7)}
"""Per machine: its name in OCI and its AUDIT_ARCH number."""
KNOWN_ARCHITECTURES = frozenset(
    ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM")
)

_EPERM, _ENOSYS = 1, 38
_RET_ERRNO = 0x00050000
_ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": _RET_ERRNO,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
_LOAD, _JUMP, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_NOT_LESS, _AND, _RETURN = (
    0x20,
    0x05,
    0x15,
    0x25,
    0x35,
    0x54,
    0x06,
)
_NUMBER_OFFSET, _ARCH_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16
_SHORT_JUMP_MAX = 255
PROGRAM_MAX = 4096
"""Most instructions the kernel takes (BPF_MAXINSNS)."""

_PRIVILEGED = {
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_SYS_ADMIN": (
        "bpf fanotify_init fsconfig fsmount fsopen fspick listmount lookup_dcookie lsm_set_self_attr mount"
        " mount_setattr move_mount open_tree open_tree_attr perf_event_open pivot_root quotactl quotactl_fd"
        " setdomainname sethostname setns statmount umount2 unshare"
    ),
    "CAP_SYS_BOOT": "reboot kexec_load kexec_file_load",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module init_module finit_module",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd",
    "CAP_SYS_RAWIO": "iopl ioperm",
    "CAP_SYS_TIME": "settimeofday clock_settime",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYSLOG": "syslog",
}
_NEVER = (
    "_sysctl add_key afs_syscall create_module get_kernel_syms getpmsg io_uring_enter io_uring_register"
    " io_uring_setup keyctl migrate_pages move_pages nfsservctl putpmsg query_module request_key security"
    " swapoff swapon sysfs tuxcall uselib userfaultfd ustat vmsplice vserver"
)
_CONDITIONAL = frozenset(("clone", "clone3", "personality", "socket"))
_NAMESPACE_FLAGS = 0x7E020000
_FAMILIES = ((0xFFFFFFE0, 0), (0xFFFFFFF8, 32), (0xFFFFFFFF, 41), (0xFFFFFFFE, 42), (0xFFFFFFFC, 44))
"""Masks and values of the address families 0 to 47 without 40, AF_VSOCK, which reaches the hypervisor.

Of the argument's 64 bits the kernel takes 32, and a caller may leave anything in the others.
"""
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
"""Linux, 16-bit and 32-bit user ids, and the question which one it is."""


def default_profile(capabilities: Sequence[str], *, ignore_chown: bool = False) -> dict[str, Any]:
    """Return the OCI `linux.seccomp` of a container that has `capabilities`.

    Everything known is allowed but what needs a capability that is not there, what has a record of kernel
    bugs, and new namespaces. Other than moby's: NUMA placement (`mbind` and its like) is allowed, PyTorch
    and NCCL use it. `ignore_chown` makes the chown family succeed without doing anything.
    """
    held = set(capabilities)
    native = numbers(os.uname().machine)
    refused = set(_NEVER.split()) | _CONDITIONAL
    for capability, names in _PRIVILEGED.items():
        if capability not in held:
            refused.update(names.split())
    rules: list[dict[str, Any]] = []
    if ignore_chown:
        family = ["chown", "fchown", "fchownat", "lchown"]
        rules.append({"names": family, "action": "SCMP_ACT_ERRNO", "errnoRet": 0})
        refused.update(family)
    rules.append({"names": sorted(set(native) - refused), "action": "SCMP_ACT_ALLOW"})
    rules += _conditional_rules("CAP_SYS_ADMIN" in held)
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _EPERM,
        "architectures": [ARCHITECTURES[os.uname().machine][0]],
        "syscalls": rules,
    }


def _conditional_rules(namespaces: bool) -> list[dict[str, Any]]:  # noqa: FBT001
    def when(name: str, value: int, mask: int | None = None) -> dict[str, Any]:
        test: dict[str, Any] = {"index": 0, "value": value, "op": "SCMP_CMP_EQ"}
        if mask is not None:
            test |= {"value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}
        return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [test]}

    rules = [when("personality", value) for value in _PERSONALITIES]
    rules += [when("socket", value, mask) for mask, value in _FAMILIES]
    if namespaces:
        rules.append({"names": ["clone", "clone3"], "action": "SCMP_ACT_ALLOW"})
    else:
        rules.append(when("clone", 0, _NAMESPACE_FLAGS))
        rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS})
    return rules


def assemble(profile: Mapping[str, Any], machine: str) -> bytes:
    """Return `profile` as a cBPF program for `machine`.

    Raises: ValueError for an action, operator or architecture this assembler has not.
    """
    if machine not in ARCHITECTURES:
        raise ValueError(f"no seccomp table for {machine}")
    table = numbers(machine)
    default = _action(profile["defaultAction"], profile.get("defaultErrnoRet"))
    verdicts = _verdicts(profile.get("syscalls", ()), table)
    ranges = _ranges(verdicts, default, max(table.values()))
    code = [
        _instruction(_LOAD, 0, 0, _ARCH_OFFSET),
        _instruction(_JUMP_EQUAL, 1, 0, ARCHITECTURES[machine][1]),
        _instruction(_RETURN, 0, 0, _ACTIONS["SCMP_ACT_KILL_PROCESS"]),
        _instruction(_LOAD, 0, 0, _NUMBER_OFFSET),
        *_search(ranges),
    ]
    if len(code) > PROGRAM_MAX:
        raise ValueError(f"the profile needs {len(code)} instructions, the kernel takes {PROGRAM_MAX}")
    return b"".join(code)


def _action(name: str, errno_value: int | None) -> int:
    if name not in _ACTIONS:
        raise ValueError(f"seccomp action `{name}` is not supported")
    if name == "SCMP_ACT_ERRNO":
        return _RET_ERRNO | (_EPERM if errno_value is None else errno_value) & 0xFFFF
    return _ACTIONS[name]


def _verdicts(rules: Sequence[Mapping[str, Any]], table: Mapping[str, int]) -> Verdicts:
    """Return by number the list of (conditions, action); names this architecture has not are left out."""
    verdicts: Verdicts = {}
    for rule in rules:
        action = _action(rule["action"], rule.get("errnoRet"))
        conditions = tuple(
            (test["index"], test["op"], test["value"], test.get("valueTwo", 0))
            for test in rule.get("args") or ()
        )
        for name in rule["names"]:
            if name in table:
                verdicts.setdefault(table[name], []).append((conditions, action))
    return verdicts


def _ranges(verdicts: Verdicts, default: int, last: int) -> list[tuple[int, list[bytes]]]:
    """Return (first number, code) of each run of numbers with the same code, ascending."""
    ranges: list[tuple[int, list[bytes]]] = []
    before: Sequence[tuple[Conditions, int]] | None = None
    for number in range(last + 1):
        rules = verdicts.get(number, ())
        if rules == before:  # most have their neighbour's rules
            continue
        before = rules
        code = _leaf(rules, default)
        if not ranges or ranges[-1][1] != code:
            ranges.append((number, code))
    ranges.append((last + 1, [_instruction(_RETURN, 0, 0, _RET_ERRNO | _ENOSYS)]))
    return ranges


def _leaf(rules: Sequence[tuple[Conditions, int]], default: int) -> list[bytes]:
    """Return the code for one number: conditional rules in turn, then the unconditional one or default."""
    code: list[bytes] = []
    final = default
    for conditions, action in rules:
        if conditions:
            code += _conditional(conditions, action)
        else:
            final = action
    return [*code, _instruction(_RETURN, 0, 0, final)]


def _conditional(conditions: Conditions, action: int) -> list[bytes]:
    """Return code that returns `action` when all conditions hold and falls through when one does not."""
    code = [_instruction(_RETURN, 0, 0, action)]
    for index, operation, value, value_two in reversed(conditions):
        code = _test(index, operation, value, value_two, len(code)) + code
    return code


def _test(index: int, operation: str, value: int, value_two: int, rest: int) -> list[bytes]:
    """Return code that falls through when the test holds and skips `rest` more instructions when not.

    An argument has 64 bits and the machine 32: the high word is compared first.
    """
    low, high = _ARGUMENTS_OFFSET + 8 * index, _ARGUMENTS_OFFSET + 8 * index + 4
    if operation == "SCMP_CMP_EQ":
        return [
            _instruction(_LOAD, 0, 0, high),
            _instruction(_JUMP_EQUAL, 0, rest + 2, value >> 32),
            _instruction(_LOAD, 0, 0, low),
            _instruction(_JUMP_EQUAL, 0, rest, value & 0xFFFFFFFF),
        ]
    if operation == "SCMP_CMP_NE":
        return [
            _instruction(_LOAD, 0, 0, high),
            _instruction(_JUMP_EQUAL, 0, 2, value >> 32),
            _instruction(_LOAD, 0, 0, low),
            _instruction(_JUMP_EQUAL, rest, 0, value & 0xFFFFFFFF),
        ]
    if operation == "SCMP_CMP_MASKED_EQ":
        return [
            _instruction(_LOAD, 0, 0, high),
            _instruction(_AND, 0, 0, value >> 32),
            _instruction(_JUMP_EQUAL, 0, rest + 3, value_two >> 32),
            _instruction(_LOAD, 0, 0, low),
            _instruction(_AND, 0, 0, value & 0xFFFFFFFF),
            _instruction(_JUMP_EQUAL, 0, rest, value_two & 0xFFFFFFFF),
        ]
    if operation in ("SCMP_CMP_GE", "SCMP_CMP_GT"):
        greater = _JUMP_NOT_LESS if operation == "SCMP_CMP_GE" else _JUMP_GREATER
        return [
            _instruction(_LOAD, 0, 0, high),
            _instruction(_JUMP_GREATER, 3, 0, value >> 32),
            _instruction(_JUMP_EQUAL, 0, rest + 2, value >> 32),
            _instruction(_LOAD, 0, 0, low),
            _instruction(greater, 0, rest, value & 0xFFFFFFFF),
        ]
    if operation in ("SCMP_CMP_LE", "SCMP_CMP_LT"):
        greater = _JUMP_GREATER if operation == "SCMP_CMP_LE" else _JUMP_NOT_LESS
        return [
            _instruction(_LOAD, 0, 0, high),
            _instruction(_JUMP_GREATER, rest + 3, 0, value >> 32),
            _instruction(_JUMP_EQUAL, 0, 2, value >> 32),
            _instruction(_LOAD, 0, 0, low),
            _instruction(greater, rest, 0, value & 0xFFFFFFFF),
        ]
    raise ValueError(f"seccomp operator `{operation}` is not supported")


def _search(ranges: list[tuple[int, list[bytes]]]) -> list[bytes]:
    """Return a binary search over `ranges` with their code as leaves."""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    left, right = _search(ranges[:middle]), _search(ranges[middle:])
    first = ranges[middle][0]
    if len(left) <= _SHORT_JUMP_MAX:
        return [_instruction(_JUMP_NOT_LESS, len(left), 0, first), *left, *right]
    far = _instruction(_JUMP, 0, 0, len(left))
    return [_instruction(_JUMP_NOT_LESS, 0, 1, first), far, *left, *right]


def _instruction(code: int, jump_true: int, jump_false: int, value: int) -> bytes:
    """Return one sock_filter, little-endian as both architectures are."""
    return code.to_bytes(2, "little") + bytes((jump_true, jump_false)) + value.to_bytes(4, "little")
