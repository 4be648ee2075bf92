"""A process that has torch loaded and forks a training for each line it reads: 20 kills cost one start.

stdin: {"toml": path, "env": {...}, "kill_after_s": seconds or null}; stdout: {"signal": n, "code": n}.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from harvester import failpoints
from harvester.errors import HarvesterError
from trainer import config as settings
from trainer.train import train


def live(told: dict[str, Any]) -> int:
    os.environ.update(told["env"])
    importlib.reload(failpoints)  # reads the environment once, at import
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        train(settings.load(told["toml"]))
    except HarvesterError as error:
        return error.exit_code
    return 0


def main() -> None:
    for line in sys.stdin:
        told = json.loads(line)
        told["toml"] = Path(told["toml"])
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = live(told)
            finally:
                os._exit(code)
        timer = None
        if told.get("kill_after_s") is not None:
            timer = threading.Timer(told["kill_after_s"], os.kill, (child, signal.SIGKILL))
            timer.start()
        _, status = os.waitpid(child, 0)
        if timer is not None:
            timer.cancel()
            timer.join()
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1
        print(json.dumps({"signal": killed, "code": code}), flush=True)


if __name__ == "__main__":
    main()
