"""The inside of tools/sandbox.py: three processes, each of which trusts the next one less.

    keeper   enters new namespaces and waits for the others until none is left
    tester   runs the tests, which call the program's functions by name
    program  runs the program; what it sends is read as plain data and as nothing else

The program's process never holds the pipe on which the verdict is given, was forked before the
tests were read, and has no name for the tester: it lies in a PID namespace below, without /proc. So
nothing it prints, replaces, kills or exits with is a verdict; it can only answer calls.

The outside starts this file with "confined" or "unconfined", reads "ready" or why not, maps the
users, and sends a job and then the tests. It reads "passed" from the same pipe, or does not.
"""

import builtins
import contextlib
import ctypes
import functools
import importlib
import json
import os
import resource
import signal
import sys
import traceback
import types

libc = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534
NEW_PID = 0x20000000  # linux/sched.h
NEW_ALL = 0x7C020000  # users, mounts, PIDs, network, IPC, host name
BIND, REC, PRIVATE, DETACH = 0x1000, 0x4000, 0x40000, 2  # linux/mount.h
READ_ONLY, NO_SUID, NO_DEV = 1, 2, 4
MOUNT_SETATTR, HERE, RECURSIVE = 442, -100, 0x8000
ON_PARENTS_DEATH, DUMPABLE, SUBREAPER, NO_NEW_PRIVILEGES = 1, 4, 36, 38  # linux/prctl.h


def system(name, *arguments):
    """libc's function; OSError where it fails."""
    packed = [a.encode() if isinstance(a, str) else a for a in arguments]
    if getattr(libc, name)(*packed) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


# ---------------------------------------------------------------- confinement
def restrict(path, attributes, how=0):
    """Sets a mount's attributes, with RECURSIVE those of all below it."""
    packed = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    system("syscall", MOUNT_SETATTR, HERE, path, how, packed, 32)


def show(source, root):
    """Shows a folder, read-only, at its own path under `root`."""
    os.makedirs(root + source)
    system("mount", source, root + source, None, BIND | REC, None)
    restrict(root + source, READ_ONLY | NO_SUID | NO_DEV, RECURSIVE)


def enter_root(folder, megabytes):
    """A new root: Python's and the system's libraries, read-only, /dev/null, and an empty /tmp of
    so many megabytes. Nothing else of the file system can be named, no socket either.
    """
    system("mount", None, "/", None, REC | PRIVATE, None)
    system("mount", "tmpfs", folder, "tmpfs", 0, "size=1m,mode=755")
    places = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", sys.base_prefix + "/lib", *sys.path]
    for place in sorted({os.path.abspath(p) for p in places if os.path.isdir(p)}):
        if os.path.islink(place):  # /lib → usr/lib
            os.makedirs(os.path.dirname(folder + place), exist_ok=True)
            os.symlink(os.path.realpath(place), folder + place)
        elif not os.path.exists(folder + place):
            show(place, folder)
    os.mkdir(folder + "/dev")
    open(folder + os.devnull, "w").close()
    system("mount", os.devnull, folder + os.devnull, None, BIND, None)
    os.mkdir(folder + "/tmp")
    size = f"size={megabytes}m,nr_inodes=1k,mode=777"
    system("mount", "tmpfs", folder + "/tmp", "tmpfs", 0, size)
    os.chdir(folder)
    system("pivot_root", ".", ".")
    system("umount2", ".", DETACH)
    restrict("/", READ_ONLY)
    os.chdir("/tmp")


def give_up_powers(job):
    """root becomes nobody, whose processes are counted (root's are not); no capability is left, and
    no other process may read this one's memory.
    """
    if job["root"]:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        if not os.access(os.__file__, os.R_OK):
            raise OSError(f"root's programs run as nobody, who cannot read {os.__file__}")
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    system("capset", header, (ctypes.c_uint32 * 6)())
    system("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    system("prctl", DUMPABLE, 0, 0, 0, 0)
    system("prctl", ON_PARENTS_DEATH, signal.SIGKILL, 0, 0, 0)


def limit(job):
    """Limits of one process; the outside watches the clock and the memory of all together."""
    limits = {"AS": job["memory"] * 2**20, "FSIZE": job["file_size"] * 2**20, "NOFILE": 32}
    for name, most in (limits | {"CORE": 0, "MSGQUEUE": 0}).items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1] % 2**63  # -1: none
        resource.setrlimit(number, (min(most, hard),) * 2)


# ---------------------------------------------------------------- plain data
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(x):
    """Plain data → what JSON can hold. TypeError for anything else."""
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    for name, kind in SEQUENCES.items():
        if isinstance(x, kind):
            return {name: [encode(y) for y in x]}
    if isinstance(x, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in x.items()]}
    if isinstance(x, (bytes, bytearray)):
        return {"bytes": x.hex()}
    if isinstance(x, complex):
        return {"complex": [x.real, x.imag]}
    if hasattr(x, "__next__"):
        return {"iterator": [encode(y) for y in x]}
    raise TypeError(f"only plain data passes between program and tests, not a {type(x).__name__}")


