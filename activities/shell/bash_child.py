"""One script in bashkit, in a process of its own. Run as a script, so that nothing of ours is imported with it.

bashkit is an interpreter in memory, without access to the host. It runs here because its own limits are looked at between
commands: from outside a script can be killed at any moment, and neither the worker's time nor its memory is at stake.

Input, on stdin: a length and a request (JSON), then files, each as two lengths, path and content; an empty path ends them.
Stdin stays open: its end means that the worker has gone, and ends the process and its group.
Output, on stdout: frames of a kind, a length and a payload. `o` and `e` are output and errors of the script as they come, `r` is
the report (JSON), and as many `c` follow as the report has `written`, the contents of those files. Lengths are 4 bytes,
big-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import sys
import threading

ADDRESS_SPACE_BYTES = 1536 * 1024 * 1024
CPU_SECONDS = 120
OPEN_FILES = 64


def limit_resources() -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's time limit has to do
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file of the host grows by anything that happens here
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def received(size: int) -> bytes:
    data = sys.stdin.buffer.read(size)
    if len(data) != size:
        raise SystemExit(1)  # the parent has gone
    return data


def end_with_parent() -> None:
    def wait() -> None:
        os.read(0, 1)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def received_files():
    while True:
        path_size, size = struct.unpack("!II", received(8))
        if path_size == 0:
            return
        yield received(path_size).decode(), received(size)


def send(kind: bytes, payload: bytes) -> None:
    sys.stdout.buffer.write(kind + struct.pack("!I", len(payload)))
    sys.stdout.buffer.write(payload)
    sys.stdout.buffer.flush()


def send_output(stdout: str, stderr: str) -> None:
    for kind, text in ((b"o", stdout), (b"e", stderr)):
        if text:
            send(kind, text.encode("utf-8", "replace"))


class Tree:
    """What is below the root: hashes of files, and directories."""

    def __init__(self, fs, root: str) -> None:
        self._fs = fs
        self.root = root
        self.files: dict[str, str] = {}
        self.directories: set[str] = set()
        self.others: list[str] = []
        parent, _, name = root.rpartition("/")
        self.is_gone = not fs.exists(root)
        kinds = {entry["name"]: entry["metadata"]["file_type"] for entry in fs.read_dir(parent or "/")}
        # A link in its place would show us files that are none of the workspace's.
        self.is_replaced = not self.is_gone and kinds.get(name) != "directory"
        if not self.is_gone and not self.is_replaced:
            self._walk()

    def _walk(self) -> None:
        waiting = [self.root]
        while waiting:
            directory = waiting.pop()
            for entry in self._fs.read_dir(directory):
                path = f"{directory}/{entry['name']}"
                kind = entry["metadata"]["file_type"]
                if kind == "directory":
                    self.directories.add(path)
                    waiting.append(path)
                elif kind == "file":
                    self.files[path] = digest(self._fs.read_file(path))
                else:
                    self.others.append(path)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    limit_resources()
    (size,) = struct.unpack("!I", received(4))
    request = json.loads(received(size))
    root = request["root"]

    from bashkit import Bash

    bash = Bash(**request["options"])
    fs = bash.fs()
    fs.mkdir(root, recursive=True)
    unseen: list[str] = []
    for path in request["directories"]:
        try:
            fs.mkdir(path, recursive=True)
        except RuntimeError:
            unseen.append(path)
    for path, content in received_files():
        try:
            fs.write_file(path, content)
        except RuntimeError:
            unseen.append(path)
    end_with_parent()
    before = Tree(fs, root)

    result = bash.execute_sync(request["commands"], send_output)

    after = Tree(fs, root)
    written = sorted(path for path, hashed in after.files.items() if before.files.get(path) != hashed)
    contents = [fs.read_file(path) for path in written]
    is_too_much = sum(map(len, contents)) > request["changed_max_bytes"]
    report = {
        "exit_code": result.exit_code,
        "error": result.error,
        "is_output_cut": bool(result.stdout_truncated or result.stderr_truncated),
        "written": [] if is_too_much else written,
        "deleted": sorted(before.files.keys() - after.files.keys()),
        "made_directories": sorted(after.directories - before.directories),
        "removed_directories": sorted(before.directories - after.directories),
        "others": sorted(after.others),
        "unseen": sorted(unseen),
        "is_too_much": is_too_much,
        "is_root_replaced": after.is_replaced,
    }
    send(b"r", json.dumps(report).encode())
    for content in [] if is_too_much else contents:
        send(b"c", content)
    os._exit(0)  # closing takes time, and a thread waits for the parent's end


if __name__ == "__main__":
    main()
