"""Run trainer commands in forks of one process that has torch loaded, so that many runs cost one start-up.

All test processes of a session share it, over a Unix socket. It reads one JSON line a run: {"what": name,
...}. It writes one: {"signal": n, "code": n, "err": text} of the child, or of the first child that failed
where there are several.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import pkgutil
import resource
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import peft
import pyarrow as pa
import rich.live
import rich.progress  # noqa: F401 - what shows the progress of a command
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.llama import modeling_llama  # noqa: F401 - that of `tests.trainer.tiny`

import trainer
from harvester.system import failpoints
from tests.peak_memory import status_kib
from trainer import config as settings
from trainer import harvester_process
from trainer.cli import main as cli
from trainer.data import dataset
from trainer.data.tokens import builder
from trainer.errors import HarvesterError
from trainer.publish.export import export_merged
from trainer.training import launch, nodes, rendezvous
from trainer.training.step import Stepper

# Number of the option of glibc's mallopt.
M_MMAP_THRESHOLD = -3


def command(request: dict[str, Any]) -> None:
    """`trainer WORDS...` as from a shell, killed at a named point, under limits."""
    os.environ.update(request.get("env", {}))
    importlib.reload(failpoints)  # reads the environment once, at import
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file at its limit is an error, as a full disk is
    for name, most in request.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (most, most))
    if request.get("step_bytes"):
        narrow(request["step_bytes"])
    if request.get("makes"):
        note_token_stores(request["makes"], locks=request["locks"])
    if "harvester" in request:
        harvester_process.program = lambda: request["harvester"]
    sys.argv = ["trainer", *map(str, request["words"])]
    cli.main()


def note_token_stores(path: str, *, locks: bool) -> None:
    """Give every corpus a token store, and append this rank to a file each time one is made.

    Args:
        locks: whether locks work; those of some network file systems don't from machine to machine.
    """
    dataset.STORED_ROWS = 0
    original = builder._make

    def make(*told: Any) -> str:
        with Path(path).open("a") as file:
            file.write(f"{os.environ['RANK']}\n")
        return original(*told)

    builder._make = make
    if not locks:
        builder.try_lock = lambda _handle: True


def narrow(more: int) -> None:
    """From the first step on the kernel hands out `more` bytes of address space, and then none."""
    original = Stepper.learn

    def learn(self: Any, *args: Any, **kwargs: Any) -> Any:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        return original(self, *args, **kwargs)

    Stepper.learn = learn


def logits(request: dict[str, Any]) -> None:
    """Load a student with transformers and PEFT alone and write its logits."""
    warnings.simplefilter("ignore")
    student = transformers.AutoModelForCausalLM.from_pretrained(request["base"], dtype=torch.float32)
    if request.get("adapter"):
        student = peft.PeftModel.from_pretrained(student, request["adapter"])
    with torch.no_grad():
        result = student.eval()(input_ids=torch.arange(3, 40)[None]).logits
    save_file({"logits": result}, request["out"])


def prompt(request: dict[str, Any]) -> None:
    """Render messages with transformers alone, as a server does."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["folder"])
    ids = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, return_dict=False)
    Path(request["out"]).write_text(json.dumps(ids), encoding="utf-8")


def export(request: dict[str, Any]) -> None:
    """Export a student twice; write the resident bytes before the second, and the most during it."""
    # glibc returns freed memory at once only above a threshold, which grows up to 32 MiB. Weights of a real
    # base are above it, those of a test are not.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)
    config = settings.load(Path(request["toml"]))
    merged = Path(request["out"]).parent / "merged"
    export_merged(config, merged)  # loads libraries and their pages
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the largest until now
    before = status_kib("VmRSS")
    export_merged(config, merged)
    used = {"before": before << 10, "peak": status_kib("VmHWM") << 10}
    Path(request["out"]).write_text(json.dumps(used), encoding="utf-8")


def gradients(request: dict[str, Any]) -> None:
    """One step of a training, alone or as a rank among others; write what it adds up."""
    from tests.trainer import accumulation

    accumulation.write(request)


