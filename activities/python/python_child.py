"""One piece of Python in Monty, in a process of its own. Run as a script, so that nothing of ours is imported with it.

Monty is an interpreter of its own, without access to the host, that runs in a second process. Its client is not for the worker:
cancelling it does not stop what runs, a result nested deeply enough ends the process that receives it, and an interpreter whose
client was killed goes on until its time is up. So client and interpreter are a process group, which is killed as one: by the
worker when a call ends, however it ends, and from here when the worker has gone.

Input, on stdin: frames of a length and JSON; first the request, then an answer to each call. Its end means that the worker has
gone. Output, on stdout: frames of a kind, a length and a payload. `o` and `e` are output and errors as they come, `c` calls a
function of the worker's (JSON), `r` is the report (JSON), the last. Lengths are 4 bytes, big-endian.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import signal
import struct
import sys
import threading

ADDRESS_SPACE_BYTES = 1536 * 1024 * 1024
CPU_MARGIN_SECONDS = 20
OPEN_FILES = 64
OUTPUT_MAX_CHARACTERS = 1024 * 1024
RESULT_MAX_CHARACTERS = 256 * 1024
MAX_DEPTH = 50
SAFE_INTEGER = 2**53 - 1

ERRORS = {
    "FileNotFoundError": FileNotFoundError,
    "PermissionError": PermissionError,
    "ValueError": ValueError,
    "OSError": OSError,
}


def limit_resources(cpu_seconds: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's time limit has to do
        return
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file of the host grows by anything that happens here
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Worker:
    """The other end of the pipes."""

    def __init__(self) -> None:
        self._answers: queue.Queue[dict] = queue.Queue()
        self._output_left = OUTPUT_MAX_CHARACTERS
        self.is_output_cut = False

    def listen(self) -> dict:
        """The request; answers are taken in from now on."""
        request = self._received()
        threading.Thread(target=self._listen, daemon=True).start()
        return request

    def _listen(self) -> None:
        while True:
            self._answers.put(self._received())

    def _received(self) -> dict:
        (size,) = struct.unpack("!I", self._exactly(4))
        return json.loads(self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        data = sys.stdin.buffer.read(size)
        if len(data) != size:
            os.killpg(0, signal.SIGKILL)
        return data

    def send(self, kind: bytes, payload: bytes) -> None:
        sys.stdout.buffer.write(kind + struct.pack("!I", len(payload)))
        sys.stdout.buffer.write(payload)
        sys.stdout.buffer.flush()

    def printed(self, stream: str, text: str) -> None:
        shown = text[: self._output_left]
        self._output_left -= len(shown)
        self.is_output_cut = self.is_output_cut or len(shown) < len(text)
        if shown:
            self.send(b"o" if stream == "stdout" else b"e", shown.encode("utf-8", "replace"))

    def call(self, name: str, **arguments: object) -> object:
        self.send(b"c", json.dumps({"name": name, **arguments}).encode())
        answer = self._answers.get()
        if answer["error"] is not None:
            raise ERRORS.get(answer["error"], OSError)(answer["message"])
        return answer["value"]


def functions(worker: Worker) -> dict:
    def read_file(path: str, binary: bool = False) -> str | bytes:
        data = base64.b64decode(str(worker.call("read_file", path=path_in(path))))
        if binary:
            return data
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise ValueError("the file is not UTF-8 text: use read_file(path, binary=True)") from None

    def write_file(path: str, content: str | bytes) -> int:
        if not isinstance(content, str | bytes):
            raise TypeError("write_file(path, content): content must be str or bytes")
        data = content.encode() if isinstance(content, str) else content
        worker.call("write_file", path=path_in(path), content=base64.b64encode(data).decode())
        return len(data)

    def list_files(path: str = "/workspace", recursive: bool = False) -> object:
        return worker.call("list_files", path=path_in(path), recursive=bool(recursive))

    return {"read_file": read_file, "write_file": write_file, "list_files": list_files}


def path_in(path: object) -> str:
    if not isinstance(path, str):
        raise TypeError("a path must be a str")
    return path


def shown(value: object, depth: int = 0) -> object:
    """A value in JSON; what it has no word for becomes a text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if -SAFE_INTEGER <= value <= SAFE_INTEGER else described(value)
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    if depth >= MAX_DEPTH:
        return "…"
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode(), "bytes": len(value)}
    if isinstance(value, dict):
        return {key if isinstance(key, str) else described(key): shown(one, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [shown(one, depth + 1) for one in value]
    return described(value)


def described(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # Python writes no integers of more than 4,300 digits
        return hex(value) if isinstance(value, int) else "?"


def run(request: dict, worker: Worker) -> dict:
    from pydantic_monty import Monty, MontyCrashedError, MontyError

    report: dict = {"result": None, "result_text": None, "error": None, "timed_out": False}
    pool = Monty(min_processes=1, max_processes=1)
    pool.__enter__()  # never left: the process ends with everything in it
    try:
        with pool.checkout(limits=request["limits"], script_name="code.py") as session:
            value = session.feed_run(
                request["code"],
                inputs=request["inputs"],
                external_lookup=functions(worker),
                print_callback=worker.printed,
            )
            result = json.dumps(shown(value))
            if len(result) > RESULT_MAX_CHARACTERS:
                report["result_text"] = result[:RESULT_MAX_CHARACTERS]
            else:
                report["result"] = json.loads(result)
            # Here, not after the session: ending one may take longer than running it.
            return report
    except MontyCrashedError as error:
        report["timed_out"] = error.timed_out
        report["error"] = "The interpreter ended, most likely for want of memory or stack. Work on less at once."
    except MontyError as error:
        text = error.display() if hasattr(error, "display") else str(error)  # type: ignore[attr-defined]
        report["timed_out"] = "time limit exceeded" in text
        report["error"] = text
    except (RecursionError, MemoryError):
        report["error"] = "The value of the last line is too large to be shown."
    return report


def main() -> None:
    worker = Worker()
    request = worker.listen()
    limit_resources(request["cpu_seconds"] + CPU_MARGIN_SECONDS)
    report = run(request, worker)
    report["is_output_cut"] = worker.is_output_cut
    worker.send(b"r", json.dumps(report).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
