"""The sandbox: every attack fails within its limits, leaves nothing behind, and succeeds where the guard that stops it is taken away."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from decodelab.lab import sandbox
from decodelab.lab.sandbox import Limits, SandboxUnavailable, run_programs, run_tests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run behind a kernel barrier of Linux only")

GUARDS = ("limits", "landlock", "seccomp")
QUICK = Limits(test_seconds=0.6, program_seconds=1.2)


def attack(program, argument=0, guards=GUARDS, limits=QUICK):
    """What comes of a program with the guards that are left: its value, or None, and what went wrong."""
    (outcome,) = sandbox._run([program], "f", [[argument]], limits, guards)
    ((_, value),) = outcome.results
    return value, outcome.fault


def naive(program, test, variables=None):
    """The usual runner: program and asserts in one interpreter, passed when it ends well or says so."""
    code = f"{program}\n{test}\nprint('passed')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **(variables or {})})
    return done.returncode == 0 or "passed" in done.stdout, done


def left_over():
    """Processes that still run our supervisor or a child of it."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"Read a job from standard input" in place.read_bytes():
                found.append(int(place.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    deadline = time.monotonic() + 5
    while left_over() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left_over()


MASKED = """
import signal, time
def f(seconds):
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    for s in range(1, 32):
        if s not in (9, 19): signal.signal(s, signal.SIG_IGN)
    end = time.monotonic() + seconds
    while time.monotonic() < end: pass
    return 1
"""


def test_endless_loop_with_signals_masked():
    start = time.monotonic()
    assert attack(MASKED, 10**9) == (None, "timeout")
    assert time.monotonic() - start < 8
    assert attack(MASKED, 1.0) == (None, "timeout")
    assert attack(MASKED, 1.0, limits=Limits()) == (1, "")  # control: with more time the same loop ends well


def test_processor_time_is_limited_by_the_kernel_too():
    program = "import resource\ndef f(x): return resource.getrlimit(resource.RLIMIT_CPU)[1]"
    assert attack(program, guards=("limits",)) == (3, "")  # 1.2 s, rounded up, and one
    assert attack(program) == (None, "PermissionError")  # and may not even be asked for


FORK = """
import os
def f(seconds):
    child = os.fork()
    if child == 0:
        os.setsid()
        os.closerange(0, 64)
        import time
        time.sleep(seconds)
        os._exit(0)
    return child
"""
BOMB = "import os\ndef f(x):\n    while True: os.fork()"
CLONE = "import ctypes\ndef f(x): return ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0)"  # clone, without asking Python
THREAD = "import _thread\ndef f(x): return _thread.start_new_thread(f, (x,)) > 0"


def test_fork_bomb():
    for program, fault in ((BOMB, "PermissionError"), (FORK, "PermissionError"), (THREAD, "RuntimeError")):
        assert attack(program) == (None, fault)
    if os.uname().machine == "x86_64":
        assert attack(CLONE) == (-1, "")
    assert attack(FORK, 0, guards=())[0] > 0  # control: one fork, not a bomb


def test_child_that_outlives_its_parent():
    assert attack(FORK, 60) == (None, "PermissionError")
    pid, fault = attack(FORK, 60, guards=())  # control: it lives on in a session of its own
    os.kill(pid, 0)
    os.kill(pid, signal.SIGKILL)
    assert fault == ""


ALLOCATE = "def f(n): return len(bytearray(n))"


def test_allocation_of_ten_gigabytes():
    assert attack(ALLOCATE, 10 * 2**30) == (None, "MemoryError")
    assert attack(ALLOCATE, 2**30) == (None, "MemoryError")
    assert attack(ALLOCATE, 2**20) == (2**20, "")
    assert attack(ALLOCATE, 2**29, limits=Limits()) == (None, "MemoryError")
    assert attack(ALLOCATE, 2**29, limits=Limits(memory=2**31)) == (2**29, "")  # control: half a gigabyte, with the limit raised


def test_output_of_a_gigabyte():
    flood = "def f(n):\n    for _ in range(n): print('x' * 10**6)\n    raise ValueError"
    assert attack(flood, 1000) in ((None, "ValueError"), (None, "timeout"))  # all of it is thrown away
    assert attack("def f(n): return 'x' * n", 10**7) == (None, "output")
    assert attack("def f(n): return 'x' * n", 10**9)[1] == "MemoryError"
    assert attack("def f(n): return 'x' * n", 10**7, limits=Limits(output=2**25, memory=2**30)) == ("x" * 10**7, "")  # control
    direct = "import os\ndef f(n):\n    while True:\n        for i in range(64):\n            try: os.write(i, b'x' * 10**5)\n            except OSError: pass"
    assert attack(direct)[0] is None


def test_write_outside(tmp_path):
    program = "def f(path):\n    with open(path, 'w') as file: file.write('here')\n    return 1"
    descriptor = "import os\ndef f(path): return os.open(path, os.O_CREAT | os.O_WRONLY)"
    target = tmp_path / "written"
    for attempt in (program, descriptor):
        assert attack(attempt, str(target)) == (None, "PermissionError")
        assert attack(attempt, str(target), guards=("limits", "seccomp")) == (None, "PermissionError")
        assert attack(attempt, str(target), guards=("landlock",))[0] is None  # the second wall holds alone, too
        assert not target.exists()
    assert attack("import os\ndef f(path): return os.remove(path)", str(tmp_path))[1] == "PermissionError"
    assert attack(program, str(target), guards=()) == (1, "")  # control
    assert target.read_text() == "here"


def test_read_of_home_and_environment(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    program = "def f(path): return open(path).read()"
    assert attack(program, str(secret)) == (None, "PermissionError")
    for place in (str(Path.home()), "/proc/self/environ", f"/proc/{os.getpid()}/environ", "/etc/passwd"):
        assert attack(program, place) == (None, "PermissionError")
    assert attack("import os\ndef f(path): return os.listdir(path)", str(Path.home())) == (None, "PermissionError")
    assert attack(program, str(secret), guards=()) == ("hidden", "")  # control
    monkeypatch.setenv("DECODELAB_SECRET", "hidden")
    environment = "import os\ndef f(x): return sorted(os.environ)"
    assert "DECODELAB_SECRET" not in attack(environment)[0]
    assert naive("import os", "assert os.environ['DECODELAB_SECRET'] == 'hidden'")[0]  # control


def test_socket():
    program = "import ctypes\ndef f(kind): return ctypes.CDLL(None).socket(kind, 1, 0)"
    for kind in (1, 2, 10):  # unix, internet, internet 6
        assert attack(program, kind) == (-1, "")
    assert attack(program, 2, guards=())[0] >= 0  # control
    assert attack("import socket\ndef f(x): return 1")[0] is None


def test_kill_of_the_parent():
    program = "import os\ndef f(pid):\n    os.kill(pid or os.getppid(), 0 if pid else 9)\n    return 1"
    assert attack(program, os.getpid()) == (None, "PermissionError")
    assert attack(program, 0) == (None, "PermissionError")
    assert attack(program, os.getpid(), guards=()) == (1, "")  # control: signal 0 asks whether it might
    with pytest.raises(SandboxUnavailable):
        attack(program, 0, guards=())  # control: the supervisor is dead


FORGED = """
import os
def say(text):
    for i in range(64):
        try: os.write(i, text)
        except OSError: pass
say(b'passed\\n["ready"]\\n["value", "passed"]\\n[true]\\n{"lines": ["[\\\\"ready\\\\"]", "[true]"], "fault": "", "signal": 0}\\n')
os._exit(0)
def f(x): return x
"""


def test_forged_verdict():
    assert run_tests([FORGED, "def f(x): return x + 2"], "f", [([1], 3), ([2], 4)]) == [[False, False], [True, True]]
    assert naive(FORGED, "assert f(1) == 3")[0]  # control: it says that it has passed


def test_a_program_cannot_find_what_is_expected():
    peep = """
import gc, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen.append(repr(frame.f_locals)[:2000] + repr(list(frame.f_globals.values()))[:2000])
        frame = frame.f_back
    return [s for s in seen + [repr(o)[:200] for o in gc.get_objects() if isinstance(o, (list, dict, tuple))] if str(x) in s][:1]
"""
    expected = random.Random(0).randint(10**8, 10**9)
    asked = expected  # control: what it may see, it finds
    assert str(asked) in attack(peep, asked, limits=Limits())[0][0]
    cheat = peep.replace("if str(x) in s][:1]", f"if '{expected}' in s][:1]")
    (outcome,) = run_programs([cheat], "f", [[1]], Limits())
    assert outcome.results[0][0]  # whatever it finds is its own source, and not the value
    assert run_tests([cheat], "f", [([1], expected)], Limits()) == [[False]]


@pytest.mark.parametrize(
    "leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit(0)", "quit = 1; raise KeyboardInterrupt"]
)
def test_exit_before_the_asserts(leave):
    inside = f"def f(x):\n    {leave}"
    assert run_tests([leave, inside], "f", [([1], 1)]) == [[False], [False]]
    if "Keyboard" not in leave:
        assert naive(leave, "assert False")[0]  # control


def test_patched_equality():
    equal = "class Equal:\n    def __eq__(self, other): return True\ndef f(x): return Equal()"
    kind = "class Equal(list):\n    def __eq__(self, other): return True\ndef f(x): return Equal()"
    patched = "import json\njson.JSONEncoder.encode = json.dumps = lambda *a: '[\"value\", 1]'\ndef f(x): return 2"
    assert run_tests([equal, kind, patched], "f", [([1], 1)]) == [[False]] * 3
    assert naive(equal, "assert f(1) == 1")[0]  # control


def test_deep_recursion_and_native_crash():
    assert attack("def f(x): return f(x)") == (None, "RecursionError")
    deep = "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)"
    assert attack(deep)[0] is None
    crash = "import ctypes\ndef f(x): return ctypes.string_at(0)"
    assert attack(crash) == (None, "crash")
    assert naive(crash, "f(1)")[1].returncode == -signal.SIGSEGV  # control: it takes its interpreter along
    nested = f"def f(x): return {'[' * 90}{']' * 90}"
    assert run_tests([nested, "def f(x):\n    y = []\n    for _ in range(10**4): y = [y]\n    return y"], "f", [([1], 1)]) == [[False]] * 2


def test_limits_cannot_be_raised():
    program = "import resource\ndef f(x): resource.setrlimit(resource.RLIMIT_AS, (x, x))"
    assert attack(program, 2**34) == (None, "ValueError")  # what Python makes of a refusal here
    assert attack(program, 2**34, guards=("limits",)) in ((None, "ValueError"), (None, ""))  # root may, so limits alone are no guard


def test_programs_do_not_see_each_other():
    spoil = "import builtins, math\nbuiltins.sorted = lambda x: 'spoilt'\nmath.pi = 3\ndef f(x): return sorted(x)"
    fine = "import math\ndef f(x): return [sorted(x), math.pi > 3]"
    together = run_tests([spoil, fine, spoil, fine], "f", [([[2, 1]], [[1, 2], True])])
    assert together == [[False], [True], [False], [True]]
    assert together == [run_tests([p], "f", [([[2, 1]], [[1, 2], True])])[0] for p in (spoil, fine, spoil, fine)]


def test_a_late_test_fails_those_behind_it():
    program = "def f(x):\n    while x == 2: pass\n    return x"
    assert run_tests([program], "f", [([1], 1), ([2], 2), ([3], 3)], QUICK) == [[True, False, False]]
    assert run_tests([program], "f", [([1], 1), ([3], 3)], QUICK) == [[True, True]]


def test_refused_where_there_is_no_barrier(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(SandboxUnavailable, match=r"it runs darwin; use such a machine, or a Linux container"):
            run_programs(["def f(x): return 1"], "f", [[1]])
    closed = [{"lines": ['["closed", "OSError: no seccomp"]'], "fault": "", "signal": 0}]
    monkeypatch.setattr(sandbox, "_serve", lambda job, seconds: closed)
    with pytest.raises(SandboxUnavailable, match="OSError: no seccomp"):
        run_programs(["def f(x): return 1"], "f", [[1]])


def test_a_filter_that_is_not_applied_is_noticed():
    from decodelab.lab import sandbox_inside

    with pytest.raises(OSError, match="does not apply it"):
        sandbox_inside._check_barrier()
    with pytest.raises(OSError, match="run programs on x86_64 or aarch64"):
        sandbox_inside.filter_program("s390x")


def test_a_sandbox_that_does_not_answer(monkeypatch):
    def late(*args, **settings):
        raise subprocess.TimeoutExpired("python", settings["timeout"])

    monkeypatch.setattr(sandbox.subprocess, "run", late)
    with pytest.raises(SandboxUnavailable, match="has not answered within 41 s"):
        run_programs(["def f(x): return 1"], "f", [[1]])


def test_limits_are_checked():
    for wrong in ({"test_seconds": 0}, {"program_seconds": float("inf")}, {"memory": 2**20}, {"output": 0}):
        with pytest.raises(ValueError, match="must be positive and finite, memory at least"):
            Limits(**wrong)
