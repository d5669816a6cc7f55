"""The supervisor process behind `ChildProcesses`: it starts the children, and outlives their owner to end them.

Run as a script, `python -I -S reaper.py`, so it imports the standard library only and is up in about 30 ms; it is never
imported. The owner writes one JSON object per line to its stdin and reads one per line from its stdout:

    start {id, argv, env, cwd, uid, gid, log_path, stop_signal, grace_seconds}   ->  {id, pid} or {id, error}
    signal {id, signal}                               later, once per child      ->  {id, exit_code}
    stop {id}
    remove {path}             a directory that is deleted when everything has ended
    finish                    the next end of file is an orderly one: children get their own grace

Decisions the code can't show:
- The reaper is the children's parent, rather than being told about them: no child can slip through between its start
  and its registration, exit codes are exact, and a process id can't be recycled before it has been waited for here.
- End of file on stdin is the only sign of life that also works for SIGKILL. Nothing else may hold the pipe's other end;
  Python's descriptors are not inherited, and neither are those of the children.
- After an owner that died there is no one left to wait for: the grace is cut to `ORPHAN_GRACE_SECONDS`.
- It sits in its own session and shrugs off SIGINT, SIGTERM and SIGHUP: a Ctrl-C reaches the whole foreground process
  group, and it is the owner who decides in which order things end. Each child has its own session for the same reason.
- If the reaper itself is killed, Linux sends the children their stop signal (PR_SET_PDEATHSIG).
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time

ORPHAN_GRACE_SECONDS = 2.0
KILL_WAIT_SECONDS = 1.0  # SIGKILL is certain but not instant: a process may be in a disk write

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class Supervised:
    def __init__(self, process: subprocess.Popen[bytes], stop_signal: int, grace_seconds: float) -> None:
        self.process = process
        self.stop_signal = stop_signal
        self.grace_seconds = grace_seconds
        self.kill_at: float | None = None
        self.killed = False

    def stop(self, *, longest_grace_seconds: float) -> None:
        if self.kill_at is None:
            # Only the child itself: what it started is its own business until it fails to end in time.
            os.kill(self.process.pid, self.stop_signal)
            self.kill_at = time.monotonic() + self.grace_seconds
        self.kill_at = min(self.kill_at, time.monotonic() + longest_grace_seconds)

    def kill(self) -> None:
        self.killed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Reaper:
    def __init__(self) -> None:
        self.running: dict[int, Supervised] = {}
        self.directories: list[str] = []
        self.orderly = False
        self.prctl = _linux_prctl()
        if self.prctl:
            # Grandchildren whose parent dies become ours, so that none of them can get away.
            self.prctl(PR_SET_CHILD_SUBREAPER, 1)

    def run(self) -> None:
        wakeup_read, wakeup_write = os.pipe()
        os.set_blocking(wakeup_read, False)
        os.set_blocking(wakeup_write, False)
        # A handler, not SIG_IGN: children would inherit an ignored signal across exec.
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)

        buffered = b""
        owner_alive = True
        while owner_alive:
            readable, _, _ = select.select([0, wakeup_read], [], [], self._seconds_to_next_kill())
            if wakeup_read in readable:
                _drain(wakeup_read)
            self._collect()
            self._kill_overdue()
            if 0 in readable:
                chunk = os.read(0, 65536)
                owner_alive = bool(chunk)
                *lines, buffered = (buffered + chunk).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line))

        for child in self.running.values():
            child.stop(longest_grace_seconds=child.grace_seconds if self.orderly else ORPHAN_GRACE_SECONDS)
        while self.running:
            if select.select([wakeup_read], [], [], self._seconds_to_next_kill())[0]:
                _drain(wakeup_read)
            self._collect()
            self._kill_overdue()
        self._end_stragglers()
        self._remove_directories()

    def _obey(self, order: dict) -> None:
        match order["do"]:
            case "start":
                self._start(order)
            case "stop":
                if child := self.running.get(order["id"]):
                    child.stop(longest_grace_seconds=child.grace_seconds)
            case "signal":
                if child := self.running.get(order["id"]):
                    os.kill(child.process.pid, order["signal"])
            case "remove":
                self.directories.append(order["path"])
            case "finish":
                self.orderly = True

    def _start(self, order: dict) -> None:
        prctl, stop_signal = self.prctl, order["stop_signal"]
        log = None
        try:
            if order["log_path"]:
                log = os.open(order["log_path"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            process = subprocess.Popen(  # noqa: S603 - the owner's own command line, and no shell
                order["argv"],
                env=order["env"],
                cwd=order["cwd"],
                stdin=subprocess.DEVNULL,
                # Without a log file the child writes where the owner's errors go; our stdout carries the protocol.
                stdout=2 if log is None else log,
                stderr=2 if log is None else log,
                start_new_session=True,
                # Runs after the change of user, which would clear the setting again.
                preexec_fn=(lambda: prctl(PR_SET_PDEATHSIG, stop_signal)) if prctl else None,
                user=order["uid"],
                group=order["gid"],
                extra_groups=None if order["uid"] is None else [],
            )
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            _tell({"id": order["id"], "error": str(error)})
            return
        finally:
            if log is not None:
                os.close(log)
        self.running[order["id"]] = Supervised(process, stop_signal, order["grace_seconds"])
        _tell({"id": order["id"], "pid": process.pid})

    def _collect(self) -> None:
        """Wait for everything that has ended, adopted grandchildren included."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                for number, child in list(self.running.items()):
                    if child.process.pid == pid:
                        child.process.returncode = os.waitstatus_to_exitcode(status)
                        del self.running[number]
                        _tell({"id": number, "exit_code": child.process.returncode})

    def _seconds_to_next_kill(self) -> float | None:
        due = [child.kill_at for child in self.running.values() if child.kill_at is not None and not child.killed]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for child in self.running.values():
            if child.kill_at is not None and now >= child.kill_at and not child.killed:
                child.kill()

    def _end_stragglers(self) -> None:
        """Kill what the children left behind: PostgreSQL's backends, for one, are leaders of their own sessions."""
        deadline = time.monotonic() + KILL_WAIT_SECONDS
        while time.monotonic() < deadline:
            for pid in _children():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.005)

    def _remove_directories(self) -> None:
        import shutil  # not needed before the very end; loading it would delay every start

        for directory in self.directories:
            shutil.rmtree(directory, ignore_errors=True)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []  # not Linux


def _drain(descriptor: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(descriptor, 4096):
            pass


def _tell(message: dict) -> None:
    # The owner may be gone; ending the children matters more than reporting it.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(message).encode() + b"\n")


def _linux_prctl():
    # No return annotation: ctypes must stay unimported where it is of no use.
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    try:
        return ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None


if __name__ == "__main__":
    Reaper().run()
