"""A seccomp filter of one thread group: computing, its own files, and nothing towards other processes or a network.

It is an allow list: what is not named below fails with EPERM, and calls newer than the list with ENOSYS, as on an older
kernel, so that the C library falls back. New processes, programs, sockets, signals to others and memory that no
RLIMIT counts are therefore impossible. Numbers are those of Linux's unistd_64.h (x86-64) and asm-generic/unistd.h.
"""

import ctypes
import os

# name:x86-64:aarch64, a dash where the architecture has no such call.
_MEMORY_AND_THREADS = """
mmap:9:222 mprotect:10:226 munmap:11:215 brk:12:214 mremap:25:216 madvise:28:233 msync:26:227 futex:202:98
set_tid_address:218:96 set_robust_list:273:99 get_robust_list:274:100 rseq:334:293 membarrier:324:283 sched_yield:24:124
sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120 getpriority:140:141 arch_prctl:158:-
exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95
"""
_SIGNALS_AND_CLOCKS = """
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137
rt_sigsuspend:130:133 sigaltstack:131:132 pause:34:- restart_syscall:219:128 nanosleep:35:101 clock_nanosleep:230:115
clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169 time:201:- times:100:153 getitimer:36:102
setitimer:38:103 alarm:37:-
"""
_ITSELF = """
getpid:39:172 getppid:110:173 gettid:186:178 getpgrp:111:- getpgid:121:155 getsid:124:156 getuid:102:174
geteuid:107:175 getgid:104:176 getegid:108:177 getgroups:115:158 getresuid:118:148 getresgid:120:150 getcpu:309:168
getrandom:318:278 getrlimit:97:163 setrlimit:160:164 getrusage:98:165 sysinfo:99:179 uname:63:160 umask:95:166
"""
_DESCRIPTORS = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70 lseek:8:62
close:3:57 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 select:23:- pselect6:270:72 poll:7:- ppoll:271:73
epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22 eventfd2:290:19
sendfile:40:71 copy_file_range:326:285 flock:73:32 fsync:74:82 fdatasync:75:83 ftruncate:77:46 fallocate:285:47
fadvise64:221:223 sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 shutdown:48:210 getsockname:51:204
getpeername:52:205 getsockopt:55:209 setsockopt:54:208
"""
_FILES = """
open:2:- openat:257:56 stat:4:- fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291 statfs:137:43 fstatfs:138:44
access:21:- faccessat:269:48 faccessat2:439:439 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50
truncate:76:45 rename:82:- renameat:264:38 renameat2:316:276 mkdir:83:- mkdirat:258:34 rmdir:84:- link:86:-
linkat:265:37 unlink:87:- unlinkat:263:35 symlink:88:- symlinkat:266:36 readlink:89:- readlinkat:267:78
getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12 flistxattr:196:13
"""
# Landlock doesn't control these: they are allowed only where every visible file is read-only or the sandbox's own.
_FILE_MODES = "chmod:90:- fchmod:91:52 fchmodat:268:53 fchmodat2:452:452 utimensat:280:88"

_ARCHITECTURES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}
# By architecture: clone, clone3, kill, tgkill, socketpair, prctl, prlimit64, ioctl, fcntl, and seccomp itself.
_CONDITIONAL = {
    "x86_64": (56, 435, 62, 234, 53, 157, 302, 16, 72, 317),
    "aarch64": (220, 435, 129, 131, 199, 167, 261, 29, 25, 277),
}

_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026

_THREAD, _THREAD_OR_NAMESPACE = 0x00010100, 0x7E030100  # CLONE_VM and CLONE_THREAD; the same and every CLONE_NEW*
_UNIX_STREAM = 1  # A datagram pair could still send to a path; a stream pair can't.
_PRCTLS = (15, 16)  # a thread's name
_IOCTLS = (
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # a terminal's kind, bytes to read, close-on-exec
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)  # copies, flags and locks: no owner, so no signal to others
_FIRST_UNLISTED = 424  # From here on numbers are the same on every architecture.

Instruction = tuple[int, int, int, int]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def supported(machine: str) -> bool:
    """Whether the call numbers of this `os.uname().machine` are known."""
    return machine in _ARCHITECTURES


def install(*, file_modes: bool) -> None:
    """Filter the calling process, for good. `OSError` where the kernel refuses. Needs no_new_privs and one thread."""
    machine = os.uname().machine
    code = b"".join(
        code.to_bytes(2, "little") + bytes((yes, no)) + value.to_bytes(4, "little")
        for code, yes, no, value in program(machine, os.getpid(), file_modes=file_modes)
    )
    libc = ctypes.CDLL(None, use_errno=True)
    filter_ = _Program(len(code) // 8, code)
    if libc.syscall(_CONDITIONAL[machine][-1], 1, 0, ctypes.byref(filter_)) != 0:
        raise OSError(ctypes.get_errno(), "seccomp refused the filter")


def program(machine: str, pid: int, *, file_modes: bool) -> list[Instruction]:
    """The filter as (code, jump if true, jump if false, value)."""
    architecture, column = _ARCHITECTURES[machine]
    groups = (_MEMORY_AND_THREADS, _SIGNALS_AND_CLOCKS, _ITSELF, _DESCRIPTORS, _FILES, _FILE_MODES * file_modes)
    fields = [entry.split(":")[column] for group in groups for entry in group.split()]
    allowed = [int(field) for field in fields if field != "-"]
    start: list[Instruction] = [
        *((_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL)),
        # Calls of the x32 kind carry this bit and have numbers of their own.
        *((_LOAD, 0, 0, 0), (_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _ENOSYS)),
    ]
    plain = [step for number in allowed for step in ((_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW))]
    last: list[Instruction] = [*((_AT_LEAST, 0, 1, _FIRST_UNLISTED), (_RETURN, 0, 0, _ENOSYS), (_RETURN, 0, 0, _EPERM))]
    return start + plain + _conditional(machine, pid) + last


def _conditional(machine: str, pid: int) -> list[Instruction]:
    clone, clone3, kill, tgkill, socketpair, prctl, prlimit, ioctl, fcntl, _ = _CONDITIONAL[machine]
    is_pair = [*_argument(0), (_EQUAL, 1, 0, 1), (_RETURN, 0, 0, _EPERM), *_argument(1, mask=0xF)]
    rules = {
        clone: [*_argument(0, mask=_THREAD_OR_NAMESPACE), *_one_of(_THREAD)],
        # Its flags lie in memory, where a filter can't look: the C library falls back to clone.
        clone3: [(_RETURN, 0, 0, _ENOSYS)],
        kill: [*_argument(0), *_one_of(pid)],
        tgkill: [*_argument(0), *_one_of(pid)],
        socketpair: [*is_pair, *_one_of(_UNIX_STREAM)],
        prctl: [*_argument(0), *_one_of(*_PRCTLS)],
        prlimit: [*_argument(0), *_one_of(0, pid)],
        ioctl: [*_argument(1), *_one_of(*_IOCTLS)],
        fcntl: [*_argument(1), *_one_of(*_FCNTLS)],
    }
    return [step for number, body in rules.items() for step in ((_EQUAL, 0, len(body), number), *body)]


def _argument(index: int, mask: int | None = None) -> list[Instruction]:
    load: list[Instruction] = [(_LOAD, 0, 0, 16 + 8 * index)]
    return load if mask is None else [*load, (_AND, 0, 0, mask)]


def _one_of(*values: int) -> list[Instruction]:
    tests = [step for value in values for step in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW))]
    return [*tests, (_RETURN, 0, 0, _EPERM)]