def signal_when(child: int, path: str, number: int) -> None:
    """Signal a child as soon as a file exists that it writes, or never if it ends before."""
    while (
        not Path(path).exists() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    ):
        time.sleep(0.005)
    os.kill(child, number)


def node(request: dict[str, Any]) -> None:
    """Launch cheap workers on one of several machines, which are processes here; exit as a launcher."""
    if "pid_file" in request:
        Path(request["pid_file"]).write_text(str(os.getpid()), encoding="ascii")
    for name in [each for each in os.environ if each in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}]:
        del os.environ[name]
    options = rendezvous.Options(**request["options"])
    nodes.LOST_AFTER_S = request.get("lost_after_s", nodes.LOST_AFTER_S)
    chosen = rendezvous.chosen(options, os.environ)
    assert chosen is not None
    try:
        launched = nodes.Nodes(rendezvous.meet(chosen))
        code = launch.run_workers(request["worker"], request["processes"], print, launched)
    except HarvesterError as error:
        print(f"error[{error.code}]: {error.message}")
        code = error.exit_code
    sys.exit(code)


TASKS = {
    "node": node,
    "command": command,
    "export": export,
    "logits": logits,
    "prompt": prompt,
    "gradients": gradients,
}


def fork(request: dict[str, Any], err: Any, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(err.fileno(), 1)
        os.dup2(err.fileno(), 2)
        if request.get("world", 1) > 1:
            here = request["world"] // request.get("nodes", 1)  # processes of each machine
            os.environ.update(
                RANK=str(rank),
                WORLD_SIZE=str(request["world"]),
                LOCAL_RANK=str(rank % here),
                LOCAL_WORLD_SIZE=str(here),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            if "words_of_nodes" in request:
                request["words"] = request["words_of_nodes"][rank // here]
            os.environ.update(request.get("env_of_ranks", {}).get(str(rank), {}))
        TASKS[request["what"]](request)
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run what is asked for in forks of this process and return how they ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryFile("w+") as err:
        children = [fork(request, err, rank, port) for rank in range(request.get("world", 1))]
        timer = None
        if request.get("kill_after_s") is not None:
            timer = threading.Timer(request["kill_after_s"], os.kill, (children[0], signal.SIGKILL))
            timer.start()
        if request.get("signal_when") is not None:
            signal_when(children[0], *request["signal_when"])
        ends = [os.waitpid(child, 0)[1] for child in children]
        if timer is not None:
            timer.cancel()
            timer.join()
        status = next((end for end in ends if end), 0)
        err.seek(0)
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1
        return {"signal": killed, "code": code, "err": err.read()}


def answer_all(connection: socket.socket) -> None:
    """Answer the requests of one test process until it closes the connection."""
    with connection, connection.makefile("rw", encoding="utf-8") as stream:
        stream.write("ready\n")
        stream.flush()
        for line in stream:
            stream.write(json.dumps(answer(json.loads(line))) + "\n")
            stream.flush()


def serve(listener: socket.socket) -> None:
    """Fork a child for each connection; return in the server when the last of them has ended."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    listener.close()
                    answer_all(connection)
                    os._exit(0)
                connection.close()
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
            else:
                os.waitpid(key.data, 0)
                selector.unregister(key.fileobj)
                os.close(key.fd)
                if len(selector.get_map()) == 1:
                    return


def load_all() -> None:
    """Load once what commands load as they go: the trainer's modules, and pandas, for which pyarrow looks."""
    for module in pkgutil.walk_packages(trainer.__path__, "trainer."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    pa.array([""])


def main() -> None:
    """Listen on the socket of the first argument, and end in the foreground once clients can connect.

    The server itself goes on in a fork, since it may outlive the test process that started it.
    """
    torch.set_num_threads(1)
    load_all()
    path = Path(sys.argv[1])
    listener = socket.socket(socket.AF_UNIX)
    path.unlink(missing_ok=True)  # of a server that has ended
    listener.bind(str(path))
    listener.listen()
    gc.collect()
    gc.freeze()  # a collection in a fork then does not touch, and so copy, what all share
    if os.fork():
        os._exit(0)
    os.setsid()
    serve(listener)
    path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
