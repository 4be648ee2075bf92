"""Serve a GGUF file by llama.cpp's own HTTP server until this process is ended.

    python llama_server.py FILE PORT SLOTS

It needs `xllamacpp` on PYTHONPATH and nothing of this project. One compute thread: on two busy cores a second
one makes every matrix product wait for the slower of them.
"""

import signal
import sys

import xllamacpp

TOKENS_PER_SLOT = 1024


def main() -> None:
    file, port, slots = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.model_alias = ["smollm2-135m-instruct"]
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = slots * TOKENS_PER_SLOT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_threads_http = 2 * slots
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