def decode(x):
    """encode() undone; always new objects of Python's own types."""
    if not isinstance(x, dict):
        return x
    ((name, value),) = x.items()
    if name in SEQUENCES:
        return SEQUENCES[name]([decode(y) for y in value])
    if name == "dict":
        return {decode(k): decode(v) for k, v in value}
    if name == "bytes":
        return bytes.fromhex(value)
    return complex(*value) if name == "complex" else iter([decode(y) for y in value])


# ---------------------------------------------------------------- the program
def describe(x):
    """How a name of the program reaches the tests: as a function to call, a module, or a value."""
    if isinstance(x, types.ModuleType):
        return "module", x.__name__
    if callable(x):
        return "function", None
    if isinstance(x, (bool, int, float, str, list, tuple, dict, set, frozenset)):
        with contextlib.suppress(TypeError, RecursionError):
            return "value", encode(x)
    return "nothing", None


def serve(program, calls, answers):
    """Runs the program, tells its names, and answers calls until none comes."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    exec(compile(program, "<program>", "exec"), module.__dict__)
    names = {k: describe(v) for k, v in list(vars(module).items()) if isinstance(k, str)}
    answers.write(json.dumps(names) + "\n")
    for line in calls:
        name, arguments, named = json.loads(line)
        arguments = decode(arguments)
        try:
            value = getattr(module, name)(*arguments, **decode(named))
            answer = ["value", encode(value), encode(arguments)]
        except Exception as e:
            answer = ["error", type(e).__name__, str(e)]
        answers.write(json.dumps(answer) + "\n")


def be_program(job, calls, answers):
    """In the program's process; never returns. It keeps the output and its end of the two pipes."""
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the tests come on 0
        resource.setrlimit(resource.RLIMIT_NPROC, (job["processes"], job["processes"]))
        for descriptor in {*range(3, 64)} - {calls, answers}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        serve(job["program"], open(calls), open(answers, "w", buffering=1))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


# ---------------------------------------------------------------- the tests
class Program:
    """The program as the tests see it. When it has ended the tests end, whatever they catch."""

    def __init__(self, calls, answers):
        self.calls = open(calls, "w", buffering=1)
        self.answers = open(answers)

    def read(self):
        try:
            return json.loads(self.answers.readline())
        except ValueError:
            print("the program ended before its tests did", file=sys.stderr)
            os._exit(1)

    def call(self, name, *arguments, **named):
        """A function's value. Its exception is raised here, where Python has one of that name; a
        list, dict or set that it changed is changed here too.
        """
        with contextlib.suppress(BrokenPipeError):
            self.calls.write(json.dumps([name, encode(arguments), encode(named)]) + "\n")
        how, *answer = self.read()
        if how == "error":
            kind = getattr(builtins, answer[0], None)
            real = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if real else RuntimeError)(answer[1])
        value, after = map(decode, answer)
        for old, new in zip(arguments, after, strict=True):
            if isinstance(old, (list, dict, set)) and old != new:
                old.clear()
                (old.extend if isinstance(old, list) else old.update)(new)
        return value

    def names(self):
        """{name: what the tests see of it}, without names of Python's own."""
        found = {}
        for name, (how, value) in self.read().items():
            if how == "function":
                found[name] = functools.partial(self.call, name)
            elif how == "value":
                found[name] = decode(value)
            elif how == "module" and value in sys.stdlib_module_names:
                found[name] = importlib.import_module(value)
        return {k: v for k, v in found.items() if not hasattr(builtins, k) and k[:2] != "__"}


def be_tester(job, verdict):
    """In the tester; never returns. It gives the verdict, or says why no program can run."""
    os.dup2(2, 1)
    try:
        if job["confined"]:
            with open("/proc/sys/user/max_user_namespaces", "w") as f:
                f.write("0")  # none below ours: whoever made one would have powers in it
            enter_root(job["folder"], job["file_size"])
            system("unshare", NEW_PID)  # for the program
        give_up_powers(job)
    except OSError as e:
        os.write(verdict, f"no: {e}".encode())
        os._exit(1)
    limit(job)
    (calls, to_program), (answers, to_tester) = os.pipe(), os.pipe()
    if os.fork() == 0:
        be_program(job, calls, to_tester)
    os.close(calls)
    os.close(to_tester)
    try:
        program = Program(to_program, answers)
        test = json.load(sys.stdin)
        exec(compile(test, "<test>", "exec"), {"__name__": "test", **program.names()})
        os.write(verdict, b"passed")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


# ---------------------------------------------------------------- the keeper
def keep():
    try:
        if sys.argv[1] == "confined":
            system("unshare", NEW_ALL)
        system("prctl", SUBREAPER, 1, 0, 0, 0)  # who loses his parents becomes ours
        system("prctl", ON_PARENTS_DEATH, signal.SIGKILL, 0, 0, 0)
        open(f"/proc/self/task/{os.getpid()}/children").close()  # the outside looks there
    except OSError as e:
        sys.exit(str(e))
    print("ready", flush=True)
    size, job = int(os.read(0, 8)), b""
    while len(job) < size:
        job += os.read(0, size - len(job))  # and no more: the tests are not for all of us
    job = json.loads(job)
    os.environ.clear()
    sys.set_int_max_str_digits(0)
    if os.fork() == 0:
        be_tester(job, os.dup(1))
    os.closerange(0, 3)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    os._exit(0)


if __name__ == "__main__":
    keep()
